"""Captions cleaned as those were that published text-to-image models learned from.

The rules of DeepFloyd IF, which PixArt and LlamaGen (arXiv 2406.06525, section 2.3) took over for their T5 captions.
They meant captions found on the web: addresses, file names and article numbers go, and so do Chinese characters. Here
markup is read by the standard library, and text whose encoding was once mistaken is not repaired.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence
from html.entities import html5
from html.parser import HTMLParser
from urllib.parse import unquote_plus

_SITE = r"[a-z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DASHES = r"\-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58"
_WIDE = "[\ufb00-\ufb06\u3000\uff01-\uffef]+"  # ligatures, and letters as wide as ideographs
Rules = Sequence[tuple[str, str]]
# Order matters everywhere.
_ADDRESSES: Rules = (
    ("<person>", "person"),
    (rf"\b(?:https?:(?:/{{1,3}}|[a-z0-9%])|{_SITE})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-z0-9%])|{_SITE})", ""),
)
_SIGNS: Rules = (
    (r"@\w+\b", ""),  # names of users
    (r"[\u31c0-\u9fff]+", ""),  # strokes, phonetic extensions, enclosed and compatibility letters, ideographs
    (rf"[{_DASHES}\ufe63\uff0d]+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # addresses of machines
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),  # the two letters
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_FILES})", ""),
    ("[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
_WORDS: Rules = (
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # numbers of articles, three kinds
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILES})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes; the second x is Cyrillic
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def clean_caption(text: str) -> str:
    """The text as the encoder is to read it: cleaned twice, as published."""
    return _cleaned(_cleaned(text))


def _cleaned(text: str) -> str:
    text = _applied(_ADDRESSES, unquote_plus(text).strip().lower())
    text = _applied(_SIGNS, _Shown.of(text))
    if len(re.findall("[-_]", text)) > 3:  # words that such signs join
        text = re.sub("[-_]", " ", text)
    text = re.sub(_WIDE, lambda found: unicodedata.normalize("NFKC", found[0]), unicodedata.normalize("NFC", text))
    text = html.unescape(html.unescape(text)).strip()
    return _applied(_WORDS, text).strip()


def _applied(rules: Rules, text: str) -> str:
    for pattern, new in rules:
        text = re.sub(pattern, new, text)
    return text


class _Shown(HTMLParser):
    """What a page of this markup shows."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)
        self.parts: list[str] = []
        self.hidden = 0

    @classmethod
    def of(cls, text: str) -> str:
        page = cls()
        page.feed(text)
        page.close()
        return "".join(page.parts)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style") and self.hidden > 0

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)

    def handle_entityref(self, name: str) -> None:
        self.handle_data(html5.get(f"{name};", f"&{name}"))

    def handle_charref(self, name: str) -> None:
        self.handle_data(html.unescape(f"&#{name};"))
