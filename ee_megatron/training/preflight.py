"""Checks before a run starts: its settings, its model, the files that they name, its data.

Everything is looked at and said at once. No torch, unless a policy or a Megatron checkpoint to start from has to be
read.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from ..config import hub
from ..config.cluster import WITHOUT_ROLLOUTS
from ..config.derive import draws_weights, model_dir, policy_spec, ranks, read_dims, resolve_exits, stage_sizes
from ..config.errors import faults_of, lines_of, refuse
from ..config.identity import OPTIONAL, STAGES, stage_dir, stage_order
from ..config.load import Attempt
from ..config.schema import RunConfig, TaskConfig
from ..config.validate import Clash, alone, clashes, model_faults, repaired, unless_about
from ..observe.rundir import check_folder
from ..planning.command import launch_commands
from ..tasks import Task, chat_of, make_task, try_reward
from . import stages
from .launch import check_place

if TYPE_CHECKING:
    from ..families import ModelDims

TASK_READERS = ("pretrain", "teacher", "traces", "rl", "evaluate")


class Preflight:
    """Checks configurations before they run; a file that several of them name is checked once."""

    def __init__(self) -> None:
        self._known: dict[str, list[str]] = {}

    def faults(
        self, loaded: Attempt, wanted: Sequence[str], *, inputs: bool = False, here: list[str] | None = None
    ) -> list[str]:
        """All faults that `look` finds."""
        return [*itertools.chain(*self.look(loaded, wanted, inputs=inputs, here=here))]

    def look(
        self, loaded: Attempt, wanted: Sequence[str], *, inputs: bool = False, here: list[str] | None = None
    ) -> tuple[list[str], list[str]]:
        """What is wrong, one line each: with the settings, and with what they find on this machine. `wanted`: the
        stages that are to run; `inputs`: whether what the first of them reads of earlier ones has to be there already;
        `here`: settings of a run that is to start on this machine."""
        if loaded.cfg is None:
            return loaded.faults, []
        wrong = alone(loaded.cfg)
        cfg = repaired(loaded.cfg, wrong)
        dims, missing = _dims_of(cfg)
        together: list[Clash | str] = [*clashes(cfg), *(model_faults(cfg, dims) if dims is not None else ())]
        order = stage_order(cfg)
        left_out = [stage for stage in wanted if stage not in order]
        together += [
            f"{stage}: these settings leave this stage out; theirs are {', '.join(order)}" for stage in left_out
        ]
        wanted = [stage for stage in wanted if stage in order]
        told = any(clash.keys[0].startswith(("task.", "rl.families")) for clash in clashes(cfg))
        if not (loaded.faults or wrong or together or missing):
            # What a stage that has finished read may be gone.
            wanted = [stage for stage in wanted if not stages.is_done(cfg, stage)]
        missing += self._of_files(cfg, dims, wanted)
        (missing if _is_given(cfg.task) else together).extend([] if told else self._of_data(cfg, wanted))
        keys = {*wrong, *loaded.without}
        # These sections decide how many nodes and devices a job takes.
        placed = not any(key.split(".")[0] in ("cluster", "parallel", "rollout", "device") for key in keys)
        if here is not None and wanted and placed:
            missing += faults_of(lambda: check_place(cfg, wanted, here, os.environ))
        if inputs and wanted and not (loaded.faults or wrong or together or missing):
            # With other settings it would be other stages that have to be there.
            missing += faults_of(lambda: stages.check_inputs(cfg, wanted[0]))
        return [*loaded.faults, *wrong.values(), *unless_about(together, keys)], unless_about(missing, keys)

    def _of_files(self, cfg: RunConfig, dims: ModelDims | None, wanted: Sequence[str]) -> Iterator[str]:
        if dims is not None and not draws_weights(cfg):
            weights = f"weights {cfg.model.path} {cfg.model.checkpoint}"
            unreadable = self._once(weights, lambda: stages.check_given(cfg))
            yield from unreadable
            if {*TASK_READERS} & {*wanted} and not unreadable and not cfg.model.checkpoint:
                template = f"{weights} {cfg.rollout.prompt_template} {cfg.rollout.chat_template_kwargs}"
                yield from self._once(template, lambda: chat_of(cfg, model_dir(cfg)))
        if {"rl", "evaluate"} & {*wanted} and cfg.init_policy:
            missing = self._once(f"start {cfg.init_policy}", lambda: stages.calibrated(cfg))
            yield from missing
            if dims is not None and not missing:
                yield from faults_of(lambda: check_start(cfg, dims))
                # Where the model is yet to be made the stage looks at it.
                if not {*OPTIONAL} & {*stage_order(cfg)} and not hub.pending.get(cfg.model.path):
                    pair = f"base of {cfg.init_policy}: {cfg.model.path}"
                    yield from self._once(pair, lambda: stages.check_bases(cfg, "rl", model_dir(cfg)))
        if {*wanted} - {*WITHOUT_ROLLOUTS} and cfg.rollout.backend == "vllm" and cfg.rollout.vllm:
            yield from self._once(f"vllm {cfg.rollout.vllm.python}", lambda: check_vllm(cfg))
        if wanted:
            yield from self._once(f"runs {cfg.runs}", lambda: check_folder("runs", cfg.runs))
        if "evaluate" in wanted and cfg.evaluate.controls:
            yield from faults_of(lambda: check_control(cfg))

    def _of_data(self, cfg: RunConfig, wanted: Sequence[str]) -> Iterator[str]:
        reading = [stage for stage in wanted if stage in TASK_READERS]
        if reading:
            task, needs = repr(cfg.task), [*reading, str(cfg.teacher), cfg.rl.families]
            yield from self._once(f"task {task} {needs}", lambda: check_task(cfg, reading))

    def _once(self, what: str, check: Callable[[], object]) -> list[str]:
        if what not in self._known:
            self._known[what] = list(faults_of(check))
        return self._known[what]


def _is_given(task: TaskConfig) -> bool:
    """Whether its problems come from outside this package, so that a machine may lack them."""
    return bool(task.path) or task.name == "reasoning_gym"


def _dims_of(cfg: RunConfig) -> tuple[ModelDims | None, list[str]]:
    """The model's dimensions, or the errors of reading them."""
    try:
        return read_dims(cfg), []
    except (ValueError, FileNotFoundError) as error:
        return None, lines_of(error)


def check_start(cfg: RunConfig, dims: ModelDims) -> None:
    """Raises ValueError if the policy at `init_policy` has other adapters, exits or gates than the settings."""
    # Late: torch takes seconds to import.
    from ..checkpoint.policy_files import check_policy
    from ..policy import read_policy_json
    from ..tensors import FileTensors

    start = stages.calibrated(cfg)
    spec, wanted = read_policy_json(start).spec, policy_spec(cfg, dims)
    if spec != wanted:
        raise ValueError(
            f"init_policy={cfg.init_policy}: made with exits {list(spec.exit_depths)} and adapters of rank "
            f"{spec.rank}, the settings have {list(wanted.exit_depths)} and {wanted.rank} (or differ in alpha, "
            "targets, gates or exits.first_token)"
        )
    check_policy(dims, spec, FileTensors(start / "policy.safetensors"))


def check_vllm(cfg: RunConfig) -> None:
    """Raises ValueError if `rollout.vllm.python` has no vLLM of a tested version."""
    from ..rollout.pool.vllm import check_python

    assert cfg.rollout.vllm is not None
    check_python(cfg.rollout.vllm.python)


def check_control(cfg: RunConfig) -> None:
    """Raises FileNotFoundError or ValueError if `evaluate.controls.policy` names no policy."""
    if policy := stages.control_policy(cfg):
        from ..policy import read_policy_json

        read_policy_json(policy)


def check_task(cfg: RunConfig, reading: Sequence[str]) -> None:
    """Raises ValueError or FileNotFoundError unless the data exists, is readable and has enough problems for the stages
    that read it."""
    if hub.pending.get(cfg.task.path):
        return
    task = make_task(cfg.task)
    # Problems of reasoning_gym are made in numbers that the settings ask for, one by one.
    try:
        refuse([] if cfg.task.name == "reasoning_gym" else _count_faults(cfg, task, reading))
        if task.scorer:
            try_reward(task, task.prompts("train")[0])
    except ValueError:
        raise
    except Exception as error:
        raise task.source.blamed(error) if task.source else error from None


def _count_faults(cfg: RunConfig, task: Task, reading: Sequence[str]) -> Iterator[str]:
    where = cfg.task.path or f"task.name={cfg.task.name}"
    train = task.prompts("train")
    if not train:
        yield f"task.train: {where} leaves no training problem beside validation and evaluation; ask for fewer of these"
        return
    if "teacher" in reading:
        t = cfg.teacher
        assert t is not None
        shown = faults_of(lambda: task.few_shot(train[0], t.shots, 0))
        yield from (f"teacher.{line}" for line in shown)
        problems = min(len(train), t.problems)
        if problems < t.batch_size:
            yield (
                f"teacher.batch_size={t.batch_size}: {problems} problem(s) (of {where}, at most teacher.problems="
                f"{t.problems}) give at most as many examples, fewer than one batch; lower it, or give more problems"
            )
    if "rl" in reading and not any(p.task.partition(".")[2] in cfg.rl.families for p in train) and cfg.rl.families:
        yield f"rl.families={list(cfg.rl.families)}: no training problem of {where} is of these"
    texts = {prompt.text for prompt in train}
    for split in ("validation", "evaluation"):
        held_out = task.prompts(split)  # type: ignore[arg-type]
        if "evaluate" in reading and not held_out:
            yield f"task.{split}: {where} leaves no problem for it"
        again = next((prompt.text for prompt in held_out if prompt.text in texts), None)
        if task.source and again is not None:
            yield f"{where}: {again[-60:]!r} is a problem of train and of {split}; use split_of, so that it is of one"


def remarks(cfg: RunConfig, command: str, overrides: list[str], missing: list[str]) -> list[str]:
    """Lines of a dry run; the commands that start it come last. `command`: the last stage to list, or "run"; `missing`:
    reasons why it would be refused here. Without a model directory, lines that depend on the model are left out."""
    parallel, estimates = cfg.parallel, list[str]()
    lines = [f"ranks: {ranks(cfg)} = tensor {parallel.tensor} x pipeline {parallel.pipeline} x data {parallel.data}"]
    if (model_dir(cfg) / "config.json").is_file():
        dims = read_dims(cfg)
        exits = resolve_exits(cfg, dims)
        sizes = stage_sizes(parallel, exits)
        lines.append(f"exits: {list(exits.depths)} of {dims.num_layers} layers; layers per stage: {list(sizes)}")
        # Late: the arithmetic needs torch, which takes seconds to import.
        from ..planning.plan import dry_run_lines

        estimates = dry_run_lines(cfg, dims)
    else:
        lines.append(f"exits: not checked against the model: no {cfg.model.path}/config.json here")
    lines.append(f"rollouts: {cfg.rollout.backend}, {cfg.rollout.actors} actor(s)")
    last = "evaluate" if command == "run" else command
    left_out = set(STAGES) - {*stage_order(cfg), last}
    stages = [name for name in list(STAGES)[: list(STAGES).index(last) + 1] if name not in left_out]
    lines += [f"{name}: {stage_dir(cfg, name)}" for name in stages]
    lines += [*estimates, *filter(None, map(hub.pending.get, (cfg.model.path, cfg.task.path)))]
    lines += [f"not ready here: {line}" for line in missing]
    if missing:
        lines.append("started here it would be refused; fine if this is only a plan for another machine")
    return [*lines, *(f"command: {line}" for line in launch_commands(cfg, command, overrides))]
