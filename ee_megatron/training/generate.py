"""`ee-megatron generate`: one answer as it is written, each token coloured by the depth it took."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.text import Text

from ..config.schema import RunConfig
from ..families.hf_directory import HFDirectory
from ..policy import load_policy
from ..rollout.pool import LocalPool
from ..rollout.sampling import ExitPolicy, SamplingParams
from ..rollout.scheduler import stream
from ..types import Prompt
from . import stages
from .session import pick_device, pick_dtype

# Shallow to deep, from the 256-colour cube: cold to warm with rising lightness, apart for the colour-blind too.
SHADES = ("color(33)", "color(38)", "color(109)", "color(179)", "color(214)", "color(203)")


def parse_exits(text: str) -> ExitPolicy:
    """ "threshold:0.5", "sample", "fixed:20", "confidence:0.9" or "off" -> policy. Raises ValueError."""
    kind, _, value = text.partition(":")
    try:
        return ExitPolicy(kind, float(value) if value else 0.5)
    except ValueError as error:
        raise ValueError(f"--exits {text!r}: {error}") from None


def newest_policy(cfg: RunConfig):
    """(name, checkpoint) of the furthest stage that has finished; ("base", None) if none has."""
    if stages.is_done(cfg, "rl"):
        return "reinforced", stages.reinforced(cfg)
    if cfg.start or stages.is_done(cfg, "calibrate"):
        return "calibrated", stages.calibrated(cfg)
    return "base", None


def stream_answer(cfg: RunConfig, prompt: str, exits: str, temperature: float, max_new_tokens: int) -> None:
    """Print the answer token by token, then how deep it went."""
    policy = parse_exits(exits)
    name, checkpoint = newest_policy(cfg)
    path = stages.base_model(cfg) if checkpoint else cfg.model.path
    spec, tensors = load_policy(checkpoint) if checkpoint else (None, None)
    if tensors is None and policy.kind in ("sample", "threshold"):
        print("no calibrated policy with these settings yet: the base model answers at full depth", file=sys.stderr)
        policy = ExitPolicy("off")
    device = pick_device(cfg)
    pool = LocalPool(path, spec, pick_dtype(cfg, device), device, rows=1, threads=cfg.rollout.threads)
    pool.decoder.load_policy(tensors)
    layers = HFDirectory(path).dims.num_layers
    sampling = SamplingParams(temperature, max_new_tokens, tuple(cfg.rollout.stop))
    console = Console(highlight=False, soft_wrap=True)
    depths = []
    for token in stream(pool.decoder, pool.tokenizer, Prompt("prompt", prompt, "", ""), sampling, policy):
        depths.append(token.depth)
        shade = SHADES[min(len(SHADES) - 1, int(token.depth / layers * len(SHADES)))]
        console.print(Text(token.text, style=shade), end="")
    console.print()
    legend = Text(
        f"{name} model, {len(depths)} tokens, mean depth {sum(depths) / max(1, len(depths)):.1f} of {layers} layers: "
    )
    for i, shade in enumerate(SHADES):
        legend.append(f"≤{round(layers * (i + 1) / len(SHADES))} ", style=shade)
    console.print(legend)
