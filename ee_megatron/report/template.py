"""What pages share: the style sheet, pieces (parts.html.j2) and how a template is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

FOLDER = Path(__file__).parent


def style() -> Markup:
    """The style sheet of the report, and of pages that are to look like it; no colours of series or depths."""
    return Markup((FOLDER / "page.css").read_text(encoding="utf-8"))


def render(template: Path, **context: Any) -> str:
    """The page of a Jinja template. What it is given is escaped unless it is Markup; what it lacks is an error."""
    environment = Environment(
        loader=FileSystemLoader([template.parent, FOLDER]), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(template.name).render(context)
