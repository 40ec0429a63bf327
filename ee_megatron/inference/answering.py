"""`ee-megatron generate` and `ee-megatron serve`: answer in the terminal or over HTTP with a trained model."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from ..config.schema import RunConfig
from ..config.validate import check_template
from ..exit_rules import ExitRule, Off
from ..rollout.engine.sampling import SamplingParams
from .model import EarlyExitModel
from .model_resolver import resolve_configured

if TYPE_CHECKING:
    from ..rollout.server.run import ServerSettings

# Shallow to deep, from the 256-colour cube: cold to warm with rising lightness, apart for the colour-blind too.
SHADES = ("color(33)", "color(38)", "color(109)", "color(179)", "color(214)", "color(203)")


def load(cfg: RunConfig, model: str | None, policy: str | None, base_unchecked: bool = False) -> EarlyExitModel:
    """Load a model. Raises FileNotFoundError or ValueError, for a policy of another base unless `base_unchecked`."""
    made = EarlyExitModel.of(cfg, resolve_configured(cfg, model, policy, base_unchecked), cfg.rollout.threads)
    check_template("chat_template_kwargs", cfg.rollout.chat_template_kwargs, made.tokenizer.chat_template)
    made.chat_template_kwargs |= cfg.rollout.chat_template_kwargs
    return made


def rule_for(answering: EarlyExitModel, rule: ExitRule | None) -> ExitRule:
    """The requested exit rule, or the model's own; full depth, with a note, if the model lacks the gates for it."""
    if rule is None:
        return answering.default_exits
    if not answering.has_gates and "gates" in rule.needs:
        print("no policy with gates: the base model answers at full depth", file=sys.stderr)
        return Off()
    return rule


def wants_chat(answering: EarlyExitModel, requested: bool | None) -> bool:
    """Whether to put a prompt of the command line into the chat template. By default as in the run's training; without
    a run, if the model has a template and no gates, since the form that gates were trained on is unknown."""
    if requested is not None:
        return requested
    if answering.settings is not None:
        return answering.settings.rollout.prompt_template == "chat" and answering.has_chat_template
    return answering.has_chat_template and not answering.has_gates


def stream_answer(answering: EarlyExitModel, prompt: str, rule: ExitRule, sampling: SamplingParams, chat: bool) -> None:
    """Print the answer token by token, coloured by depth, then its mean depth."""
    layers, depths, drafted = answering.num_layers, [], 0
    console = Console(highlight=False, soft_wrap=True)
    for token in answering.stream(prompt, rule, sampling=sampling, chat=chat):
        depths.append(token.depth)
        drafted += token.drafted
        shade = SHADES[min(len(SHADES) - 1, int(token.depth / layers * len(SHADES)))]
        console.print(Text(token.text, style=shade), end="")
    console.print()
    mean = sum(depths) / max(1, len(depths))
    checked = f" in {len(depths) - drafted} passes" if drafted else ""
    legend = Text(f"{answering.name} model, {len(depths)} tokens{checked}, mean depth {mean:.1f} of {layers} layers: ")
    for i, shade in enumerate(SHADES):
        legend.append(f"≤{round(layers * (i + 1) / len(SHADES))} ", style=shade)
    console.print(legend)


def serve(
    cfg: RunConfig, settings: ServerSettings, rule: ExitRule | None, model: str | None, policy: str | None,
    base_unchecked: bool = False,
) -> None:  # fmt: skip
    """Serve HTTP requests until a stop signal; clients need the key in EE_API_KEY, if it is set."""
    from ..rollout.server.run import run

    # Before the model is read, which takes its time.
    with settings.bind() as listening:
        answering = load(cfg, model, policy, base_unchecked)
        default = rule_for(answering, rule)
        name = answering.name if model else f"{cfg.name}-{answering.name}"
        key = os.environ.get("EE_API_KEY") or None
        if key and not (key.isprintable() and key == key.strip()):
            raise ValueError("EE_API_KEY: a line end, or space at an end; no client could send it; give another key")
        variables = answering.chat_template_kwargs
        run(answering.decoder, str(answering.source), name, default, settings, listening, key, variables)
