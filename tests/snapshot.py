"""Whole pages as text, compared with what is stored under tests/snapshots; UPDATE_SNAPSHOTS=1 stores them anew."""

from __future__ import annotations

import os
from html.parser import HTMLParser
from pathlib import Path

STORED = Path(__file__).with_name("snapshots")
BLOCKS = frozenset({"caption", "dt", "figcaption", "h1", "h2", "h3", "h4", "li", "nav", "p", "summary", "tr"})


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.silent, self.parts = "", [""]

    def handle_starttag(self, tag, attrs) -> None:
        if not self.silent and tag in ("script", "style", "svg", "article"):
            self.silent = tag
        self.parts.append("\n" if tag in BLOCKS else " ")

    def handle_endtag(self, tag) -> None:
        if tag == self.silent:
            self.silent = ""
        self.parts.append("\n" if tag in BLOCKS else " ")

    def handle_data(self, data) -> None:
        if not self.silent:
            self.parts.append(data)


def page_text(page: Path) -> str:
    """What a page says, a block a line: without its drawings, its data and the answers that it quotes."""
    text = _Text()
    text.feed(page.read_text())
    lines = (" ".join(line.split()) for line in "".join(text.parts).replace(str(page.parent), "DIR").split("\n"))
    return "".join(f"{line}\n" for line in lines if line)


def assert_as_stored(text: str, name: str) -> None:
    """Compare with tests/snapshots/NAME; with UPDATE_SNAPSHOTS=1 write it."""
    file = STORED / name
    if os.environ.get("UPDATE_SNAPSHOTS") == "1":
        STORED.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text(), f"{name} differs; if that is meant, run this test with UPDATE_SNAPSHOTS=1"
