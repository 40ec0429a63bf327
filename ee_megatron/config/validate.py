"""Whether settings can be right: each by the rules on its field, then whether they fit each other and the model.

All that is wrong is said at once. What is wrong with a setting by itself hides what follows from that: a rule on
several settings is tried with the default in place of a faulty one, and says nothing of that one.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from .contradictions import contradictions, nearest
from .derive import check_cache, resolve_exits, stage_sizes, vllm_vocabulary
from .faults import faults_of, refuse
from .schema import Rules, RunConfig, settings

if TYPE_CHECKING:
    from ..families import ModelDims

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
LARGEST = 2**63


def validate(cfg: RunConfig, dims: ModelDims | None) -> None:
    """Check everything that can be checked without looking at files; `dims` None skips what needs the model.

    Raises Faults (a ValueError), one line per fault: the setting, what was found, what was expected.
    """
    wrong = alone(cfg)
    trusted = repaired(cfg, wrong)
    together = [*contradictions(trusted), *(model_faults(trusted, dims) if dims is not None else ())]
    refuse([*wrong.values(), *unless_about(together, wrong)])


def alone(cfg: RunConfig) -> dict[str, str]:
    """Settings that are wrong by themselves: key -> fault."""
    return {key: fault for key, value, rules in settings(cfg) if (fault := _fault(key, value, rules))}


def check_name(what: str, text: str) -> None:
    """Raises ValueError for what is no plain name. Names become directories, jobs and lines of job scripts."""
    if not NAME.fullmatch(text):
        raise ValueError(
            f"{what}={text!r}: expected a plain name: letters, digits and . _ - (not first . or -), at most 100; "
            "directories and jobs are called by it"
        )


def _fault(key: str, value: Any, rules: Rules) -> str | None:
    """What is wrong with a value by itself."""
    least, named = rules.at_least, [choice or "nothing" for choice in rules.choices]
    items = value if isinstance(value, list) else [value]
    texts = [item for item in items if isinstance(item, str)]
    for wrong, expected in (
        (any(isinstance(item, float) and not math.isfinite(item) for item in items), "a finite number"),
        (any(isinstance(item, int) and abs(item) >= LARGEST for item in items), "a number below 2^63"),
        (
            not (rules.free_text or rules.name) and not all(text.isprintable() for text in texts),
            "text of printable characters",
        ),
        (rules.choices and value not in rules.choices, f"one of {', '.join(named)}"),
        (rules.positive and value <= 0, "a number > 0"),
        (least is not None and value < least, f"a number >= {least}"),
        (rules.share and not 0 <= value <= 1, "a share from 0 to 1"),
    ):
        if wrong:
            return f"{key}={_shown(value)}: expected {expected}"
    if rules.name:
        return next(faults_of(lambda: check_name(key, value)), None)
    if key == "model.path" and not value:
        return "model.path: empty; expected a Hugging Face model directory"
    return None


def _shown(value: Any) -> str:
    text = str(value)
    return text if text and text.isprintable() else repr(text)


def repaired(cfg: RunConfig, keys: Collection[str]) -> RunConfig:
    """A copy with defaults for these keys."""
    cfg = copy.deepcopy(cfg)
    for key in keys:
        *path, name = key.split(".")
        section: Any = cfg
        for part in path:
            section = getattr(section, part)
        field = next(field for field in dataclasses.fields(section) if field.name == name)
        made = field.default_factory
        setattr(section, name, field.default if made is dataclasses.MISSING else made())
    return cfg


def unless_about(lines: Iterable[str], keys: Collection[str]) -> list[str]:
    """Those faults that have nothing to do with these settings. Keys without a dot are words that may mean something
    else."""
    endings = {key: r"(?!\w)" if "." in key else "=" for key in keys}
    patterns = [re.compile(rf"(?<![\w.]){re.escape(key)}{end}") for key, end in endings.items()]
    return [line for line in lines if not any(pattern.search(line) for pattern in patterns)]


def model_faults(cfg: RunConfig, dims: ModelDims) -> Iterator[str]:
    """What does not fit the model."""
    # auto: as small as it may turn out; the pool knows (rollout/pool).
    yield from faults_of(lambda: check_cache(cfg.rollout, dims, 4 if cfg.model.dtype == "float32" else 2))
    yield from _check_lengths(cfg, dims)
    yield from _check_tensor(cfg, dims)
    yield from _check_family(cfg, dims)
    yield from _check_shares(cfg, dims)
    unfit = list(faults_of(lambda: resolve_exits(cfg, dims)))
    yield from unfit
    if not unfit:
        exits = resolve_exits(cfg, dims)
        yield from faults_of(lambda: stage_sizes(cfg.parallel, exits))
        if cfg.rl.fixed_depth and cfg.rl.fixed_depth not in exits.outcomes:
            yield f"rl.fixed_depth={cfg.rl.fixed_depth}: expected 0 or one of {list(exits.outcomes)}"
    from ..exit_layout import gate_units

    yield from faults_of(lambda: gate_units(cfg.exits.gate_width, dims.hidden))


def _check_lengths(cfg: RunConfig, dims: ModelDims) -> Iterator[str]:
    longest = cfg.rollout.max_new_tokens + 1
    if longest > dims.max_positions:
        yield (
            f"rollout.max_new_tokens={cfg.rollout.max_new_tokens}: {longest} positions with a prompt of one token, but "
            f"{cfg.model.path} has {dims.max_positions} (max_position_embeddings); expected at most "
            f"{dims.max_positions - 1}"
        )


def _check_family(cfg: RunConfig, dims: ModelDims) -> Iterator[str]:
    from ..families import VLLM

    if cfg.rollout.backend == "vllm" and dims.family not in VLLM:
        yield (
            f"rollout.backend=vllm: {cfg.model.path} is a {dims.family}, which has no early-exit model in vLLM; "
            f"expected {', '.join(VLLM)}; set rollout.backend=ray"
        )


def _check_shares(cfg: RunConfig, dims: ModelDims) -> Iterator[str]:
    rollout = cfg.rollout
    if rollout.backend != "vllm" or rollout.tensor == 1 or _shares_out(dims, rollout.tensor):
        return
    valid = [degree for degree in range(1, dims.heads + 1) if _shares_out(dims, degree)]
    yield (
        f"rollout.tensor={rollout.tensor}: has to divide the model's {dims.heads} attention heads, its "
        f"intermediate size {dims.intermediate} and its vocabulary {vllm_vocabulary(dims)}, and to divide its "
        f"{dims.kv_heads} key-value heads or be a multiple of them; set one of {valid}"
    )


def _shares_out(dims: ModelDims, tensor: int) -> bool:
    """Whether vLLM can cut the model for so many devices."""
    kv_heads = max(dims.kv_heads, tensor) % min(dims.kv_heads, tensor) == 0
    return kv_heads and not any(size % tensor for size in (dims.heads, dims.intermediate, vllm_vocabulary(dims)))


def _check_tensor(cfg: RunConfig, dims: ModelDims) -> Iterator[str]:
    tensor = cfg.parallel.tensor
    sizes = {"attention heads": dims.heads, "key-value heads": dims.kv_heads, "intermediate size": dims.intermediate}
    bad = [f"{size} {name}" for name, size in sizes.items() if size % tensor]
    if bad:
        valid = [d for d in range(1, dims.kv_heads + 1) if not any(size % d for size in sizes.values())]
        near = nearest(valid, tensor)
        yield (
            f"parallel.tensor={tensor} does not divide {', '.join(bad)} of {cfg.model.path}; "
            f"nearest degrees that do: {', '.join(map(str, near))}"
        )
