"""Runs of a grid: their ids, what they share, what is skipped, one task's life, what is collected; no stage is run."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ee_megatron import cli
from ee_megatron.config.cluster import site_options
from ee_megatron.config.derive import read_dims
from ee_megatron.config.errors import Faults
from ee_megatron.config.identity import stage_dir
from ee_megatron.config.load import load
from ee_megatron.config.validate import validate
from ee_megatron.observe.lock import RunLock, process_start
from ee_megatron.planning.command import allocation
from ee_megatron.sweeps import run_metrics
from ee_megatron.sweeps import task as tasks_module
from ee_megatron.sweeps.command import listing, main, to_start
from ee_megatron.sweeps.grid import IsoFlop, read_grid
from ee_megatron.sweeps.run_metrics import collect, figures_of, measure, pretrained, reinforced, rows
from ee_megatron.sweeps.slurm import SlurmTask, make_executor, minutes_of, sbatch_options
from ee_megatron.sweeps.sweep import Sweep, TaskRecord, find_sweep, open_sweep, placed, resolve
from ee_megatron.sweeps.task import device_shares, run_here, run_task

TINY = {
    "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 6, "intermediate_size": 96, "vocab_size": 130, "tie_word_embeddings": True,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
}  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(TINY))
    return ["name=t", f"runs={tmp_path / 'runs'}", f"model.path={tmp_path / 'model'}", "exits.depths=[2,4]"]


def check(cfg) -> None:
    validate(cfg, read_dims(cfg))


def resolved(base: list[str], *settings: str, last: str = "evaluate") -> Sweep:
    return resolve(read_grid([*base, *settings]), last, check)


def made(base: list[str], *settings: str, last: str = "evaluate") -> Sweep:
    sweep = resolved(base, *settings, last=last)
    sweep.save()
    return sweep


def finish(sweep: Sweep, key: str) -> None:
    for step in sweep.tasks[key].steps:
        sweep.path(step).mkdir(parents=True, exist_ok=True)
        (sweep.path(step) / "DONE").touch()


def stages(sweep: Sweep) -> list[list[str]]:
    return [[step.stage for step in task.steps] for task in sweep.tasks.values()]


def states(sweep: Sweep) -> list[str]:
    return [sweep.run_state(run) for run in sweep.runs]


def startable(sweep: Sweep, queue: dict[str, str] | None = None, retry: bool = False) -> list[str]:
    return [task.key for task in to_start(sweep, queue or {}, retry)]


SMALL = ("teacher=null",)
"""Two tasks a run: traces and calibration, shared, and RL."""


@contextlib.contextmanager
def held(lock: RunLock) -> Iterator[None]:
    """Another process that lives has the lock; then it is dead."""
    with subprocess.Popen(["sleep", "60"]) as child:
        holder = {"host": socket.gethostname(), "pid": child.pid, "start": process_start(child.pid)}
        lock.path.write_text(json.dumps(holder))
        yield
        child.kill()


# ---- ids and tasks ----


def test_a_runs_id_is_the_hash_of_its_last_stage_and_of_nothing_else(base: list[str]) -> None:
    sweep = made(base, "rl.depth_penalty.weight=0,1")
    cfg = load(sweep.runs[1].overrides)
    assert stage_dir(cfg, "evaluate").name == f"evaluate-{sweep.runs[1].id}"
    # Ranks, actors, checkpoints and order don't count.
    other = made([*base, "rollout.actors=3", "rl.checkpoint_every=7"], "rl.depth_penalty.weight=1,0")
    assert [run.id for run in other.runs] == [run.id for run in reversed(sweep.runs)]
    assert other.directory == sweep.directory
    assert made(base, "rl.depth_penalty.weight=0,1", last="rl").directory != sweep.directory


def test_every_wrong_point_is_listed_before_anything_is_written(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Faults) as caught:
        made(base, "rollout.actors=1,2")
    assert "point 2 (rollout.actors=2): the same run as point 1 (rollout.actors=1)" in caught.value.lines[0]
    with pytest.raises(Faults) as caught:
        made(base, "rl.depth_penalty.weight=0,-1", "rl.group_size=1,4")
    first, second = caught.value.lines
    assert first.startswith("point 1 (rl.depth_penalty.weight=0 rl.group_size=1) and 1 other(s), up to point 3 (")
    assert ": rl.group_size=1" in first and "rl.depth_penalty.weight=-1" in second
    assert cli.main(["sweep", *base, *SMALL, "rl.lamda_exit=1,2", "rl.steps=0,1"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: point 1") and "rl.depth_penalty.weight" in line
    assert not (tmp_path / "runs").exists()


def test_shared_stages_are_tasks_of_their_own_that_come_first(base: list[str]) -> None:
    sweep = made(base, "rl.depth_penalty.weight=0,1", "seed=1,2")
    shapes = [(found, len(task.runs)) for found, task in zip(stages(sweep), sweep.tasks.values(), strict=True)]
    assert shapes == [(["teacher", "traces"], 4)] + [(["calibrate"], 2)] * 2 + [(["rl", "evaluate"], 1)] * 4
    assert [task.level for task in sweep.tasks.values()] == [0, 1, 1, 2, 2, 2, 2]
    for run in sweep.runs:
        chain = sweep.chain(sweep.tasks[run.task])
        assert [step for task in chain for step in task.steps] == run.steps
        assert chain[1].runs == [other.id for other in sweep.runs if other.settings["seed"] == run.settings["seed"]]


def test_a_sweep_that_knows_a_stage_by_its_older_name_is_found_and_goes_on(base: list[str]) -> None:
    sweep = made(base, "model.checkpoint=x,y", last="import-checkpoint")
    file = sweep.directory / "manifest.json"
    assert sweep.directory.name == "sweep-imported" and "import-checkpoint" in file.read_text()
    file.write_text(file.read_text().replace("import-checkpoint", "imported"))
    assert open_sweep(sweep.directory).runs == sweep.runs


def test_what_starts_from_a_given_policy_needs_no_calibration(base: list[str]) -> None:
    base = [*base, *SMALL, "init_policy=somewhere"]
    assert stages(made(base, "rl.depth_penalty.weight=0,1", last="rl")) == [["rl"], ["rl"]]
    with pytest.raises(Faults, match="--last traces"):
        made(base, "rl.depth_penalty.weight=0,1", last="traces")


def test_a_manifest_reads_back_as_it_was_written_and_is_found_by_name(base: list[str], tmp_path: Path) -> None:
    sweep, runs = made(base, "rl.depth_penalty.weight=0,1"), tmp_path / "runs"
    before = (sweep.directory / "manifest.json").read_bytes()
    assert find_sweep("t", runs) == sweep
    made(base, "rl.depth_penalty.weight=0,1")
    assert (sweep.directory / "manifest.json").read_bytes() == before
    with pytest.raises(FileNotFoundError, match="t"):
        find_sweep("u", runs)
    shorter = made(base, "rl.depth_penalty.weight=0,1", last="rl")
    with pytest.raises(ValueError, match="--last"):
        find_sweep("t", runs)
    assert find_sweep("t", runs, last="rl") == shorter
    assert find_sweep(f"t/{shorter.directory.name}", runs) == shorter == find_sweep(str(shorter.directory), runs)
    for text in ("{", "[]", '{"format": 1, "runs": []}', '{"format": 2, "last": "rl", "runs": [{}]}'):
        (sweep.directory / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=r"manifest\.json"):
            open_sweep(sweep.directory)


# ---- equal compute ----


@pytest.mark.parametrize("setting", ["rl.steps", "calibrate.epochs", "pretrain.steps"])
def test_a_budget_buys_the_number_of_steps_that_comes_nearest(setting: str, base: list[str]) -> None:
    cfg = load([*base, "pretrain=true"])
    one, ten = (IsoFlop(budget, setting, 20, 16).buy(cfg) for budget in (1e12, 1e13))
    assert ten == pytest.approx(10 * one, rel=0.1) and isinstance(one, float if "epochs" in setting else int)


def test_calibration_is_paid_for_with_what_is_scored_for_it(base: list[str]) -> None:
    def bought(*settings: str) -> float:
        cfg = load([*base, "calibrate.depth_power=1.5", *settings])
        return IsoFlop(1e13, "calibrate.epochs", 20, 16).buy(cfg)

    reach, current = "calibrate.kl_scale=1", "calibrate.gate_targets=current"
    once = bought(reach, "calibrate.gate_targets=sampled")
    assert once == bought(current) == bought(reach, current) < bought("calibrate.gate_targets=sampled")


def test_an_isoflop_grid_gives_larger_models_fewer_steps(base: list[str], tmp_path: Path) -> None:
    (tmp_path / "wide").mkdir()
    (tmp_path / "wide" / "config.json").write_text(json.dumps({**TINY, "hidden_size": 128}))
    (tmp_path / "grid.yaml").write_text("axes: {budget: [1e12, 1e13]}\nisoflop: {prompt_tokens: 20, answer_tokens: 17}")
    rest = [text for text in base if not text.startswith("model.path")]
    models = [f"{tmp_path}/model", f"{tmp_path}/wide"]
    sweep = made(rest, f"sweep={tmp_path}/grid.yaml", f"model.path={','.join(models)}", last="rl")
    steps = {(run.settings["model.path"], run.settings["budget"]): run.settings["rl.steps"] for run in sweep.runs}
    assert steps[models[0], 1e12] > steps[models[1], 1e12] and len(steps) == 4
    assert steps[models[0], 1e13] == pytest.approx(10 * steps[models[0], 1e12], rel=0.1)
    assert [load(run.overrides).rl.steps for run in sweep.runs] == [run.settings["rl.steps"] for run in sweep.runs]


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (["budget=1,1e12"], "budget=1:"),
        (["budget=a"], "budget"),
        (["budget=0"], "budget"),
        (["budget=nan"], "budget"),
        (["budget=inf"], "budget"),
        (["budget=1e12", "rl.steps=1,2"], "rl.steps"),
        (["budget=1e12", "isoflop.sett=rl.steps"], "sett"),
        (["budget=1e12", "isoflop.set=rl.epochs"], "isoflop.set"),
        (["budget=1e12", "isoflop.mean_depth=2"], "mean-depth"),
        (["budget=1e12", "isoflop.set=pretrain.steps"], "pretrain"),
        (["rl.steps=1,2", "isoflop.set=rl.steps"], "isoflop.set"),
    ],
)
def test_a_budget_that_buys_nothing_is_refused(settings: list[str], key: str, base: list[str]) -> None:
    with pytest.raises(Faults) as caught:
        made(base, *settings)
    (line,) = caught.value.lines
    assert key in line


# ---- what is skipped ----


def test_finished_tasks_are_skipped_and_failed_ones_wait_for_the_word(base: list[str]) -> None:
    sweep = made(base, "rl.depth_penalty.weight=0,1", *SMALL, last="rl")
    shared, first, second = sweep.tasks
    assert startable(sweep) == [shared, first, second]
    finish(sweep, shared)
    finish(sweep, first)
    assert startable(sweep) == [second]
    sweep.write_record(second, TaskRecord("failed", "rl", 1, "it broke"))
    assert startable(sweep) == [] and startable(sweep, retry=True) == [second]
    assert sweep.failure(sweep.tasks[second]) == "it broke"
    (sweep.path(sweep.tasks[shared].steps[0]) / "DONE").unlink()
    sweep.write_record(shared, TaskRecord("failed", "traces", 1, "no memory"))
    assert states(sweep) == ["failed", "failed"]
    assert shared in sweep.failure(sweep.tasks[second]) and "no memory" in sweep.failure(sweep.tasks[second])
    assert startable(sweep) == [] and startable(sweep, retry=True) == [shared, second]


def test_a_task_is_running_while_the_process_that_holds_the_sweeps_lock_lives(base: list[str]) -> None:
    sweep = made(base, "rl.depth_penalty.weight=0,1", *SMALL, last="rl")
    task = [*sweep.tasks.values()][1]
    sweep.write_record(task.key, TaskRecord("running", "rl", host="elsewhere", job="12_3"))
    assert sweep.task_state(task) == "killed" and task.key in startable(sweep)
    with held(sweep.lock):
        assert sweep.task_state(task) == "running" and task.key not in startable(sweep, retry=True)
        assert "rl on elsewhere" in listing(sweep, {})
    assert sweep.task_state(task) == "killed"


def test_what_slurm_has_in_its_queue_is_left_to_it(base: list[str]) -> None:
    sweep = made(base, "rl.depth_penalty.weight=0,1", *SMALL, last="rl")
    shared, first, second = sweep.tasks
    sweep.note_submitted({first: "12_0", second: "12_1"})
    queue = {first: "PENDING", second: "RUNNING"}
    assert startable(sweep, queue, retry=True) == [shared]
    assert [sweep.task_state(sweep.tasks[key], queue) for key in sweep.tasks] == ["waiting", "queued", "running"]
    assert "job 12_0 (PENDING)" in listing(sweep, queue)


# ---- sweeps that grow ----


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is a config.json: nothing is started."""
    monkeypatch.setattr("ee_megatron.training.stages.check_given", lambda cfg: None)


def plan_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    code = main([*arguments, "--last", "rl", "--dry-run"])
    said = capsys.readouterr()
    assert code == 0, said.err
    return said.out.splitlines()


@pytest.mark.usefixtures("no_weights")
def test_a_grid_with_another_point_extends_the_sweep(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [*base, *SMALL]
    small = made(base, "rl.depth_penalty.weight=0", last="rl")
    # Alone, the run was one task; with another they part after calibration.
    assert stages(small) == [["traces", "calibrate", "rl"]]
    finish(small, small.runs[0].task)
    small.write_record(small.runs[0].task, TaskRecord("finished", "rl", starts=1))
    larger = placed(resolved(base, "rl.depth_penalty.weight=0,1", "seed=0,1", last="rl"), False)
    larger.save()
    assert larger.directory == small.directory and find_sweep("t", tmp_path / "runs") == larger
    # What was done is done: traces and one calibration are shared, one run is finished.
    assert larger.run_state(larger.runs[0]) == "finished" and larger.record(larger.runs[0].task).starts == 1
    assert [key.split("-")[0] for key in startable(larger)] == ["calibrate", "rl", "rl", "rl"]
    # The first grid again is a part of it: nothing is left to do of it, and nothing is forgotten.
    assert (
        plan_of([*base, "rl.depth_penalty.weight=0"], capsys)[0]
        == f"{small.directory}: 4 run(s), 7 task(s), 0 to start"
    )
    again = placed(resolved(base, "rl.depth_penalty.weight=0", last="rl"), False)
    assert [(run.id, run.settings) for run in again.runs] == [(run.id, run.settings) for run in larger.runs]
    # Another part: only what was asked for starts.
    lines = plan_of([*base, "rl.depth_penalty.weight=1", "seed=1"], capsys)
    assert lines[0].endswith("2 to start") and sum(line.startswith("  start ") for line in lines) == 2


@pytest.mark.usefixtures("no_weights")
def test_points_are_added_by_extend_and_by_nothing_else(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [*base, *SMALL]
    sweep = made(base, "rl.depth_penalty.weight=0,1", last="rl")
    for values in ("2", "1,2"):
        with pytest.raises(ValueError, match="--extend"):
            main([*base, f"rl.depth_penalty.weight={values}", "--last", "rl"])
    assert find_sweep("t", tmp_path / "runs") == sweep
    lines = plan_of([*base, "rl.depth_penalty.weight=2,3", "rl.steps=5", "--extend"], capsys)
    assert lines[0] == f"{sweep.directory}: 4 run(s), 5 task(s), 3 to start"
    grown = placed(resolved(base, "rl.depth_penalty.weight=2", "task.families=[sum],[sum,word]", last="rl"), True)
    grown.save()
    assert find_sweep("t", tmp_path / "runs") == grown and len(grown.runs) == 4
    # What only one of the grids varies has its value in every row.
    table = rows(grown)
    assert [row["rl.depth_penalty.weight"] for row in table] == [0, 1, 2, 2]
    defaults = str(load(base).task.families)
    assert [row["task.families"] for row in table] == [defaults, defaults, "['sum']", "['sum', 'word']"]


# ---- one task's life; a script stands for the stage ----


@pytest.fixture
def small(base: list[str], monkeypatch: pytest.MonkeyPatch) -> Sweep:
    """Two RL runs behind shared traces and calibration; measuring is left out."""
    monkeypatch.setattr(run_metrics, "measure", lambda *_: None)
    return made(base, "rl.depth_penalty.weight=0,1", *SMALL, last="rl")


def stage_script(monkeypatch: pytest.MonkeyPatch, text: str, locked: bool = False) -> None:
    """`text` runs with `out`, the directory of the stage, and `stage`; it is done unless it exits. `locked`: it holds
    the directory, as real ones do."""
    script = "import os, signal, sys, time\nfrom pathlib import Path\nout, stage = Path(sys.argv[1]), sys.argv[2]\n"
    if locked:
        script += "from ee_megatron.observe.rundir import RunDirectory\nrun = RunDirectory(out)\n"
    script += "out.mkdir(exist_ok=True)\nwith (out / 'starts').open('a') as file:\n    file.write('x')\n"

    def command(cfg, stage: str, overrides: list[str]) -> tuple[list[str], dict[str, str]]:
        body = f"{script}{text}\n(out / 'DONE').touch()"
        return [sys.executable, "-c", body, str(stage_dir(cfg, stage)), stage], {**os.environ}

    monkeypatch.setattr(tasks_module, "command_of", command)


def test_a_failed_task_says_why_and_what_needs_it_does_not_try(small: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "if stage == 'calibrate':\n    print('error: it broke', file=sys.stderr); print('bye'); sys.exit(3)"
    stage_script(monkeypatch, text)
    assert not run_here(small, [*small.tasks.values()], 2)
    shared, first, second = (small.record(key) for key in small.tasks)
    assert (shared.state, shared.stage, shared.code, shared.error) == ("failed", "calibrate", 3, "it broke")
    assert first.state == second.state == "failed" and "it broke" in first.error and first.starts == 1
    assert [file.read_text() for file in small.directory.parent.glob("calibrate-*/starts")] == ["x"]
    assert not [*small.directory.parent.glob("rl-*")]
    assert states(small) == ["failed", "failed"]


def test_one_failed_run_leaves_the_others_alone_and_a_killed_one_resumes(
    small: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked = small.runs[1].task
    stage_script(monkeypatch, f"if out.name == '{marked}':\n    os.kill(os.getpid(), signal.SIGKILL)")
    run_here(small, [*small.tasks.values()], 2)
    assert states(small) == ["finished", "killed"]
    assert small.record(marked).code == -signal.SIGKILL and startable(small) == [marked]
    stage_script(monkeypatch, "")
    run_here(small, [small.tasks[marked]], 1)
    assert small.run_state(small.runs[1]) == "finished" and small.record(marked).starts == 2
    traces = small.path(next(iter(small.tasks.values())).steps[0])
    assert (traces / "starts").read_text() == "x", "shared stages are made once"


def test_a_missing_shared_stage_is_made_once_by_one_of_those_that_need_it(
    small: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a dependency was released early: both runs find it missing at once, and one is refused by its lock."""
    monkeypatch.setattr(tasks_module, "POLL_S", 0.05)
    stage_script(monkeypatch, "time.sleep(0.3)", locked=True)
    shared, *own = small.tasks.values()
    run_here(small, own, 2)
    assert states(small) == ["finished", "finished"]
    assert [(small.path(step) / "starts").read_text() for step in shared.steps] == ["x", "x"]


def test_a_stage_that_another_process_makes_is_waited_for_until_the_deadline(
    small: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage_script(monkeypatch, "")
    monkeypatch.setattr(tasks_module, "LOCK_DEADLINE_S", 0.5)
    shared = next(iter(small.tasks.values()))
    path = small.path(shared.steps[0])
    path.mkdir(parents=True)
    with held(RunLock(path / ".lock")):
        record = run_task(small, shared, lambda: False)
        assert record.state == "failed" and "being written" in record.error and not (path / "starts").exists()
    assert run_task(small, shared, lambda: False).state == "finished"


WAITS = """signal.signal(signal.SIGTERM, lambda *_: sys.exit(85))
(out / 'ready').touch()
time.sleep(60)"""


def tell_when_ready(sweep: Sweep, stage: str, count: int, number: int) -> threading.Thread:
    """Sends this process a signal once so many directories of the stage are ready."""

    def tell() -> None:
        while len([*sweep.directory.parent.glob(f"{stage}-*/ready")]) < count:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    helper = threading.Thread(target=tell)
    helper.start()
    return helper


@pytest.mark.parametrize(("heeds", "code"), [(True, 85), (False, -signal.SIGKILL)])
def test_a_task_that_is_told_to_stop_tells_its_stage_and_kills_it_after_the_grace_period(
    small: Sweep, monkeypatch: pytest.MonkeyPatch, heeds: bool, code: int
) -> None:
    stage_script(monkeypatch, WAITS if heeds else WAITS.replace("lambda *_: sys.exit(85)", "signal.SIG_IGN"))
    shared = next(iter(small.tasks.values()))
    record = run_task(small, shared, (small.path(shared.steps[0]) / "ready").exists, grace_s=0.3)
    assert (record.state, record.code) == ("stopped", code) and small.task_state(shared) == "stopped"
    assert startable(small) == [*small.tasks]


def test_an_interrupted_sweep_stops_its_tasks_and_waits_for_them(small: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    stage_script(monkeypatch, WAITS)
    finish(small, next(iter(small.tasks)))
    _, *own = small.tasks.values()
    before, helper = signal.getsignal(signal.SIGINT), tell_when_ready(small, "rl", 2, signal.SIGINT)
    assert run_here(small, own, 2)
    helper.join()
    assert states(small) == ["stopped", "stopped"] and signal.getsignal(signal.SIGINT) is before


def test_a_warning_on_slurm_stops_the_stage_and_then_hands_the_job_back(
    small: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage_script(monkeypatch, WAITS)
    shared = next(iter(small.tasks.values()))
    # In place of submitit's handler, which puts the job back into the queue and ends the process.
    found: list[str] = []
    before = signal.signal(signal.SIGUSR2, lambda *_: found.append(small.task_state(shared)))
    helper = tell_when_ready(small, shared.steps[0].stage, 1, signal.SIGUSR2)
    try:
        with pytest.raises(RuntimeError, match="stopped"):
            SlurmTask(small.directory, shared.key, 300.0)()
    finally:
        signal.signal(signal.SIGUSR2, before)
        helper.join()
    assert found == ["stopped"] and small.record(shared.key).code == 85


def test_devices_are_shared_out_among_tasks() -> None:
    def shares(text: str, parallel: int) -> list[str | None]:
        return device_shares({"CUDA_VISIBLE_DEVICES": text}, parallel)

    assert shares("0,1,2,3", 2) == ["0,1", "2,3"] and shares("2,3", 4) == ["2", "3", "2", "3"]
    assert shares("0,1", 1) == [None] and shares("", 2) == [None, None]


# ---- what is collected ----


EVALUATED = {
    "rows": [
        {"model": "teacher", "exits": "full depth", "n": 2, "accuracy": 1.0, "low": 0.3, "high": 1.0,
         "mean_depth": 1.0, "total_depth": 30.0, "length": 5.0, "kl": None},
        {"model": "reinforced", "exits": "full depth", "n": 2, "accuracy": 1.0, "low": 0.3, "high": 1.0,
         "mean_depth": 1.0, "total_depth": 30.0, "length": 5.0, "kl": 0.1},
        {"model": "reinforced", "exits": "hazard > 0.5", "n": 2, "accuracy": 0.5, "low": 0.1, "high": 0.9,
         "mean_depth": 0.6, "total_depth": 18.0, "length": 5.0, "kl": 0.2},
    ],
    "depth": {"reinforced, hazard > 0.5": {"flops": {"value": 5e6, "low": 4e6, "high": 6e6}}},
}  # fmt: skip
STEP = {"step": 1, "reward": 0.5, "task_reward": 0.75, "accuracy": 0.5, "mean_depth": 0.75, "total_depth": 22.0,
        "length": 5.0, "prompt_length": 10.0, "tokens": 40.0, "flops/rollout": 1.0, "flops/score": 2.0,
        "flops/update": 4.0}  # fmt: skip


def results_of(sweep: Sweep, index: int, reward: float) -> None:
    """Finish a run, with its result file."""
    run = sweep.runs[index]
    for task in sweep.chain(sweep.tasks[run.task]):
        finish(sweep, task.key)
    path = {step.stage: sweep.path(step) for step in run.steps}
    (path["evaluate"] / "results.json").write_text(json.dumps(EVALUATED))
    lines = [json.dumps({**STEP, "step": step, "reward": reward}) for step in (1, 2)]
    (path["rl"] / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    measure(sweep, run, load(run.overrides))


def test_the_table_is_made_of_result_files_and_the_same_to_the_byte(base: list[str]) -> None:
    sweep = made(base, "rl.depth_penalty.weight=0,1e-300,12345678.123456789", "task.families=[sum],[sum,word]")
    results_of(sweep, 0, 0.25)
    sweep.write_record(sweep.runs[1].task, TaskRecord("failed", "rl", 1, 'a "quoted", comma'))
    first = collect(sweep).read_bytes()
    # Nothing but the result file is looked at: what the stages left may be gone, and clocks don't count.
    for file in sweep.directory.parent.glob("rl-*/metrics*"):
        file.unlink()
    sweep.write_record(sweep.runs[2].task, TaskRecord("stopped", "rl", 85))
    assert collect(sweep).read_bytes() == first

    table = list(csv.DictReader(io.StringIO(first.decode())))
    assert len(table) == 6 and [row["status"] for row in table[:3]] == ["finished", "failed", "unfinished"]
    row = table[0]
    assert (row["run"], row["rl.depth_penalty.weight"], row["task.families"]) == (sweep.runs[0].id, "0", "['sum']")
    assert row["policy"] == "reinforced" and row["exits"].startswith("hazard")
    assert (row["accuracy"], row["mean_depth"], row["total_depth"], row["kl"]) == ("0.5", "0.6", "18.0", "0.2")
    assert (row["accuracy_full"], row["accuracy_teacher"], row["tokens"], row["reward"]) == ("1.0", "1.0", "80", "0.25")
    assert (row["flops_rl"], row["flops_answer"]) == ("14.0", "5000000.0")
    assert table[1]["error"] == 'a "quoted", comma' and table[1]["accuracy"] == ""
    weights = [0, 0, 1e-300, 1e-300, 12345678.123456789, 12345678.123456789]
    assert [float(row["rl.depth_penalty.weight"]) for row in table] == weights
    assert "accuracy=0.500" in listing(sweep, {}) and 'a "quoted"' in listing(sweep, {})


def test_a_run_that_is_unfinished_again_has_no_figures_in_the_table(base: list[str]) -> None:
    """Its result file is still there, but somebody has removed a stage since."""
    sweep = made(base, "rl.depth_penalty.weight=0,1")
    results_of(sweep, 0, 0.25)
    assert rows(sweep)[0]["reward"] == 0.25
    (sweep.path(sweep.runs[0].steps[-2]) / "DONE").unlink()
    assert sweep.result(sweep.runs[0]) is not None
    again, never = rows(sweep)
    assert again["status"] == "unfinished" and again.keys() == never.keys() and again["error"] == ""


@pytest.mark.usefixtures("no_weights")
def test_results_that_are_missing_are_measured_at_the_next_start(
    base: list[str], capsys: pytest.CaptureFixture
) -> None:
    sweep = made(base, "rl.depth_penalty.weight=0,1")
    for index in (0, 1):
        results_of(sweep, index, 0.25)
    result = sweep.result(sweep.runs[1])
    (sweep.directory / "results" / f"{sweep.runs[1].id}.json").unlink()
    assert main([*base, "rl.depth_penalty.weight=0,1"]) == 0 and sweep.result(sweep.runs[1]) == result
    assert "0 to start" in capsys.readouterr().out


def test_rewards_are_of_the_last_steps_and_flops_of_all() -> None:
    steps = [{**STEP, "step": step, "reward": float(step > 6)} for step in range(1, 9)]
    figures = reinforced(steps)
    assert (figures["reward"], figures["steps"], figures["tokens"]) == (1.0, 8, 320)
    assert (figures["flops_rollouts"], figures["flops_scoring"], figures["flops_update"]) == (8, 16, 32)
    del steps[0]["flops/update"]
    assert "flops_rl" not in reinforced(steps) and reinforced([]) == {}


def test_parameters_are_counted_by_kind(base: list[str], tmp_path: Path) -> None:
    cfg = load([*base, "adapter.rank=4", "adapter.targets=attention"])
    row = figures_of(cfg, {})
    block = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64
    assert row["parameters_embedding"] == 130 * 64 and row["parameters_layers"] == 6 * block + 64
    assert row["parameters_adapters"] == 6 * 4 * (2 * (64 + 64) + 2 * (64 + 32))
    assert row["parameters_gates"] == 2 * (128 * 64 + 128 + 128 + 1)
    assert row["parameters_trained"] == row["parameters_adapters"] + row["parameters_gates"]


def test_what_pretraining_cost_is_counted_by_hand(base: list[str]) -> None:
    """Forward once, backward twice over; 15 of 16 tokens go in, and as many come out."""
    cfg = load([*base, "parallel.tokens_per_micro_batch=64"])
    dims = read_dims(cfg)
    figures = {"loss": 2.0, "answer_loss": 1.0, "tokens": 8 * 15, "sequences": 8, "length": 16.0}
    found = pretrained(figures, cfg, dims)
    layer = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 96
    products = 3 * 2 * 15 * (6 * layer + 130 * 64)
    # Scores and values of what each token sees; their backward pass recomputes the scores.
    attention = 3.5 * 6 * 4 * sum(range(1, 16)) * 64
    assert found["flops_pretrain"] == pytest.approx(8 * (products + attention), rel=1e-9)
    assert (found["loss"], found["loss_answer"], found["tokens_pretrain"]) == (2.0, 1.0, 120)


# ---- Slurm ----


def test_time_limits_are_read_as_slurm_reads_them() -> None:
    found = {text: minutes_of(text) for text in ("90", "2:30", "1:30:00", "1-12", "1-12:30")}
    assert found == {"90": 90, "2:30": 3, "1:30:00": 90, "1-12": 2160, "1-12:30": 2190}
    with pytest.raises(ValueError, match="--slurm time=soon"):
        minutes_of("soon")


def test_a_sweeps_jobs_ask_for_what_the_job_scripts_ask_for_and_the_site_says(
    base: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = made([*base, "cluster.gpus_per_node=4"], "rl.depth_penalty.weight=0,1").tasks.values()
    monkeypatch.delenv("EE_SBATCH", raising=False)
    asked = sbatch_options(tasks, {})
    lines = (Path(__file__).parents[2] / "slurm" / "rl_7b.sh").read_text()
    for key in ("cpus-per-task", "mem"):
        assert f"#SBATCH --{key}={asked[key]}\n" in lines
    assert (asked["nodes"], asked["ntasks-per-node"], asked["gpus-per-node"]) == ("1", "4", "4")
    monkeypatch.setenv("EE_SBATCH", "--cpus-per-task=12 --mem=900G --gpus-per-node=h100:4 --gres=lscratch:9")
    site = sbatch_options(tasks, {})
    found = site["cpus-per-task"], site["mem"], site["gpus-per-node"], site["gres"]
    assert found == ("12", "900G", "h100:4", "lscratch:9")
    assert "gpus-per-node" not in sbatch_options(tasks, {"gres": "gpu:h100:4"})
    own = sbatch_options(tasks, {"cpus-per-gpu": "6", "mem-per-gpu": "80G"})
    assert own["cpus-per-gpu"] == "6" and own["mem-per-gpu"] == "80G" and not {"cpus-per-task", "mem"} & own.keys()
    assert "--cpus-per-task=12 --mem=900G --gpus-per-node=h100:4 --gres=lscratch:9" in " ".join(
        allocation(load([*base, "cluster.gpus_per_node=4"]), "rl")
    )


def test_what_sbatch_gets_names_no_wckey_but_the_sites(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("EE_SBATCH", "--exclusive")
    sweep = made([*base, "cluster.gpus_per_node=4"], "rl.depth_penalty.weight=0,1")

    def script(**options: str) -> list[str]:
        asked = sbatch_options([*sweep.tasks.values()][-2:], {"time": "90", **options})
        executor = make_executor(sweep, asked, 2, 3, "afterany:7")
        return executor._make_submission_file_text("command", "id").splitlines()

    lines = script()
    for option in ("cpus-per-task=8", "mem=0", "gpus-per-node=4", "nodes=1", "exclusive", "requeue", "time=90",
                   "ntasks-per-node=4", "dependency=afterany:7", "signal=B:USR2@300"):  # fmt: skip
        assert f"#SBATCH --{option}" in lines, (option, lines)
    assert not any("wckey" in line for line in lines)
    assert "#SBATCH --wckey=physics" in script(wckey="physics")


@pytest.mark.parametrize(
    ("text", "option"),
    [("-p gpu", "-p"), ("--comment='a", "quotation"), ("--mem-per-gpu=80G", "--mem"), ("--cpus-per-gpu=4",
     "--cpus-per-task"), ("--nodes=2", "--nodes"), ("--gres=gpu:h100:8", "--gpus-per-node=h100:8")],
)  # fmt: skip
def test_a_sites_options_that_no_job_could_take_are_named(text: str, option: str) -> None:
    with pytest.raises(ValueError, match=f"EE_SBATCH: .*{option}"):
        site_options({"EE_SBATCH": text})
