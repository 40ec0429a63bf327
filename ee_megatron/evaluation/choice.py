"""Which style a model chooses for answers to a task with styles, and what each style costs: sampled answers.

Greedy answers would turn a share into 0 or 1, so answers are sampled, at the temperature and by the exit rule of RL.
Beside the free ones every style is forced by its opening (`Prompt.prefill`): under the same exits; at full depth, where
it shows whether the weights can still do it; with all tokens held to one depth, which shows what depth a style needs. A
wrong first step, prescribed to the model, shows whether the answer follows the text.

A prompt's name decides its random numbers: all models and conditions draw the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from ..exit_rules import ExitRule, Fixed, Off
from ..tasks.chains import ChainTask, hops_of
from ..types import Prompt, Rollout
from .evaluate import AnswerBench

FREE, CORRUPTED, OTHER = "free", "corrupted", "other"
Key = tuple[str, str]  # a family, and what its answers are: FREE, CORRUPTED or forced into the style of that name


class Judged(NamedTuple):
    """An answer with its prompt and whether it is right."""

    prompt: Prompt
    rollout: Rollout
    correct: bool


def figures(answers: Sequence[Judged], num_layers: int, first_exits: bool) -> dict[str, float]:
    """Summarise n answers: their number, the share of right ones, and means over answers. With T tokens of an answer,
    the stop's included, and d_t = depth of token t / L:

    - length: T; total_depth: Σ_t d_t; mean_depth: Σ_t d_t / T; square: Σ_t d_t² / T
    - max_depth: max_t d_t; unless `first_exits` without the first token, whose depth L is not chosen (0 if it is alone)

    NaN without answers.
    """
    depths = [np.asarray(answer.rollout.exit_depths, dtype=np.float64) / num_layers for answer in answers]
    chosen = depths if first_exits else [d[1:] for d in depths]

    def mean(values: Iterable[float]) -> float:
        return float(np.mean(list(values))) if answers else float("nan")

    return {
        "n": len(answers),
        "correct": mean(answer.correct for answer in answers),
        "mean_depth": mean(d.mean() for d in depths),
        "total_depth": mean(d.sum() for d in depths),
        "max_depth": mean(d.max(initial=0.0) for d in chosen),
        "square": mean(np.square(d).mean() for d in depths),
        "length": mean(len(d) for d in depths),
    }


def shares(chosen: Sequence[str | None], styles: Sequence[str]) -> dict[str, float]:
    """Share of each style among n answers' styles, and of answers in no style (`OTHER`); NaN for n = 0."""
    counts = Counter(OTHER if style is None else style for style in chosen)
    return {style: counts[style] / len(chosen) if chosen else float("nan") for style in (*styles, OTHER)}


def cycled(prompts: Sequence[Prompt], answers: int) -> list[Prompt]:
    """Repeat the prompts until there are `answers` of them."""
    return [prompts[i % len(prompts)] for i in range(answers)]


def by_family(prompts: Iterable[Prompt]) -> dict[str, list[Prompt]]:
    """Group prompts by the family of their task ("hops.hop3": "hop3"), fewest hops first."""
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.task.partition(".")[2], []).append(prompt)
    return {family: groups[family] for family in sorted(groups, key=hops_of)}


@dataclass(frozen=True, kw_only=True)
class ChoiceBench(AnswerBench):
    """Generates and judges `answers` answers per family and condition. first_exits: first tokens may exit, too."""

    task: ChainTask
    num_layers: int
    first_exits: bool
    answers: int

    def ask(self, sets: Mapping[Key, Sequence[Prompt]], exits: ExitRule) -> dict[Key, list[Judged]]:
        """Generate one answer to every prompt of every set, in a single request so that the pool's rows stay full."""
        all_prompts = [prompt for prompts in sets.values() for prompt in prompts]
        rollouts = self.answer([prompt for prompts in sets.values() for prompt in _apart(prompts)], exits)
        correct = self.correct(all_prompts, (answer.text for answer in rollouts))
        judged = map(Judged, all_prompts, rollouts, correct)
        return {key: [next(judged) for _ in prompts] for key, prompts in sets.items()}

    def figures(self, answers: Sequence[Judged]) -> dict[str, float]:
        return figures(answers, self.num_layers, self.first_exits)


def choice(
    bench: ChoiceBench, prompts: Sequence[Prompt], exits: ExitRule, depths: Sequence[int] = ()
) -> dict[str, Any]:
    """Measure the pool's current weights under `exits` by family: style shares and costs as plain JSON values. depths:
    exit depths and L at which forced styles are measured. Raises ValueError without prompts."""
    if not prompts:
        raise ValueError("no prompts to choose a style for; increase the task's number of problems")
    task = bench.task
    wanted = {family: cycled(group, bench.answers) for family, group in by_family(prompts).items()}
    free: dict[Key, list[Prompt]] = {(family, FREE): group for family, group in wanted.items()}
    forced: dict[Key, list[Prompt]] = {
        (family, style): [replace(prompt, prefill=task.opening(prompt, style)) for prompt in group]
        for family, group in wanted.items()
        for style in task.styles
    }
    wrong, leads = dict[Key, list[Prompt]](), dict[str, list[str]]()
    for family, group in wanted.items():
        spoilt = [(prompt, *step) for prompt in group if (step := task.corrupted(prompt)) is not None]
        if spoilt:
            wrong[family, CORRUPTED] = [replace(prompt, prefill=opening) for prompt, opening, _ in spoilt]
            leads[family] = [state for *_, state in spoilt]
    own = bench.ask({**free, **forced, **wrong}, exits)
    # The same rule would give the same answers.
    full = own if exits == Off() else bench.ask(forced, Off())
    held = {depth: full if depth == bench.num_layers else bench.ask(forced, Fixed(depth)) for depth in depths}

    def styles(of: Mapping[Key, Sequence[Judged]], family: str) -> dict[str, dict[str, float]]:
        return {style: bench.figures([a for a in of[family, style] if in_style(a, style)]) for style in task.styles}

    def in_style(answer: Judged, style: str) -> bool:
        """Whether it was forced into the style; where a style has no opening, whether the model chose it."""
        return bool(answer.prompt.prefill) or task.style_of(answer.prompt, answer.rollout.text) == style

    figures: dict[str, Any] = {}
    for family in wanted:
        answers = own[family, FREE]
        written = shares([task.style_of(answer.prompt, answer.rollout.text) for answer in answers], task.styles)
        figures[family] = {
            "hops": hops_of(family),
            "free": {**bench.figures(answers), "share": written},
            "forced": styles(own, family),
            "forced_full": styles(full, family),
            CORRUPTED: _followed(bench, own[family, CORRUPTED], leads[family]) if family in leads else None,
        }
        if depths:
            figures[family]["fixed"] = {str(depth): styles(of, family) for depth, of in held.items()}
    return {"exits": exits.label, "families": figures}


def _apart(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Prompts that occur more than once under names of their own, or all their answers would be the same."""
    seen = Counter[str]()
    named = []
    for prompt in prompts:
        named.append(replace(prompt, id=f"{prompt.id}#{seen[prompt.id]}"))
        seen[prompt.id] += 1
    return named


def _followed(bench: ChoiceBench, answers: Sequence[Judged], leads: Sequence[str]) -> dict[str, float]:
    """Shares of answers that are right anyway, and of those that follow the wrong step (`leads`), [n] each."""
    led_to = [replace(a.prompt, answer=state) for a, state in zip(answers, leads, strict=True)]
    return {
        "n": len(answers),
        "correct": float(np.mean([answer.correct for answer in answers])),
        "followed": float(np.mean(bench.correct(led_to, (answer.rollout.text for answer in answers)))),
    }
