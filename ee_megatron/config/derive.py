"""Quantities derived from settings: ranks, the model's dimensions, its exits and stages, the policy to train.

torch is imported only where exits or dimensions are built, so that checks without a model cost nothing.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..objectives.policy_gradient import KL_TERMS
from . import hub
from .config_paths import shipped
from .schema import ParallelConfig, RLConfig, RolloutConfig, RunConfig

if TYPE_CHECKING:
    from ..exits import ExitLayout
    from ..families import ModelDims
    from ..policy import PolicySpec


START_S = 180.0
"""Time for an actor's imports, and for Ray's nodes to connect."""
COMPILE_S = 180.0
"""Extra time if vLLM compiles with an empty cache."""
DISK_BYTES_PER_S = 100e6
"""Read rate of a slow disk, or of a busy network file system, for one reader."""
CALL_S, TOKEN_S = 600.0, 0.25
"""For any call on an actor, and for each token of its longest answers: ten times what two waves of full rows take a 32B
model on an H100 (docs/plans.md)."""


class Scoring(NamedTuple):
    """Scores that an RL step computes before its first update: of the policy; with the exact divergence from the
    reference; the reference's log-probabilities of the tokens."""

    policy: bool
    divergence: bool
    reference: bool


def exits_judged(rl: RLConfig) -> bool:
    """Whether exits are credited with divergences."""
    return rl.exit_credit is not None and rl.kl_penalty.weight * rl.exit_credit.kl_weight > 0


def exits_read(rl: RLConfig) -> bool:
    """Whether the pool scores rollouts for the divergences of all exits that their tokens passed."""
    return rl.exit_credit is not None and exits_judged(rl) and rl.exit_credit.divergence == "all"


def scoring(rl: RLConfig) -> Scoring:
    """The scores that the objective needs and, unless rl.skip_scoring, those for metrics only."""
    exact = KL_TERMS[rl.kl_penalty.kind].teacher is not None
    judged = exits_judged(rl) and not exits_read(rl)
    needed = rl.kl_penalty.weight > 0 or judged
    return Scoring(
        policy=not rl.skip_scoring,
        divergence=exact and judged and not rl.skip_scoring,
        reference=not exact and (needed or not rl.skip_scoring),
    )


def ranks(cfg: RunConfig) -> int:
    """Learner processes: tensor x pipeline x data."""
    return cfg.parallel.tensor * cfg.parallel.pipeline * cfg.parallel.data


def model_dir(cfg: RunConfig) -> Path:
    """The directory that model.path names: relative to the working directory, one of the shapes in configs/, or in the
    cache for a hub id with its commit."""
    return shipped(hub.directory(cfg.model.path))


def draws_weights(cfg: RunConfig) -> bool:
    """Whether the run starts from random weights, so that model.path need hold none."""
    return cfg.pretrain is not None and cfg.pretrain.init == "random"


def read_dims(cfg: RunConfig) -> ModelDims:
    """Model dimensions from config.json and the settings that override it; weights are not read.

    Raises what `shape_config` does, and ValueError for an unsupported architecture.
    """
    from ..families import dims_from_config

    return dims_from_config(shape_config(cfg))


def shape_config(cfg: RunConfig) -> dict[str, Any]:
    """The model directory's config.json with pretrain.layers and pretrain.width applied.

    Raises FileNotFoundError (no such directory or file) or ValueError (not JSON, no whole number of heads).
    """
    from ..families.hf_directory import read_json

    file = model_dir(cfg) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"model.path={cfg.model.path}: no config.json there; expected a Hugging Face model directory: "
            "give model.path=<directory>; the demo's is made by `make model` in a checkout, elsewhere by `python -m "
            "ee_megatron.checkpoint.demo_model --out models/SmolLM2-135M-Instruct`"
        )
    shape = (cfg.pretrain.layers, cfg.pretrain.width) if cfg.pretrain else (0, 0)
    return reshaped(read_json(file), *shape)


def reshaped(config: dict[str, Any], layers: int, width: int) -> dict[str, Any]:
    """A config.json with other numbers of layers and hidden size; 0: unchanged. The MLP stays in proportion, to the
    nearest multiple of 8; heads keep their size, so that their number follows. Raises ValueError."""
    changed = dict(config)
    if layers:
        changed["num_hidden_layers"] = layers
        # One entry per layer, in newer files; all are alike in what is supported (families/base.py).
        if types := changed.get("layer_types"):
            changed["layer_types"] = [types[0]] * layers
    if not width:
        return changed
    hidden, of_query = config["hidden_size"], config["num_attention_heads"]
    of_key = config.get("num_key_value_heads", of_query)
    if width * of_query % hidden or width * of_key % hidden:
        step = hidden // math.gcd(of_query, of_key)
        raise ValueError(
            f"pretrain.width={width}: heads of {hidden // of_query} don't divide it; expected a multiple of {step}"
        )
    changed |= {
        "hidden_size": width,
        "intermediate_size": 8 * max(1, round(config["intermediate_size"] * width / hidden / 8)),
        "num_attention_heads": width * of_query // hidden,
        "num_key_value_heads": width * of_key // hidden,
    }
    return changed


def resolve_exits(cfg: RunConfig, dims: ModelDims) -> ExitLayout:
    """The model's exits: exits.depths, or every fifth layer and the stage boundaries where none are given."""
    from ..exits import ExitLayout

    if cfg.exits.depths:
        return ExitLayout(dims.num_layers, tuple(cfg.exits.depths))
    return ExitLayout.default(dims.num_layers, cfg.parallel.pipeline)


def stage_sizes(parallel: ParallelConfig, exits: ExitLayout) -> tuple[int, ...]:
    """Layers per pipeline stage. Raises ValueError as `ExitLayout` does."""
    return exits.stage_sizes(parallel.pipeline)


def start_timeout(rollout: RolloutConfig, weight_bytes: int) -> float:
    """Deadline of an actor's start, seconds, with `weight_bytes` to read; rollout.timeout_s, if that is more."""
    compiles = rollout.backend == "vllm" and (rollout.vllm is None or rollout.vllm.compile)
    return max(rollout.timeout_s, START_S + compiles * COMPILE_S + weight_bytes / DISK_BYTES_PER_S)


def call_timeout(rollout: RolloutConfig) -> float:
    """Deadline of a call on an actor, seconds: rollout.timeout_s or, if 0, computed from the work."""
    return rollout.timeout_s or CALL_S + TOKEN_S * rollout.max_new_tokens


def policy_spec(cfg: RunConfig, dims: ModelDims) -> PolicySpec:
    """Spec of the adapters and gates that this configuration trains."""
    from ..policy import ATTENTION, MLP, PolicySpec

    return PolicySpec(
        num_layers=dims.num_layers,
        exit_depths=resolve_exits(cfg, dims).depths,
        rank=0 if cfg.adapter.full else cfg.adapter.rank,
        full=cfg.adapter.full,
        alpha=cfg.adapter.alpha,
        targets=ATTENTION if cfg.adapter.targets == "attention" else ATTENTION + MLP,
        gate_width=cfg.exits.gate_width,
        gate_input=cfg.exits.gate_input,
        first_token=cfg.exits.first_token,
    )


def position_bytes(dims: ModelDims, item: int, tensor: int = 1) -> int:
    """Bytes of one position's keys and values, of `item` bytes per element, on each of `tensor` devices, which share
    the key-value heads; with more devices than heads each has one."""
    return 2 * item * dims.num_layers * max(1, dims.kv_heads // tensor) * dims.head_dim


def vllm_vocabulary(dims: ModelDims) -> int:
    """Vocabulary rows after vLLM's padding, before it shards them."""
    return -(-dims.vocab // 64) * 64


def cache_positions(rollout: RolloutConfig, dims: ModelDims, item: int) -> int:
    """Positions that rollout.cache_gib holds."""
    return int(rollout.cache_gib * 2**30 / position_bytes(dims, item, rollout.tensor))


def check_cache(rollout: RolloutConfig, dims: ModelDims, item: int) -> None:
    """Raises ValueError if rollout.cache_gib has no room for the longest answer, whatever its prompt."""
    held, longest = cache_positions(rollout, dims, item), rollout.max_new_tokens + 1
    if rollout.cache_gib and held < longest:
        # A little more than needed: the cache is cut into pages, and this is rounded.
        needed = 1.02 * longest * position_bytes(dims, item, rollout.tensor) / 2**30
        raise ValueError(
            f"rollout.cache_gib={rollout.cache_gib:g}: holds {held} positions, rollout.max_new_tokens="
            f"{rollout.max_new_tokens} and a prompt of one take {longest}; raise it above {needed:.3g}, or lower "
            "rollout.max_new_tokens"
        )


def has_actors(rollout: RolloutConfig) -> bool:
    """Whether rollouts are generated by actors in processes of their own."""
    return rollout.backend != "local"


def actor_share(rollout: RolloutConfig) -> float:
    """Devices of an actor: a share of one, or as many as its model is shared among."""
    return rollout.device_share if rollout.tensor == 1 else rollout.tensor
