"""The last stage: teacher, calibrated and reinforced model on held-out problems, exits sampled and thresholded.

The threshold of each model is chosen on the validation split, and so is what a control is matched by; the evaluation
split is only measured.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..config.schema import RunConfig
from ..evaluation.choice import ChoiceBench, choice
from ..evaluation.controls import gate_calibration
from ..evaluation.evaluate import (
    Answer,
    AnsweredSet,
    EvaluationRow,
    add_readings,
    choose_threshold,
    evaluate_model,
    pooled,
)
from ..evaluation.externalisation import Bench, externalisation
from ..evaluation.results import Records, compared, on_wide, table, write_results
from ..exit_rules import CONTROLS, ExitRule, Off, Sample, Threshold
from ..planning.flops import answer_cost
from ..policy import open_policy, sharpened
from ..report.numbers import pareto_front
from ..report.tables import choice_tables, controls_table, externalisation_table, wide_table
from ..rollout.engine.prompts import encode_continuation
from ..rollout.engine.request import GenerationRequest, Progress
from ..rollout.engine.sampling import SamplingParams
from ..rollout.engine.scoring import Inspection
from ..rollout.pool.interface import TEACHER, RolloutPool
from ..tasks.base import StyledTask
from ..tensors import HeldStream
from ..types import Prompt, Rollout
from . import stages
from .answer_cache import ANSWERS
from .collect import exits_of, prompts_of
from .context import StageContext
from .controls import Reference, all_controls, run_controls
from .dataset_mixing import wide_test, wide_validation
from .preemption import listener

SEED = 0


def policies(cfg: RunConfig) -> dict[str, Path]:
    """What is there to evaluate besides the teacher, by name: checkpoints."""
    found = {"calibrated": stages.calibrated(cfg)}
    if stages.is_done(cfg, "rl"):
        found["reinforced"] = stages.reinforced(cfg)
    return found


class Tokens:
    """The model's tokenizer as the interventions need it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return encode_continuation(self.tokenizer, text)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens)))


class Measured(NamedTuple):
    """A model under one rule on one set of prompts: its row, and its answers [n] as judged and as generated."""

    exits: ExitRule
    row: EvaluationRow
    answers: list[Answer]
    rollouts: Sequence[Rollout]


class Evaluation:
    """The evaluation of one configuration: rows and answers as they come; `more` are further parts of results.json."""

    def __init__(self, context: StageContext, sets: int):
        self.context, cfg = context, context.cfg
        self.task = context.make_task()
        self.verifier = context.make_verifier(self.task)
        self.pool: RolloutPool = context.make_pool(context.spec)
        self.kept = context.kept_answers(context.path.parent / ANSWERS)
        # Digest of the weights that the pool holds.
        self.weights = ""
        self.sampling = SamplingParams(0.0, cfg.rollout.max_new_tokens, tuple(cfg.rollout.stop))
        self.test: list[Prompt] = self.task.prompts("evaluation")
        self.validation: list[Prompt] = self.task.prompts("validation")
        self.wide = wide_validation(cfg, context.model_path, self.task)
        self.wide_test = wide_test(cfg, context.model_path, self.task)
        tokenizer = context.tokenizer
        self.tokens = Tokens(tokenizer)
        # What the prompts cost to read; the table of a sweep asks for it.
        lengths = [len(tokenizer(p.text, add_special_tokens=False)["input_ids"]) for p in self.test]
        self.prompt_tokens = sum(lengths) / max(1, len(lengths))
        self.rows: list[EvaluationRow] = []
        self.answers: list[Answer] = []
        self.wide_rows: list[EvaluationRow] = []
        self.wide_answers: list[Answer] = []
        self.meta: dict[str, object] = {}
        self.logged: dict[str, float] = {}
        self.more: dict[str, Any] = {"gates": {}, "pareto": {}}
        self.chosen: dict[str, Reference] = {}
        self.records = Records(context.spec.exit_depths, cfg.evaluate.answers, context.decode)
        self.before: list[Answer] = []
        self.bar = context.stack.enter_context(context.progress(sets))

    def flops(self, rollout: Rollout, exits: ExitRule) -> float:
        spec = self.context.spec
        return answer_cost(
            self.context.source.dims,
            spec.exit_depths,
            spec.gate_width,
            len(rollout.prompt_tokens),
            rollout.exit_depths.tolist(),
            exits.needs,
            spec.first_token,
        )

    def request(self, prompts: list[Prompt], exits: ExitRule, *others: ExitRule) -> GenerationRequest:
        return GenerationRequest(prompts, 1, self.sampling, exits, SEED, others)

    def told(self, model: str) -> Progress:
        return partial(self.bar.detail, f"{model} answers")

    def judge(self, model: str, request: GenerationRequest, answered: AnsweredSet) -> Measured:
        """What a model's answers come to; what those that are scored cost is counted, too."""
        context, exits = self.context, request.exits
        row, answers = evaluate_model(
            answered,
            request,
            self.task,
            self.verifier,
            label=model,
            num_layers=context.spec.num_layers,
            decode=context.decode,
            flops=(lambda rollout: self.flops(rollout, exits)) if answered.scores is not None else None,
        )
        return Measured(exits, row, answers, answered.rollouts)

    def scored(self, model: str, rules: Sequence[ExitRule], prompts: list[Prompt]) -> list[Measured]:
        """A model by each of some rules: answers made and timed rule by rule, then read again together."""
        requests = [self.request(prompts, exits) for exits in rules]
        sets = self.kept.score(self.pool, self.weights, requests, self.told(model))
        return [self.judge(model, request, one) for request, one in zip(requests, sets, strict=True)]

    def try_out(self, model: str, rules: Sequence[ExitRule], prompts: list[Prompt]) -> list[Measured]:
        """Announced sets: a model by rules that are chosen among. They answer together, so that each prompt is read
        once for all of them; how fast one answers is left out."""
        request = self.request(prompts, *rules)
        sets = self.kept.answer_each(self.pool, self.weights, request, self.told(model))
        tried = [self.judge(model, request.by(rule), one) for rule, one in zip(rules, sets, strict=True)]
        for one in tried:
            self.done(one.row)
        return tried

    def measure(self, model: str, *rules: ExitRule) -> list[Measured]:
        """Announced sets: rows of the results."""
        found = self.scored(model, rules, self.test)
        for one in found:
            self.add(one)
        return found

    def measure_wide(self, model: str, *rules: ExitRule) -> None:
        """Further announced sets: the measured split's problems on wide operands, if they were asked for."""
        for exits, row, answers, _ in self.scored(model, rules, self.wide_test) if self.wide_test else ():
            self.wide_rows.append(row)
            self.wide_answers += answers
            self.logged |= {f"{model}/wide/{exits.kind}/{name}": value for name, value in logged_of(row)}
            self.done(row)

    def add(self, found: Measured, inspected: Sequence[Inspection] | None = None) -> None:
        """A row of the results. For the answers that the report shows, what each exit on the way would have written:
        from `inspected`, if all of the row's answers were."""
        exits, row, answers, rollouts = found
        self.rows.append(row)
        self.answers += answers
        # By the rule's kind: the same names whatever threshold was chosen.
        self.logged |= {f"{row.model}/{exits.kind}/{name}": value for name, value in logged_of(row)}
        context = self.context
        shown = [i for i in range(min(context.cfg.evaluate.answers, len(answers))) if rollouts[i].length]
        few = self.pool.inspect([rollouts[i] for i in shown]) if inspected is None else [inspected[i] for i in shown]
        add_readings([answers[i] for i in shown], few, context.spec.exit_depths, context.decode)
        self.done(row)

    def keep(self, found: Measured) -> None:
        """A model's answers at the exits that were chosen for it: for the report, and against those of the model
        before it."""
        self.records.add(self.pool, found.answers, found.rollouts)
        if difference := compared(self.before, found.answers, self.context.spec.num_layers):
            self.more.setdefault("compared", {})[f"{found.row.model}, {found.row.exits}"] = difference
        self.before = found.answers

    def done(self, row: EvaluationRow) -> None:
        self.bar.advance(1, accuracy=row.accuracy, depth=row.mean_depth)

    def load(self, checkpoint: Path) -> None:
        self.hold(open_policy(checkpoint)[1])

    def load_teacher(self) -> None:
        self.pool.load(None)
        self.weights = TEACHER[1]

    def hold(self, policy: Mapping[str, Tensor]) -> None:
        weights = self.pool.take(1, HeldStream(policy))
        self.pool.load(weights)
        self.weights = weights.digest

    def on_validation(self, model: str, exits: ExitRule) -> EvaluationRow:
        request = self.request(self.validation, exits)
        return self.judge(model, request, self.kept.answer(self.pool, self.weights, request, self.told(model))).row

    def on_test(self, model: str, exits: ExitRule) -> tuple[EvaluationRow, list[Answer]]:
        (found,) = self.scored(model, [exits], self.test)
        return found.row, found.answers

    def teacher(self) -> None:
        self.load_teacher()
        (found,) = self.measure("teacher", Off())
        self.keep(found)
        self.measure_wide("teacher", Off())
        self.externalise("teacher", Off())

    def policy(self, model: str, checkpoint: Path) -> None:
        """Sampled exits, then the threshold that validation chooses, on the test set."""
        self.load(checkpoint)
        chosen = self.choose(model)
        exits = chosen.exits
        self.measure(model, Off(), Sample())
        # The gates' calibration looks into every answer: this reading scores them, too.
        request = self.request(self.test, exits)
        answered, inspected = self.kept.inspect(self.pool, self.weights, request, self.told(model))
        found = self.judge(model, request, answered)
        self.add(found, inspected)
        self.chosen[model] = Reference(model, exits, chosen.row, chosen.answers, found.row, found.answers)
        self.keep(found)
        self.more["gates"][model] = gate_calibration(
            [entry.hazards for entry in inspected],
            [entry.divergences for entry in inspected],
            self.context.cfg.calibrate.kl_factor,
            self.context.spec.exit_depths,
        )
        self.measure_wide(model, Off(), exits)
        self.externalise(model, exits)

    def choose(self, model: str) -> Measured:
        """By the threshold that the answers to all validation problems, wide ones among them, choose for the weights
        which are loaded: on the validation split's own."""
        e = self.context.cfg.evaluate
        rules = [Threshold(t) for t in e.thresholds]
        tried = self.try_out(model, rules, self.validation)
        rows = [one.row for one in tried]
        wide = [one.row for one in self.try_out(model, rules, self.wide)] if self.wide else []
        both = [pooled(pair) for pair in zip(rows, wide, strict=True)] if wide else rows
        chosen = both.index(choose_threshold(both, e.tolerance))
        threshold = e.thresholds[chosen]
        self.meta[f"threshold_{model}"] = self.logged[f"{model}/threshold"] = threshold
        for name, of in (("validation", rows), ("wide", wide)):
            if of:
                self.meta[f"{name}_{model}"] = [
                    {"threshold": t, "accuracy": r.accuracy, "mean_depth": r.mean_depth, "n": r.n}
                    for t, r in zip(e.thresholds, of, strict=True)
                ]
        front = pareto_front((r.mean_depth for r in rows), (r.accuracy for r in rows))
        self.more["pareto"][model] = [
            {"threshold": t, "front": kept, **asdict(r)} for t, r, kept in zip(e.thresholds, rows, front, strict=True)
        ]
        return tried[chosen]

    def externalise(self, model: str, exits: ExitRule) -> None:
        """The externalisation metrics of the weights that are loaded, if they were asked for."""
        e = self.context.cfg.evaluate
        if not e.externalisation:
            return
        bench = Bench(
            self.pool,
            self.verifier,
            self.tokens,
            self.sampling,
            exits,
            SEED,
            lambda done, total: self.bar.detail(f"{model} interventions", done, total),
        )
        found = externalisation(bench, self.test[: e.externalisation.prompts or None])
        self.more.setdefault("externalisation", {})[model] = {"exits": exits.label, **found}

    def controls(self, checkpoints: dict[str, Path]) -> None:
        """The last model against rules that know less."""
        context, reference = self.context, list(self.chosen.values())[-1]
        exits, given = context.spec.layout, stages.control_policy(context.cfg)
        other = (stages.trained_as(given), given) if given else None
        vocab = context.source.dims.vocab
        rules = all_controls(reference, checkpoints, exits.outcomes, vocab, other, exits.first_token)
        self.more["controls"] = run_controls(self, reference, rules, self.done)

    def choice(self, checkpoints: Mapping[str, Path]) -> None:
        """Which style the models that evaluate.style_choice.models names answer in, sampled as RL samples: the
        problems of the families that RL answers."""
        cfg, spec, task = self.context.cfg, self.context.spec, cast(StyledTask, self.task)
        rl, found, wanted = cfg.rl, dict[str, Any](), cfg.evaluate.style_choice
        assert wanted is not None
        problems = prompts_of(self.test, rl.families)
        for model in choosing(cfg, checkpoints):
            full = model == "teacher" or rl.fixed_depth == spec.num_layers
            if model == "teacher":
                self.load_teacher()
            elif model == "start":
                policy = open_policy(checkpoints["calibrated"])[1]
                self.hold(sharpened(policy, rl.gate_centre, rl.gate_sharpness))
            else:
                self.load(checkpoints[model])
            bench = ChoiceBench(
                self.pool,
                self.verifier,
                task,
                replace(self.sampling, temperature=rl.temperature),
                spec.num_layers,
                spec.first_token,
                wanted.answers,
                SEED,
                partial(self.bar.detail, f"{model} styles"),
            )
            depths = spec.layout.outcomes if model == "start" else ()
            found[model] = choice(bench, problems, Off() if full else exits_of(rl), depths)
            self.bar.advance(1)
        self.more["choice"] = {
            "styles": list(task.styles),
            "weights": list(task.style_weights),
            "tokens_per_step": task.tokens_per_step,
            "num_layers": spec.num_layers,
            "answers_per_family": wanted.answers,
            "models": found,
        }

    def texts(self) -> str:
        """Every table, for the terminal."""
        parts = [table(self.rows)]
        if "wide" in self.more:
            parts.append(wide_table(self.more["wide"]).text())
        if "choice" in self.more:
            parts += [found.text() for _, found in choice_tables(self.more["choice"]) if found.rows]
        if "controls" in self.more:
            parts.append(controls_table(self.more["controls"]).text())
        if "externalisation" in self.more:
            parts.append(externalisation_table(self.more["externalisation"]).text())
        return "\n\n".join(parts)


def logged_of(row: EvaluationRow) -> list[tuple[str, float]]:
    """What trackers get of a row of the results."""
    names = ("accuracy", "mean_depth", "total_depth", "length", "kl")
    return [(name, value) for name in names if (value := getattr(row, name)) is not None]


def choosing(cfg: RunConfig, checkpoints: Collection[str]) -> list[str]:
    """The models whose choice of style is measured, in the order of the method; without RL the last is its start."""
    last = "reinforced" if "reinforced" in checkpoints else "start"
    asked = {"": (), "reinforced": (last,), "all": ("teacher", "start", last)}
    return list(dict.fromkeys(asked[cfg.evaluate.style_choice.models if cfg.evaluate.style_choice else ""]))


def count_sets(cfg: RunConfig, checkpoints: Collection[str]) -> int:
    """Sets of answers that the progress bar counts: one per row and threshold tried, two per control, one per model
    whose choice of style is measured."""
    models = len(checkpoints)
    rules = len(CONTROLS) + (models > 1) + bool(cfg.evaluate.controls.policy) if cfg.evaluate.controls else 0
    tried = len(cfg.evaluate.thresholds) * (1 + (cfg.evaluate.wide_problems > 0))
    wide = (1 + 2 * models) * (cfg.evaluate.wide_test > 0)
    return 1 + models * (tried + 3) + wide + 2 * rules + len(choosing(cfg, checkpoints))


def evaluate(cfg: RunConfig, model_path: Path) -> None:
    """Run the stage: results.json for the report, table.txt for the terminal."""
    found = policies(cfg)
    sets = count_sets(cfg, found)
    with listener.at_once(), StageContext(cfg, "evaluate", model_path, learner=False) as context:
        work = Evaluation(context, sets)
        work.teacher()
        for model, checkpoint in found.items():
            work.policy(model, checkpoint)
        if cfg.evaluate.controls:
            work.controls(found)
        if cfg.evaluate.style_choice:
            work.choice(found)
        spec = context.spec
        work.meta |= {
            "name": cfg.name,
            "num_layers": spec.num_layers,
            "exit_depths": list(spec.exit_depths),
            "prompt_tokens": work.prompt_tokens,
            "split": f"evaluation, {len(work.test)} problems, held out",
            "threshold choice": f"on {len(work.validation)} validation problems"
            + (f" and {len(work.wide)} on wide operands" if work.wide else "")
            + f", tolerance {cfg.evaluate.tolerance}",
            "decoding": "greedy tokens",
            "answers in flight": min(len(work.test), cfg.rollout.max_num_seqs * cfg.rollout.actors),
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {context.device_type}",
            "versions": f"python {platform.python_version()}, torch {torch.__version__}",
        }
        if work.wide_rows:
            work.more["wide"] = on_wide(work.wide_rows, work.wide_answers)
        work.records.write(context.path)
        write_results(
            context.path / "results.json", work.rows, work.answers, work.meta, cfg.evaluate.answers, work.more
        )
        assert context.directory is not None
        context.directory.write_atomic("table.txt", work.texts() + "\n")
        context.open_metrics(resume_step=0)
        context.log(1, work.logged)
        print(work.texts())
        context.finish()
