"""What a scaling command writes: JSON, text, PNG files and one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..observe.rundir import write_atomic
from ..report.numbers import strict_json
from ..report.template import render, style
from .figures import Picture


@dataclass
class PageSection:
    """A heading, the table under it and its pictures."""

    title: str
    lines: list[str]
    pictures: list[Picture]


def write_json(path: Path, data: dict[str, Any]) -> Path:
    """`strict_json` at `path`."""
    return write_text(path, [json.dumps(strict_json(data), indent=2, ensure_ascii=False, allow_nan=False)])


def write_text(path: Path, lines: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "\n".join(lines) + "\n")
    return path


def write_page(folder: Path, table: str, facts: list[str], sections: list[PageSection]) -> Path:
    """scaling.html in `folder`, each picture inside it and as a PNG file beside it; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = []
    for section in sections:
        pictures = []
        for picture in section.pictures:
            write_atomic(folder / f"{picture.name}.png", picture.png)
            pictures.append({"data": base64.b64encode(picture.png).decode(), "caption": picture.caption})
        shown.append({"title": section.title, "text": "\n".join(section.lines), "pictures": pictures})
    template = Path(__file__).parent / "page.html.j2"
    page = render(template, table=table, facts=facts, sections=shown, style=style())
    write_atomic(folder / "scaling.html", page)
    return folder / "scaling.html"
