"""What a scaling command writes: JSON, text, PNG files and one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from .. import report
from ..observe.rundir import write_atomic
from .figures import Picture


@dataclass
class PageSection:
    """A heading, the table under it and its pictures."""

    title: str
    lines: list[str]
    pictures: list[Picture]


def write_json(path: Path, data: dict[str, Any]) -> Path:
    """Strict JSON: what is not finite would be read as one thing by some and refused by others, so it is null."""
    return write_text(path, [json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False)])


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


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
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    style = (Path(report.__file__).parent / "page.css").read_text(encoding="utf-8")
    page = environment.get_template("page.html.j2").render(
        table=table, facts=facts, sections=shown, style=Markup(style)
    )
    write_atomic(folder / "scaling.html", page)
    return folder / "scaling.html"
