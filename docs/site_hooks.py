"""What the site (mkdocs.yml) takes from files outside of docs/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parent.parent
_TAKEN = {"architecture.md": "ARCHITECTURE.md", "changelog.md": "CHANGELOG.md"}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page's text, or that of the file it stands for, with links as they are inside the site; what lies outside
    is named without a link."""
    name = page.file.src_uri
    if name in _TAKEN:
        markdown = (_ROOT / _TAKEN[name]).read_text(encoding="utf-8").replace("](docs/", "](")
        # A drawing would need a script from elsewhere; the page's own table says the same.
        markdown = re.sub(r"<!-- rooms -->.*?<!-- /rooms -->\n", "", markdown, flags=re.DOTALL)
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", markdown)
