"""README.md of an export: a model card for the Hugging Face hub. What is not known is left out, never guessed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import metadata_load
from jinja2 import StrictUndefined, Template

from .. import __version__
from ..config import hub
from ..exit_rules import Off, Threshold
from ..families import VLLM
from ..families.hf_directory import read_json
from ..policy import PolicySpec
from ..report.results import Results
from ..tensors import ModelSource

CARD, TAG = "README.md", "ee-megatron"
TEMPLATE = Path(__file__).with_name("model_card.md.j2")


class Provenance(NamedTuple):
    """An export's `command`; `results`: the results.json of its policy, which is called `model` there."""

    command: str = ""
    results: Path | None = None
    model: str = ""


UNKNOWN = Provenance()


def model_card(
    base: ModelSource, base_name: str | None, spec: PolicySpec, kind: str, gates: str, rule: Mapping, made: Provenance
) -> str:
    """The card's text. base_name: what the user calls the base; kind: "keep" for an adapter, else as `gates`; rule: the
    default exit rule. The licence is that of the base's own card."""
    theirs: dict[str, Any] = {}
    with suppress(OSError, ValueError, yaml.YAMLError):
        theirs = metadata_load(base.path / CARD) or {}
    # A card of ours names the model that its own was made from; another model's card names that model's parent.
    name = theirs.get("base_model") if TAG in (theirs.get("tags") or ()) else hub.repo_of(base.path) or None
    if base_name and not Path(base_name).is_dir():
        name = base_name
    depths = spec.exit_depths if gates != "drop" else ()
    served = "`vllm serve DIR`" + (", without the exits" if kind == "sidecar" else "")
    if kind == "embed":
        served += ", with ee-megatron installed beside vLLM"
    if kind == "keep" or (kind == "embed" and base.dims.family not in VLLM):
        served = "export the plain model (`--adapters merge --gates drop`)"
    front: dict[str, Any] = {key: theirs[key] for key in ("license", "license_name", "license_link") if key in theirs}
    front |= {"base_model": name} if name else {}
    front |= {"library_name": "peft" if kind == "keep" else "transformers", "pipeline_tag": "text-generation"}
    front["tags"] = [TAG, *(["early-exit"] if depths else []), *(["custom_code"] if kind == "embed" else [])]
    results = Results.from_json(read_json(made.results)) if made.results else Results()
    template = Template(TEMPLATE.read_text(), trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
    return template.render(
        front=yaml.safe_dump({"license": "unknown"} | front, sort_keys=False, allow_unicode=True),
        about={"embed": "A language model with early exits", "keep": "A LoRA adapter"}.get(kind, "A language model"),
        license=theirs.get("license", "unknown"), name=name or base.path.resolve().name, kind=kind, depths=depths,
        spec=spec, rule=":".join(str(part) for part in rule.values() if part is not None), made=made,
        rows=_rows(results, made.model, bool(depths)), results=results, version=__version__, vllm=served,
        code=", trust_remote_code=True" if kind == "embed" else "",
    )  # fmt: skip


def _rows(results: Results, model: str, exits: bool) -> list[dict[str, Any]]:
    """At the chosen threshold, if the export has exits; the same weights at full depth; the teacher."""
    chosen = results.meta.get(f"threshold_{model}")
    full = [(name, Off().label) for name in (model, "teacher")]
    wanted = [(model, Threshold(chosen).label), *full] if exits and chosen is not None else full
    rows = {(row["model"], row["exits"]): row for row in results.rows}
    return [rows[key] for key in wanted if key in rows]
