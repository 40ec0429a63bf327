"""`ee-megatron generate` and `ee-megatron serve`: a trained model answers, in the terminal or over HTTP.

`generate` shows one answer as it is written, each token coloured by the depth it took.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.text import Text

from .config.device import pick_device, pick_dtype
from .config.schema import RunConfig
from .exit_rules import ExitRule, Off, parse
from .families.hf_directory import HFDirectory
from .policy import PolicySpec, load_policy
from .rollout.engine.sampling import SamplingParams
from .rollout.engine.scheduler import stream
from .rollout.pool.local import LocalPool
from .training import stages
from .types import Prompt

if TYPE_CHECKING:
    from .rollout.server.run import ServerSettings

# Shallow to deep, from the 256-colour cube: cold to warm with rising lightness, apart for the colour-blind too.
SHADES = ("color(33)", "color(38)", "color(109)", "color(179)", "color(214)", "color(203)")


def parse_exits(text: str) -> ExitRule:
    """`exit_rules.parse` with the option's name in its errors."""
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"--exits {text!r}: {error}") from None


@dataclass(frozen=True)
class Chosen:
    """What is to answer: a name for it, the Hugging Face directory, the policy on it (None: the model as it is)."""

    name: str
    path: Path
    checkpoint: Path | None
    spec: PolicySpec | None
    tensors: dict[str, torch.Tensor] | None

    def exits(self, text: str) -> ExitRule:
        """The exit rule asked for; full depth, said once, where it would need gates that aren't there."""
        rule = parse_exits(text)
        if self.tensors is None and "gates" in rule.needs:
            print("no policy with gates: the base model answers at full depth", file=sys.stderr)
            return Off()
        return rule


def newest_policy(cfg: RunConfig) -> tuple[str, Path | None]:
    """(name, checkpoint) of the furthest stage that has finished; ("base", None) if none has."""
    if stages.is_done(cfg, "rl"):
        return "reinforced", stages.reinforced(cfg)
    if cfg.start or stages.is_done(cfg, "calibrate"):
        return "calibrated", stages.calibrated(cfg)
    return "base", None


def choose(cfg: RunConfig, model: str | None = None, policy: str | None = None) -> Chosen:
    """The model directory and policy checkpoint (or stage directory) given; else the configuration's newest policy.

    Raises FileNotFoundError or ValueError for what is not there or does not fit together.
    """
    name, checkpoint = ("base", None) if model or policy else newest_policy(cfg)
    if policy:
        name, checkpoint = "policy", stages.policy_at(f"--policy {policy}", policy)
    path = Path(model) if model else stages.base_model(cfg) if checkpoint else stages.source_model(cfg)
    spec, tensors = load_policy(checkpoint) if checkpoint else (None, None)
    return Chosen(f"{path.resolve().name}-{name}" if model else name, path, checkpoint, spec, tensors)


def make_replica(cfg: RunConfig, chosen: Chosen, device: str) -> LocalPool:
    pool = LocalPool(chosen.path, chosen.spec, pick_dtype(cfg, device), device, rows=1, threads=cfg.rollout.threads)
    pool.decoder.load_policy(chosen.tensors)
    return pool


def serve(cfg: RunConfig, settings: ServerSettings, exits: str, model: str | None, policy: str | None) -> None:
    """Answer over HTTP until told to stop; the key that clients need, if any, is EE_API_KEY's."""
    from .rollout.server.run import run

    device = pick_device(cfg)
    chosen = choose(cfg, model, policy)
    default = chosen.exits(exits)
    # Before the model is read, which takes its time.
    with settings.bind() as listening:
        replica = make_replica(cfg, chosen, device)
        name = chosen.name if model else f"{cfg.name}-{chosen.name}"
        about = {"policy": str(chosen.checkpoint) if chosen.checkpoint else None}
        key = os.environ.get("EE_API_KEY") or None
        run(replica.decoder, str(chosen.path), name, default, settings, listening, key, about)


def stream_answer(
    cfg: RunConfig,
    prompt: str,
    exits: str,
    temperature: float,
    max_new_tokens: int,
    model: str | None = None,
    policy: str | None = None,
) -> None:
    """Print the answer token by token, then how deep it went."""
    parse_exits(exits)
    device = pick_device(cfg)
    chosen = choose(cfg, model, policy)
    rule, replica = chosen.exits(exits), make_replica(cfg, chosen, device)
    layers = HFDirectory(chosen.path).dims.num_layers
    sampling = SamplingParams(temperature, max_new_tokens, tuple(cfg.rollout.stop))
    console = Console(highlight=False, soft_wrap=True)
    depths = []
    for token in stream(replica.decoder, replica.tokenizer, Prompt("prompt", prompt, "", ""), sampling, rule):
        depths.append(token.depth)
        shade = SHADES[min(len(SHADES) - 1, int(token.depth / layers * len(SHADES)))]
        console.print(Text(token.text, style=shade), end="")
    console.print()
    mean = sum(depths) / max(1, len(depths))
    legend = Text(f"{chosen.name} model, {len(depths)} tokens, mean depth {mean:.1f} of {layers} layers: ")
    for i, shade in enumerate(SHADES):
        legend.append(f"≤{round(layers * (i + 1) / len(SHADES))} ", style=shade)
    console.print(legend)
