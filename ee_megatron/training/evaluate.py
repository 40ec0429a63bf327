"""The last stage: evaluate teacher, calibrated and reinforced model on held-out problems, at several exit rules.

The threshold of each model is chosen on the validation split, and so is what a control is matched by; the evaluation
split is only measured.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..config.schema import RunConfig
from ..evaluation.choice import ChoiceBench, choice
from ..evaluation.controls import Reference, all_controls, gate_calibration, run_controls
from ..evaluation.evaluate import (
    AnswerRecord,
    EvaluationRow,
    GenerationResult,
    add_readings,
    choose_threshold,
    evaluate_model,
    pooled,
)
from ..evaluation.externalisation import Bench, externalisation
from ..evaluation.results import Records, compared, on_wide, table, write_results
from ..exit_rules import CONTROLS, ExitRule, Off, Sample, Speculate, Threshold
from ..planning.flops import answer_cost
from ..policy import open_policy, sharpened
from ..report.results import pareto_front
from ..report.tables import choice_tables, controls_table, externalisation_table, wide_table
from ..rollout.engine.request import GenerationRequest, Progress
from ..rollout.engine.sampling import SamplingParams
from ..rollout.engine.scoring import Inspection
from ..rollout.pool.interface import TEACHER, RolloutPool
from ..tasks.chains import ChainTask
from ..tensors import HeldStream
from ..types import Prompt, Rollout
from . import stages
from .answer_cache import ANSWERS
from .collect import exits_of, prompts_of, wide_problems
from .context import StageContext
from .ranks import listener

SEED = 0


def policies(cfg: RunConfig) -> dict[str, Path]:
    """Checkpoint of each policy to evaluate besides the teacher, by name."""
    checkpoints = {"calibrated": stages.calibrated(cfg)}
    if stages.is_done(cfg, "rl"):
        checkpoints["reinforced"] = stages.reinforced(cfg)
    return checkpoints


class Measured(NamedTuple):
    """Results of a model under one rule on one set of prompts: a row, the answers [n] as judged and as generated."""

    exits: ExitRule
    row: EvaluationRow
    answers: list[AnswerRecord]
    rollouts: Sequence[Rollout]


@dataclass
class Part:
    """Results that one step of the evaluation adds. more: by part of results.json. logged: for trackers. shown: the
    answers at a model's chosen exits, for the report."""

    rows: list[EvaluationRow] = field(default_factory=list)
    answers: list[AnswerRecord] = field(default_factory=list)
    wide_rows: list[EvaluationRow] = field(default_factory=list)
    wide_answers: list[AnswerRecord] = field(default_factory=list)
    meta: dict[str, object] = field(default_factory=dict)
    logged: dict[str, float] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    shown: Measured | None = None
    reference: Reference | None = None

    def log(self, name: str, row: EvaluationRow) -> None:
        """Log a row of the results to trackers, under `name`."""
        columns = ("accuracy", "mean_depth", "total_depth", "length", "kl")
        self.logged |= {f"{name}/{c}": value for c in columns if (value := getattr(row, c)) is not None}

    def add(self, other: Part) -> None:
        """Append another part's results."""
        self.rows += other.rows
        self.answers += other.answers
        self.wide_rows += other.wide_rows
        self.wide_answers += other.wide_answers
        self.meta |= other.meta
        self.logged |= other.logged
        for name, value in other.more.items():
            self.more[name] = self.more[name] | value if isinstance(self.more.get(name), dict) else value


class Measurer:
    """Measures models on the task's splits with a rollout pool, always with the weights that were loaded last. Answers
    for the same weights and request are generated once and cached (answer_cache.py)."""

    def __init__(self, context: StageContext, sets: int):
        self.context, cfg = context, context.cfg
        self.task = context.make_task()
        self.verifier = context.make_verifier(self.task)
        self.pool: RolloutPool = context.make_pool(context.spec)
        self.cache = context.answer_cache(context.path.parent / ANSWERS)
        self.weights = ""  # their digest
        self.sampling = SamplingParams(0.0, cfg.rollout.max_new_tokens, tuple(cfg.rollout.stop))
        self.test: list[Prompt] = self.task.prompts("evaluation")
        self.validation: list[Prompt] = self.task.prompts("validation")
        self.wide = wide_problems(cfg, context.model_path, self.task, "validation")
        self.wide_test = wide_problems(cfg, context.model_path, self.task, "evaluation")
        self.bar = context.stack.enter_context(context.progress(sets))

    def load(self, checkpoint: Path) -> None:
        """Load a policy checkpoint into the pool."""
        self.load_policy(open_policy(checkpoint)[1])

    def load_policy(self, policy: Mapping[str, Tensor]) -> None:
        weights = self.pool.store_weights(1, HeldStream(policy))
        self.pool.load(weights)
        self.weights = weights.digest

    def load_teacher(self) -> None:
        self.pool.load(None)
        self.weights = TEACHER[1]

    def request(self, prompts: list[Prompt], exits: ExitRule, *others: ExitRule) -> GenerationRequest:
        return GenerationRequest(prompts, 1, self.sampling, exits, SEED, others)

    def progress(self, model: str) -> Progress:
        return partial(self.bar.detail, f"{model} answers")

    def done(self, row: EvaluationRow) -> None:
        self.bar.advance(1, accuracy=row.accuracy, depth=row.mean_depth)

    def judge(self, model: str, request: GenerationRequest, answered: GenerationResult) -> Measured:
        """Judge a model's answers and summarise them as a row; with FLOPs if they are scored."""
        context, exits = self.context, request.exits
        spec, dims = context.spec, context.source.dims

        def flops(rollout: Rollout) -> float:
            prompt, depths = len(rollout.prompt_tokens), rollout.exit_depths.tolist()
            return answer_cost(dims, spec.exit_depths, spec.gate_width, prompt, depths, exits.needs, spec.first_token)

        row, answers = evaluate_model(
            answered, request, self.task, self.verifier, label=model, num_layers=spec.num_layers,
            decode=context.decode, flops=flops if answered.scores is not None else None,
        )  # fmt: skip
        return Measured(exits, row, answers, answered.rollouts)

    def scored(self, model: str, rules: Sequence[ExitRule], prompts: list[Prompt]) -> list[Measured]:
        """Measure a model under several rules: answers are generated and timed rule by rule, then scored together."""
        requests = [self.request(prompts, exits) for exits in rules]
        sets = self.cache.score(self.pool, self.weights, requests, self.progress(model))
        return [self.judge(model, request, one) for request, one in zip(requests, sets, strict=True)]

    def try_out(self, model: str, rules: Sequence[ExitRule], prompts: list[Prompt]) -> list[Measured]:
        """Measure a model under candidate rules. They are generated together, so that each prompt is prefilled once;
        their speed is not measured."""
        request = self.request(prompts, *rules)
        sets = self.cache.answers(self.pool, self.weights, request, self.progress(model))
        return [self.judge(model, request.by(rule), one) for rule, one in zip(rules, sets, strict=True)]

    def add_row(self, part: Part, measured: Measured, inspected: Sequence[Inspection] | None = None) -> None:
        """Add a row to the results. The answers for the report get the prediction of each exit on the way: from
        `inspected`, if all of the row's answers were inspected."""
        exits, row, answers, rollouts = measured
        part.rows.append(row)
        part.answers += answers
        # By the rule's kind: the same names whatever threshold was chosen.
        part.log(f"{row.model}/{exits.kind}", row)
        context = self.context
        shown = [i for i in range(min(context.cfg.evaluate.answers, len(answers))) if rollouts[i].length]
        few = self.pool.inspect([rollouts[i] for i in shown]) if inspected is None else [inspected[i] for i in shown]
        add_readings([answers[i] for i in shown], few, context.spec.exit_depths, context.decode)
        self.done(row)

    def add_wide(self, part: Part, model: str, *rules: ExitRule) -> None:
        """Add rows of the test split's problems on wide operands, if any."""
        for exits, row, answers, _ in self.scored(model, rules, self.wide_test) if self.wide_test else ():
            part.wide_rows.append(row)
            part.wide_answers += answers
            part.log(f"{model}/wide/{exits.kind}", row)
            self.done(row)

    def add_externalisation(self, part: Part, model: str, *rules: ExitRule) -> None:
        """Add the externalisation metrics of the loaded weights under each rule, if the settings request them."""
        wanted = self.context.cfg.evaluate.externalisation
        if not wanted:
            return
        measured: dict[str, Any] = {}
        shown = partial(self.bar.detail, f"{model} interventions")

        def generate(request: GenerationRequest) -> Sequence[Rollout]:
            return self.cache.answers(self.pool, self.weights, request, shown)[0].rollouts

        for exits in rules:
            bench = Bench(
                pool=self.pool, verifier=self.verifier, sampling=self.sampling, seed=SEED, exits=exits,
                tokenizer=self.context.tokenizer, generate=generate,
            )  # fmt: skip
            metrics = externalisation(bench, self.test[: wanted.prompts or None])
            measured[f"{model} at full depth" if measured else model] = {"exits": exits.label, **metrics}
        part.more["externalisation"] = measured

    def on_validation(self, model: str, exits: ExitRule) -> EvaluationRow:
        return self.try_out(model, [exits], self.validation)[0].row

    def on_test(self, model: str, exits: ExitRule) -> tuple[EvaluationRow, list[AnswerRecord]]:
        (measured,) = self.scored(model, [exits], self.test)
        return measured.row, measured.answers


# ---- steps ----


@dataclass(frozen=True)
class Step:
    """A step of the evaluation. sets: number of answer sets. run: computes its part, given the policies before it."""

    sets: int
    run: Callable[[Measurer, Sequence[Reference]], Part]


def steps_of(cfg: RunConfig, checkpoints: dict[str, Path]) -> list[Step]:
    """The steps of an evaluation of these policies, in order."""
    e, wide = cfg.evaluate, int(cfg.evaluate.wide_test > 0)
    tried = len(e.thresholds) * (1 + (e.wide_problems > 0)) + (cfg.rl.steps == 0)
    steps = [Step(1 + wide, teacher_part)]
    for model, checkpoint in checkpoints.items():
        steps.append(Step(tried + 3 + 2 * wide, partial(policy_part, model=model, checkpoint=checkpoint)))
    if e.controls:
        rules = len(CONTROLS) + (len(checkpoints) > 1) + bool(e.controls.policy)
        steps.append(Step(2 * rules, partial(controls_part, checkpoints=checkpoints)))
    if e.style_choice:
        models = choosing(cfg, checkpoints)
        steps.append(Step(len(models), partial(styles_part, models=models, checkpoints=checkpoints)))
    return steps


def teacher_part(measurer: Measurer, known: Sequence[Reference]) -> Part:
    part = Part()
    measurer.load_teacher()
    (part.shown,) = measurer.scored("teacher", [Off()], measurer.test)
    measurer.add_row(part, part.shown)
    measurer.add_wide(part, "teacher", Off())
    measurer.add_externalisation(part, "teacher", Off())
    return part


def policy_part(measurer: Measurer, known: Sequence[Reference], *, model: str, checkpoint: Path) -> Part:
    """Measure a policy at full depth, with sampled exits and at validation's threshold, on the test split."""
    part, context = Part(), measurer.context
    measurer.load(checkpoint)
    chosen = choose(measurer, part, model)
    exits = chosen.exits
    for measured in measurer.scored(model, [Off(), Sample()], measurer.test):
        measurer.add_row(part, measured)
    if not context.cfg.rl.steps:
        # Nothing has made answers shallower: exits are for drafts, too.
        request = measurer.request(measurer.test, Speculate(context.spec.exit_depths[-1]))
        show = measurer.progress(model)
        (drafted,) = measurer.cache.answers(measurer.pool, measurer.weights, request, show, timed=True)
        part.rows.append(measurer.judge(model, request, drafted).row)
        measurer.done(part.rows[-1])
    # The gates' calibration needs every answer inspected: this scores them, too.
    request = measurer.request(measurer.test, exits)
    answered, inspected = measurer.cache.inspect(measurer.pool, measurer.weights, request, measurer.progress(model))
    part.shown = measured = measurer.judge(model, request, answered)
    measurer.add_row(part, measured, inspected)
    part.reference = Reference(model, exits, chosen.row, chosen.answers, measured.row, measured.answers)
    hazards, divergences = [one.hazards for one in inspected], [one.divergences for one in inspected]
    calibration = gate_calibration(hazards, divergences, context.cfg.calibrate.kl_factor, context.spec.exit_depths)
    part.more["gates"] = {model: calibration}
    measurer.add_wide(part, model, Off(), exits)
    # The same weights without exits, too: what RL changed, apart from what exits leave out.
    measurer.add_externalisation(part, model, exits, Off())
    return part


def choose(measurer: Measurer, part: Part, model: str) -> Measured:
    """Choose the loaded weights' threshold on all validation problems, wide ones included, and measure it on the
    validation split's own problems."""
    e = measurer.context.cfg.evaluate
    rules = [Threshold(t) for t in e.thresholds]
    tried = measurer.try_out(model, rules, measurer.validation)
    rows = [one.row for one in tried]
    wide = [one.row for one in measurer.try_out(model, rules, measurer.wide)] if measurer.wide else []
    for row in rows + wide:
        measurer.done(row)
    both = [pooled(pair) for pair in zip(rows, wide, strict=True)] if wide else rows
    chosen = both.index(choose_threshold(both, e.tolerance))
    part.meta[f"threshold_{model}"] = part.logged[f"{model}/threshold"] = e.thresholds[chosen]
    front = pareto_front((r.mean_depth for r in rows), (r.accuracy for r in rows))
    part.more["pareto"] = {
        model: [
            {"threshold": t, "front": best, **asdict(r)} for t, r, best in zip(e.thresholds, rows, front, strict=True)
        ]
    }
    return tried[chosen]


def controls_part(measurer: Measurer, known: Sequence[Reference], *, checkpoints: dict[str, Path]) -> Part:
    """Compare the last policy with exit rules that have less information."""
    context, reference = measurer.context, known[-1]
    exits, given = context.spec.layout, stages.control_policy(context.cfg)
    other = (stages.trained_as(given), given) if given else None
    vocab = context.source.dims.vocab
    rules = all_controls(reference, checkpoints, exits.outcomes, vocab, other, exits.first_token)
    return Part(more={"controls": run_controls(measurer, reference, rules, measurer.done)})


def styles_part(
    measurer: Measurer, known: Sequence[Reference], *, models: Sequence[str], checkpoints: Mapping[str, Path]
) -> Part:
    """Measure which style `models` choose, sampled as in RL, on the problems of RL's families."""
    cfg, spec, task = measurer.context.cfg, measurer.context.spec, cast(ChainTask, measurer.task)
    rl, by_model, wanted = cfg.rl, dict[str, Any](), cfg.evaluate.style_choice
    assert wanted is not None
    problems = prompts_of(measurer.test, rl.families)
    for model in models:
        full = model == "teacher" or rl.fixed_depth == spec.num_layers
        if model == "teacher":
            measurer.load_teacher()
        elif model == "start":
            policy = open_policy(checkpoints["calibrated"])[1]
            measurer.load_policy(sharpened(policy, rl.gate_centre, rl.gate_sharpness))
        else:
            measurer.load(checkpoints[model])
        bench = ChoiceBench(
            pool=measurer.pool, verifier=measurer.verifier, seed=rl.seed, task=task, num_layers=spec.num_layers,
            sampling=replace(measurer.sampling, temperature=rl.temperature), first_exits=spec.first_token,
            answers=wanted.answers, progress=partial(measurer.bar.detail, f"{model} styles"),
        )  # fmt: skip
        depths = spec.layout.outcomes if model == "start" else ()
        by_model[model] = choice(bench, problems, Off() if full else exits_of(rl), depths)
        measurer.bar.advance(1)
    settings = {
        "styles": list(task.styles), "weights": list(task.style_weights), "tokens_per_step": task.tokens_per_step,
        "num_layers": spec.num_layers, "answers_per_family": wanted.answers,
    }  # fmt: skip
    return Part(more={"choice": settings | {"models": by_model}})


def choosing(cfg: RunConfig, checkpoints: Collection[str]) -> list[str]:
    """Models whose choice of style is measured, in the order of the method; without RL the last is its start."""
    last = "reinforced" if "reinforced" in checkpoints else "start"
    models = {"": (), "reinforced": (last,), "all": ("teacher", "start", last)}
    return list(dict.fromkeys(models[cfg.evaluate.style_choice.models if cfg.evaluate.style_choice else ""]))


def evaluate(cfg: RunConfig, model_path: Path) -> None:
    """Run the stage: results.json for the report, table.txt for the terminal."""
    checkpoints = policies(cfg)
    steps = steps_of(cfg, checkpoints)
    with listener.at_once(), StageContext(cfg, "evaluate", model_path, learner=False) as context:
        measurer, spec = Measurer(context, sum(step.sets for step in steps)), context.spec
        results, known, before = Part(more={"gates": {}, "pareto": {}}), list[Reference](), list[AnswerRecord]()
        teacher = before
        records = Records()
        logged: list[AnswerRecord] = []
        for step in steps:
            part = step.run(measurer, known)
            if (shown := part.shown) is not None:
                records.add(shown.answers)
                # Against the model before, against the teacher, and against its own full depth.
                own = [one for one in part.answers if one["exits"] == Off().label and shown.exits != Off()]
                changes = [compared(other, shown.answers, spec.num_layers) for other in (before, teacher, own)]
                part.more["compared"] = {f"{c['model']} against {c['against']}": c for c in changes if c}
                before, teacher = shown.answers, teacher or shown.answers
                logged += shown.answers
            if part.reference is not None:
                known.append(part.reference)
            results.add(part)
        results.meta |= _meta(measurer)
        if results.wide_rows:
            results.more["wide"] = on_wide(results.wide_rows, results.wide_answers)
        records.write(context.path)
        write_results(
            context.path / "results.json", results.rows, results.answers, results.meta, cfg.evaluate.answers,
            results.more,
        )  # fmt: skip
        if find_spec("inspect_ai"):
            from ..inspect_evals import write_logs

            write_logs(context.path, logged, cfg.task.name)
        assert context.directory is not None
        context.directory.write_atomic("table.txt", tables(results) + "\n")
        context.open_metrics(resume_step=0)
        context.log(1, results.logged)
        print(tables(results))
        context.finish()


def _meta(measurer: Measurer) -> dict[str, object]:
    context, test = measurer.context, measurer.test
    cfg, spec = context.cfg, context.spec
    # What the prompts cost to read; the table of a sweep needs it.
    lengths = [len(context.tokenizer(p.text, add_special_tokens=False)["input_ids"]) for p in test]
    wide = f" and {len(measurer.wide)} on wide operands" if measurer.wide else ""
    return {
        "name": cfg.name,
        "num_layers": spec.num_layers,
        "exit_depths": list(spec.exit_depths),
        "prompt_tokens": sum(lengths) / max(1, len(lengths)),
        "split": f"evaluation, {len(test)} problems, held out",
        "threshold choice": f"on {len(measurer.validation)} validation problems{wide}, "
        f"tolerance {cfg.evaluate.tolerance}",
        "decoding": "greedy tokens",
        "answers in flight": min(len(test), cfg.rollout.max_num_seqs * cfg.rollout.actors),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {context.device_type}",
        "versions": f"python {platform.python_version()}, torch {torch.__version__}",
    }


def tables(results: Part) -> str:
    """Every table, for the terminal."""
    more, parts = results.more, [table(results.rows)]
    if "wide" in more:
        parts.append(wide_table(more["wide"]).text())
    if "choice" in more:
        parts += [entry.text() for _, entry in choice_tables(more["choice"]) if entry.rows]
    if "controls" in more:
        parts.append(controls_table(more["controls"]).text())
    if "externalisation" in more:
        parts.append(externalisation_table(more["externalisation"]).text())
    return "\n\n".join(parts)
