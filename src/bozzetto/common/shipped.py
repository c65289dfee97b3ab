"""Where the shipped models lie: `flowers` beside the code; the others in the distribution bozzetto-models, or in the
folder of a checkout that it is built from."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"
_CHECKOUT = ASSETS.parents[2] / "models" / "bozzetto_models"
_OTHERS = ("emoji", "flowers-drift", "flowers-flow", "flowers-mar")
INSTALL = "pip install bozzetto-models"


def shipped_folders() -> dict[str, Path]:
    """Folders of the shipped models that are here, by name."""
    roots = [ASSETS, _CHECKOUT]
    if not _CHECKOUT.is_dir() and (found := find_spec("bozzetto_models")) and found.origin:
        roots.append(Path(found.origin).parent)
    return {path.parent.name: path.parent for root in roots for path in sorted(root.glob("*/config.json"))}


def missing_models() -> list[str]:
    """Names of the shipped models that are not installed."""
    return [name for name in _OTHERS if name not in shipped_folders()]
