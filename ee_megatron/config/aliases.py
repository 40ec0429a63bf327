"""Settings that older versions had: what became of them, on a command line, in a file, and in the names of results."""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple

log = logging.getLogger(__name__)


class Removed(NamedTuple):
    """A setting that is no more. `default`: the value that it now always has, accepted for one release; `instead`: what
    to do where it had another; `hashed`: it still stands in the identity of results (identity.py) with that value."""

    default: Any
    instead: str = "leave it out"
    hashed: bool = False


_SEED = Removed(0, "its draws are always those of seed 0; repeat with pretrain.seed, calibrate.seed or rl.seed", True)
REMOVED = {
    "task.style_weights": Removed([0.4, 0.4, 0.2]),
    "task.seed": _SEED,
    "task.verifier_workers": Removed(0, "there are as many verifiers as cores are free"),
    "task.verifier_memory_mb": Removed(4096),
    "pretrain.warmup": Removed(0.05, hashed=True),
    "teacher.temperature": Removed(0.7, hashed=True),
    "teacher.seed": _SEED,
    "traces.samples": Removed(1, "give calibrate.patterns or calibrate.epochs for more updates", True),
    "traces.top_k": Removed(16, "calibrate.teacher=full compares whole distributions", True),
    "traces.seed": _SEED,
    "calibrate.uniform_decay": Removed(0.0),
    "calibrate.keep_upper": Removed(1.0, "calibrate.keep scales the change of all layers", True),
    "calibrate.warmup": Removed(0.05, hashed=True),
    "rl.exit_later": Removed(0.0),
    "rl.exit_kl_power": Removed(1.0),
    "rl.gate_pull": Removed(0.0),
    "rl.lambda_gain": Removed(10.0),
    "rl.lambda_max": Removed(4.0),
    "rl.overlong_buffer": Removed(0.2, "rl.overlong=filter leaves cut answers out"),
    "rl.entropy_bonus": Removed(0.0, hashed=True),
    "rl.warmup": Removed(0, hashed=True),
    "rl.keep": Removed(None, "calibrate.keep scales what calibration changed"),
    "rollout.partial": Removed("finish", hashed=True),
    "rollout.start_timeout_s": Removed(0.0, "rollout.timeout_s lengthens an actor's start, too"),
    "evaluate.split": Removed("evaluation", hashed=True),
    "evaluate.seed": _SEED,
    "deepspeed.betas": Removed([0.9, 0.95], hashed=True),
    "checkpoint.keep": Removed(2),
    "checkpoint.bad_steps": Removed(5),
    "tracker.project": Removed("ee-megatron", "set the environment variable WANDB_PROJECT"),
    "tracker.tensorboard": Removed(False, "metrics.jsonl has every figure, and wandb shows them"),
}


def removed(key: str, value: Any) -> bool:
    """Whether a setting is one that was removed and has the value that is now its only one: it is left out. Raises
    ValueError for another value."""
    if key not in REMOVED:
        return False
    if value != REMOVED[key].default:
        raise ValueError(
            f"{key}={value}: this setting was removed and is always {REMOVED[key].default} now; {REMOVED[key].instead}"
        )
    return True


@functools.cache
def warn(text: str) -> None:
    """Each line once."""
    log.warning(text)


def without_removed(config: dict[str, Any], *, told: bool) -> list[str]:
    """Take removed settings out of a nested configuration, in place. Returns a fault for each that has another value
    than the one that remained; `told`: the others are warned of."""
    faults = []
    for key in REMOVED:
        section, name = key.split(".")
        held = config.get(section)
        if not isinstance(held, dict) or name not in held:
            continue
        try:
            removed(key, held.pop(name))
        except ValueError as error:
            faults.append(str(error))
        else:
            if told:
                warn(f"{key}: this setting was removed; leave it out")
        if not held:
            del config[section]
    return faults
