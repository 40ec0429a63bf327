"""Renamed and removed settings of older versions: on a command line, in a file, and in the names of results."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from .schema import KEYS

log = logging.getLogger(__name__)


class Removed(NamedTuple):
    """A removed setting. `default`: its fixed value now, accepted for one release; `instead`: advice for other values;
    `hashed`: that value is still part of the identity of results (identity.py)."""

    default: Any
    instead: str = "leave it out"
    hashed: bool = False


_SEED = Removed(0, "its draws are always those of seed 0; repeat with pretrain.seed, calibrate.seed or rl.seed", True)
_VLLM_EXITS = Removed("masked", "rollout.backend=ray skips layers")
REMOVED = {
    "task.style_weights": Removed([0.4, 0.4, 0.2]),
    "task.verifier_workers": Removed(0, "there are as many verifiers as cores are free"),
    "task.verifier_memory_mb": Removed(4096),
    "task.verifier_deadline_s": Removed(5.0),
    "traces.only_correct": Removed(False, "an answer's verdict is in its trace", True),
    "deterministic": Removed(False, "torch.use_deterministic_algorithms does it for a program of yours"),
    "model.base_unchecked": Removed(False, "name the model that the policy was made on"),
    "parallel.virtual": Removed(1),
    "parallel.stage_layers": Removed([], "stages meet at the exits nearest to an even split; choose exits.depths"),
    "parallel.attention": Removed("auto", "EE_MEGATRON_FLEX=0 does without FlexAttention"),
    "pretrain.warmup": Removed(0.05, hashed=True),
    "teacher.temperature": Removed(0.7, hashed=True),
    "teacher.seed": _SEED,
    "traces.samples": Removed(1, "give calibrate.exit_samples or calibrate.epochs for more updates", True),
    "traces.top_k": Removed(16, "calibrate.teacher=full compares whole distributions", True),
    "traces.seed": _SEED,
    "calibrate.uniform_decay": Removed(0.0),
    "calibrate.keep_upper": Removed(1.0, "calibrate.wise_ft_alpha scales the change of all layers", True),
    "calibrate.warmup": Removed(0.05, hashed=True),
    "rl.surrogate": Removed("ppo"),
    "rl.token_depth": Removed(1.0),
    "rl.exit_later": Removed(0.0),
    "rl.exit_kl_power": Removed(1.0),
    "rl.gate_pull": Removed(0.0),
    "rl.lambda_gain": Removed(10.0),
    "rl.lambda_max": Removed(4.0),
    "rl.overlong_buffer": Removed(0.2, "rl.loss.overlong=filter leaves cut answers out"),
    "rl.epochs": Removed(1, "rl.minibatches makes several updates of a step's rollouts", True),
    "rl.entropy_bonus": Removed(0.0, hashed=True),
    "rl.warmup": Removed(0, hashed=True),
    "rl.replay": Removed("", "steps learn from a pool's rollouts; rl.dump_rollouts keeps them", True),
    "rl.keep": Removed(None, "calibrate.wise_ft_alpha scales what calibration changed"),
    "rollout.partial": Removed("finish", hashed=True),
    "rollout.vllm.exits": _VLLM_EXITS,
    "rollout.vllm_exits": _VLLM_EXITS,
    "rollout.check_weights": Removed(False),
    "rollout.start_timeout_s": Removed(0.0, "rollout.timeout_s lengthens an actor's start, too"),
    "evaluate.split": Removed("evaluation", hashed=True),
    "evaluate.seed": _SEED,
    "deepspeed.betas": Removed([0.9, 0.95], hashed=True),
    "deepspeed.weight_decay": Removed(0.0, hashed=True),
    "deepspeed.offload_optimizer": Removed(False),
    "checkpoint.keep": Removed(2),
    "checkpoint.bad_steps": Removed(5),
    "tracker.project": Removed("ee-megatron", "set the environment variable WANDB_PROJECT"),
    "tracker.tensorboard": Removed(False, "metrics.jsonl has every figure, and wandb shows them"),
}


RENAMED = {k.rules.was: k for k in KEYS if k.rules.was}
SWITCHES = {k.switch: k.key for k in KEYS if k.switch}
"""Older switches of sections -> the sections."""
MAY_BE_OFF = {k.key: k.on for k in KEYS if k.on is not None}
"""Sections that may be switched off -> whether they are on by default."""

NORMAL, SWITCH, BOUND = 0, 1, 2
"""When a setting is applied: in order; afterwards, because it overrides the others (older switches); last, and only if
its section is on (older names that never switched it on)."""
Given = tuple[str, Any, int]


def _credit(value: Any) -> list[Given]:
    of_exits = value == "exit"
    other = [] if of_exits else [("rl.depth_penalty.credit", {"sequence": "answer"}.get(value, value), NORMAL)]
    return [("rl.exit_credit", of_exits, SWITCH), *other]


def _kl_sum(value: Any) -> list[Given]:
    return [("rl.kl_penalty.kind", "reward_sum", SWITCH)] if value else []


REWRITTEN: dict[str, Callable[[Any], list[Given]]] = {
    "start": lambda value: [("init_policy", value, NORMAL)],
    "rl.credit": _credit,
    "rl.depth_credit": _credit,
    "rl.kl_sum": _kl_sum,
    "rl.kl_penalty.sum": _kl_sum,
}
"""Older names whose values changed, too."""


def modern(key: str, value: Any, warns: bool) -> list[Given]:
    """Translate a setting to today's names: (key, value, when). `warns`: warn about an older name. Raises ValueError
    for a removed setting, unless it has the value that is now its only one."""
    if gone := REMOVED.get(key):
        if value != gone.default:
            raise ValueError(f"{key}={value}: was removed and is always {gone.default} now; {gone.instead}")
        settings = list[Given]()
    elif key in REWRITTEN:
        if warns and REWRITTEN[key] is _kl_sum and not value:
            raise ValueError(f"{key}={value}: leave it out, or set rl.kl_penalty.kind=reward")
        settings = REWRITTEN[key](value)
    elif SWITCHES.get(key, key) != key:
        settings = [(SWITCHES[key], value, SWITCH)]
    elif (new := RENAMED.get(key)) is None:
        return [(key, value, NORMAL)]
    elif new.is_switch:
        settings = [(new.inside[-1], None, SWITCH) if value == new.rules.off else (new.key, value, SWITCH)]
    else:
        settings = [(new.key, value, BOUND if new.bound else NORMAL)]
    if warns:
        called = " and ".join(name for name, _, _ in settings)
        warn(f"{key}: this setting {f'is {called} now' if called else 'was removed; leave it out'}")
    return settings


@functools.cache
def warn(text: str) -> None:
    """Log each line once."""
    log.warning(text)


def modernise(config: dict[str, Any], *, warns: bool) -> list[str]:
    """Translate a nested configuration to today's names, in place. Returns a fault for each removed setting, unless it
    has the value that is now its only one."""
    faults, settings = list[str](), list[Given]()
    for key in (*REWRITTEN, *REMOVED, *RENAMED, *SWITCHES):
        *path, name = key.split(".")
        part = _section(config, path)
        if part is None or name not in part or SWITCHES.get(key) == key:
            continue
        try:
            settings += modern(key, part.pop(name), warns)
        except ValueError as error:
            faults.append(str(error))
        if path and not part:
            del (_section(config, path[:-1]) or config)[path[-1]]
    assign_all(config, settings, warns=warns)
    for key in MAY_BE_OFF:
        *path, name = key.split(".")
        part = _section(config, path)
        if part is not None and isinstance(part.get(name), bool):
            assign(config, key, part[name])
    return faults


def _section(config: Any, path: list[str]) -> dict[str, Any] | None:
    for step in path:
        config = config.get(step) if isinstance(config, dict) else None
    return config if isinstance(config, dict) else None


def assign_all(config: dict[str, Any], given: list[Given], *, warns: bool) -> None:
    """Set values in a nested configuration, in the order of NORMAL, SWITCH, BOUND."""
    for key, value, when in sorted(given, key=lambda entry: entry[2]):
        if when != BOUND or _is_on(config, key):
            assign(config, key, value)
        elif warns:
            warn(f"{key}: has no effect, the section is switched off")


def assign(config: dict[str, Any], key: str, value: Any) -> None:
    """Set a value. A section that may be off: true or any of its fields switches it on, null and false off."""
    *path, name = key.split(".")
    part = config
    for step in path:
        if not isinstance(part.get(step), dict):
            part[step] = {}
        part = part[step]
    held = part[name] if isinstance(part.get(name), dict) else {}
    if isinstance(value, dict):
        part[name] = held
        for inner, given in value.items():
            assign(config, f"{key}.{inner}", given)
    elif key in MAY_BE_OFF and (value is None or isinstance(value, bool)):
        part[name] = held if value else None
    else:
        part[name] = value


def _is_on(config: Any, key: str) -> bool:
    """Whether all sections around a key are on."""
    *path, _ = key.split(".")
    for length, step in enumerate(path, start=1):
        config = config.get(step, {} if MAY_BE_OFF.get(".".join(path[:length]), True) else None)
        if not isinstance(config, dict):
            return False
    return True
