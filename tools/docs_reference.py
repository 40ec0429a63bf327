"""mkdocs hook: makes reference.md, every command's --help and every setting, from the command line and the schema."""

import ast
import contextlib
import importlib
import inspect
import io
from typing import Any

from mkdocs.structure.files import File, Files

from ee_megatron import cli
from ee_megatron.config import schema
from ee_megatron.config.fields import MANDATORY, all_settings


def on_files(files: Files, config: Any) -> Files:
    """Adds the page to the site's files."""
    files.append(File.generated(config, "reference.md", content=page()))
    return files


def page() -> str:
    parts = ["# Commands and settings\n", "Generated from the code.\n", "## Commands\n", block(help_of([]))]
    for command in [*cli.COMMANDS, *cli.HANDED_ON]:
        parts += [f"### {command}\n", block(help_of([command]))]
    parts.append(
        "## Settings\n\nGive them as `key=value`. Sections marked *optional* are off unless they say otherwise.\n"
    )
    texts = field_texts()
    section = None
    for entry in all_settings(schema.RunConfig):
        name = entry.key.rpartition(".")[0]
        if entry.kind is not None:
            continue
        if name != section:
            section = name
            parts.append(f"\n### `{name or 'top level'}`\n\n| setting | default | meaning |\n|---|---|---|")
        default = "required" if entry.default == MANDATORY else f"`{entry.default!r}`"
        parts.append(f"| `{entry.key}` | {default} | {meaning(entry, texts)} |")
    return "\n".join(parts) + "\n"


def help_of(words: list[str]) -> str:
    """What `ee-megatron WORDS --help` prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        if words and words[0] in cli.HANDED_ON:
            importlib.import_module(cli.HANDED_ON[words[0]][0], "ee_megatron").main(["--help"])
        else:
            cli.main([*words, "--help"])
    return out.getvalue()


def block(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```\n"


def field_texts() -> dict[tuple[str, str], str]:
    """(class, field) -> the text that stands under the field in config/schema.py."""
    texts = {}
    for node in ast.parse(inspect.getsource(schema)).body:
        if isinstance(node, ast.ClassDef):
            for item, after in zip(node.body, node.body[1:], strict=False):
                if (
                    isinstance(item, ast.AnnAssign)
                    and isinstance(after, ast.Expr)
                    and isinstance(after.value, ast.Constant)
                ):
                    texts[node.name, item.target.id] = " ".join(str(after.value.value).split())
    return texts


def meaning(entry: Any, texts: dict[tuple[str, str], str]) -> str:
    kind: Any = schema.RunConfig
    *sections, name = entry.key.split(".")
    for part in sections:
        kind = next(known_entry.kind for known_entry in all_settings(kind) if known_entry.key == part)
    choices = ", ".join(f"`{choice}`" for choice in entry.rules.choices)
    text = texts.get((kind.__name__, name), "")
    return (text + (f" One of {choices}." if choices else "")).replace("|", "\\|")
