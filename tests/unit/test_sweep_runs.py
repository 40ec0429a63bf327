"""A grid's runs: their ids, what they share, what is skipped, what is collected; nothing is started here."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import socket
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ee_megatron import cli
from ee_megatron.config.cluster import site_options
from ee_megatron.config.derive import read_dims
from ee_megatron.config.errors import Faults
from ee_megatron.config.identity import stage_dir
from ee_megatron.config.load import load
from ee_megatron.config.validate import validate
from ee_megatron.observe.lock import process_start
from ee_megatron.planning.command import allocation
from ee_megatron.planning.flops import decode_cost
from ee_megatron.sweeps import records, status
from ee_megatron.sweeps.budget import buy
from ee_megatron.sweeps.collect import collect, columns, rows, to_csv
from ee_megatron.sweeps.command import forget_failures, main, to_start, write_missing_results
from ee_megatron.sweeps.extend import placed
from ee_megatron.sweeps.grid import IsoFlop, from_settings
from ee_megatron.sweeps.local import split_devices, visible_devices
from ee_megatron.sweeps.measured import measure, one_rank, pretrained, reinforced, workload
from ee_megatron.sweeps.records import own_job
from ee_megatron.sweeps.slurm import _executor, asked_for, minutes_of
from ee_megatron.sweeps.status import left_out, status_table
from ee_megatron.sweeps.sweep import Sweep, resolve

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


def made(base: list[str], *settings: str, last: str = "evaluate") -> Sweep:
    sweep = resolve(from_settings([*base, *settings]), last, check)
    records.save(sweep)
    return sweep


def finish(sweep: Sweep, key: str) -> None:
    for _, name in sweep.task(key).stages:
        path = records.stage_path(sweep, name)
        path.mkdir(parents=True, exist_ok=True)
        (path / "DONE").touch()


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


def test_points_that_are_the_same_run_are_refused(base: list[str]) -> None:
    with pytest.raises(Faults) as caught:
        made(base, "rollout.actors=1,2")
    assert "point 2 (rollout.actors=2): the same run as point 1 (rollout.actors=1)" in caught.value.lines[0]


def test_every_wrong_point_is_listed_before_anything_is_written(base: list[str], tmp_path: Path) -> None:
    with pytest.raises(Faults) as caught:
        made(base, "rl.depth_penalty.weight=0,-1", "rl.group_size=1,4")
    lines = caught.value.lines
    assert len(lines) == 2
    assert lines[0].startswith(
        "point 1 (rl.depth_penalty.weight=0 rl.group_size=1) and 1 other(s), up to point 3 (rl.lambda"
    )
    assert "rl.group_size=1: rl.loss.advantage=rloo" in lines[0]
    assert lines[1].startswith(
        "point 3 (rl.depth_penalty.weight=-1 rl.group_size=1) and 1 other(s), up to point 4 (rl.lambda"
    )
    assert "rl.depth_penalty.weight=-1" in lines[1] and not (tmp_path / "runs").exists()


def test_the_command_line_lists_them_too(base: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["sweep", *base, "teacher=null", "rl.lamda_exit=1,2", "rl.steps=0,1"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert (
        len(lines) == 1
        and lines[0].startswith("error: point 1")
        and "did you mean rl.depth_penalty.weight?" in lines[0]
    )
    assert not (tmp_path / "runs").exists()


def test_shared_stages_are_tasks_of_their_own_that_come_first(base: list[str]) -> None:
    sweep = made(base, "rl.depth_penalty.weight=0,1", "seed=1,2")
    shapes = [([stage for stage, _ in task.stages], len(task.runs)) for task in sweep.tasks]
    assert (
        shapes == [(["teacher", "traces"], 4), (["calibrate"], 2), (["calibrate"], 2)] + [(["rl", "evaluate"], 1)] * 4
    )
    assert [len(level) for level in sweep.levels()] == [1, 2, 4]
    for run in sweep.runs:
        chain = sweep.chain(sweep.task(run.tasks[-1]))
        assert [task.key for task in chain] == run.tasks and run.id in chain[-1].key
    seeds = {run.settings["seed"]: run.tasks[1] for run in sweep.runs}
    assert seeds[1] != seeds[2] and all(run.tasks[1] == seeds[run.settings["seed"]] for run in sweep.runs)


def test_what_starts_from_a_given_policy_needs_no_calibration(base: list[str]) -> None:
    sweep = made([*base, "teacher=null", "init_policy=somewhere"], "rl.depth_penalty.weight=0,1", last="rl")
    assert [[stage for stage, _ in task.stages] for task in sweep.tasks] == [["rl"], ["rl"]]
    with pytest.raises(Faults, match="--last traces: this run's stages are rl, evaluate"):
        made([*base, "teacher=null", "init_policy=somewhere"], "rl.depth_penalty.weight=0,1", last="traces")


def test_a_manifest_reads_back_as_it_was_written_and_is_found_by_name(base: list[str], tmp_path: Path) -> None:
    sweep = made(base, "rl.depth_penalty.weight=0,1")
    before = (sweep.directory / "manifest.json").read_bytes()
    assert records.find_sweep("t", tmp_path / "runs") == sweep
    records.save(made(base, "rl.depth_penalty.weight=0,1"))
    assert (sweep.directory / "manifest.json").read_bytes() == before
    with pytest.raises(FileNotFoundError, match="there are t"):
        records.find_sweep("u", tmp_path / "runs")
    made(base, "rl.depth_penalty.weight=2,3")
    with pytest.raises(ValueError, match=r"there are 2 sweeps of this name; give --last STAGE or one of t/sweep-"):
        records.find_sweep("t", tmp_path / "runs")
    shorter = made(base, "rl.depth_penalty.weight=0,1", last="rl")
    assert records.find_sweep("t", tmp_path / "runs", last="rl") == shorter
    assert records.find_sweep(f"t/{sweep.directory.name}", tmp_path / "runs") == sweep


# ---- what is skipped ----


def test_finished_tasks_are_skipped_and_failed_ones_wait_for_the_word(base: list[str]) -> None:
    sweep = made(base, "rl.depth_penalty.weight=0,1", "teacher=null", last="rl")
    shared, first, second = sweep.tasks
    assert to_start(sweep, {}, False) == [shared, first, second]
    finish(sweep, shared.key)
    finish(sweep, first.key)
    assert to_start(sweep, {}, False) == [second]
    records.write_record(sweep, second.key, records.Record(records.FAILED, "rl", 1, "it broke"))
    assert to_start(sweep, {}, False) == [] and to_start(sweep, {}, True) == [second]
    assert records.error_of(sweep, sweep.runs[1]) == "it broke"
    forget_failures(sweep, [second])
    assert records.run_state(sweep, sweep.runs[1]) == records.WAITING


def test_a_failed_shared_stage_fails_all_that_need_it_and_one_word_starts_them_again(base: list[str]) -> None:
    sweep = made(base, "rl.depth_penalty.weight=0,1", "teacher=null", last="rl")
    shared = sweep.tasks[0]
    records.write_record(sweep, shared.key, records.Record(records.FAILED, "traces", 1, "no memory"))
    assert [records.run_state(sweep, run) for run in sweep.runs] == ["failed", "failed"]
    assert records.error_of(sweep, sweep.runs[1]) == f"{shared.key}, which it needs: no memory"
    assert to_start(sweep, {}, False) == [] and to_start(sweep, {}, True) == sweep.tasks


def test_a_task_is_running_while_its_process_lives(base: list[str]) -> None:
    sweep = made(base, "rl.depth_penalty.weight=0,1", "teacher=null", last="rl")
    task, record = sweep.tasks[1], records.Record(records.RUNNING, "rl")
    records.own(record)
    records.write_record(sweep, task.key, record)
    assert records.task_state(sweep, task) == records.RUNNING and task not in to_start(sweep, {}, True)
    # The number lives, but it is another process.
    record.process = "1"
    records.write_record(sweep, task.key, record)
    assert records.task_state(sweep, task) == records.KILLED and task in to_start(sweep, {}, False)
    # On another machine only its writing tells.
    record.host, record.process = "elsewhere", process_start(os.getpid()) or ""
    records.write_record(sweep, task.key, record)
    assert socket.gethostname() != "elsewhere" and records.task_state(sweep, task) == records.RUNNING
    os.utime(records.record_path(sweep, task.key), (1, 1))
    assert records.task_state(sweep, task) == records.KILLED


def test_what_slurm_has_in_its_queue_is_left_to_it(base: list[str]) -> None:
    sweep = made(base, "rl.depth_penalty.weight=0,1", "teacher=null", last="rl")
    _, first, second = sweep.tasks
    queue = {first.key: "PENDING", second.key: "RUNNING"}
    assert to_start(sweep, queue, True) == [sweep.tasks[0]]
    assert records.task_state(sweep, first, queue) == records.QUEUED
    assert "queued" in status_table(sweep, queue)


def test_what_slurm_has_ended_is_dead_at_once(base: list[str]) -> None:
    """A task of a node that nobody can look at, written a moment ago: alive, unless Slurm says that its job is gone."""
    sweep = made(base, "rl.depth_penalty.weight=0,1", "teacher=null", last="rl")
    _, first, second = sweep.tasks
    for task in (first, second):
        record = records.Record(records.RUNNING, "rl", host="elsewhere", job="12_3")
        records.write_record(sweep, task.key, record)
    queue = {first.key: records.GONE}
    assert records.task_state(sweep, first, queue) == records.KILLED and first in to_start(sweep, queue, False)
    assert records.task_state(sweep, second, queue) == records.RUNNING and second not in to_start(sweep, queue, True)
    assert own_job({"SLURM_JOB_ID": "15", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}) == "12_3"
    assert own_job({"SLURM_JOB_ID": "15"}) == "15" and own_job({}) == ""


def test_what_is_not_started_is_said_with_the_reason(base: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = made(base, "rl.depth_penalty.weight=0.0,0.1,0.2,0.3,0.4", "teacher=null", last="rl")
    shared, silent, fresh, waiting, failed, *rest = sweep.tasks
    finish(sweep, shared.key)
    for task, age in ((silent, 50), (fresh, 2)):
        records.write_record(sweep, task.key, records.Record(records.RUNNING, "rl", host="elsewhere", job="12_3"))
        then = time.time() - age
        os.utime(records.record_path(sweep, task.key), (then, then))
    records.write_record(sweep, failed.key, records.Record(records.FAILED, "rl", 1, "it broke"))
    records.note_submitted(sweep, {waiting.key: "12_4"})
    queue = {waiting.key: "COMPLETING"}
    tasks = to_start(sweep, queue, False)
    assert tasks == rest
    one, two, three, four = left_out(sweep, [task for task in sweep.tasks if task not in tasks], queue)
    assert re.search(
        r"0\.0: running on elsewhere as job 12_3, silent for 5\d s; taken for dead after [67]\d s more", one
    )
    assert re.search(r"running on elsewhere as job 12_3, written \d s ago", two)
    assert three.endswith("rl.depth_penalty.weight=0.2: Slurm has it as job 12_4 (COMPLETING)")
    assert four == "1 task(s) that failed or need one that did; --retry-failed starts them"
    monkeypatch.setattr(status, "MOST_LISTED", 3)
    pending = {task.key: "PENDING" for task in sweep.tasks}
    assert left_out(sweep, sweep.tasks, pending)[3:] == ["2 more like these"]


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
    base = [*base, "teacher=null"]
    small = placed(resolve(from_settings([*base, "rl.depth_penalty.weight=0"]), "rl", check), False)
    records.save(small)
    # Alone, the run was one task; with another they part after calibration.
    assert [[stage for stage, _ in task.stages] for task in small.tasks] == [["traces", "calibrate", "rl"]]
    finish(small, small.tasks[0].key)
    records.write_record(small, small.tasks[0].key, records.Record(records.FINISHED, "rl", starts=1, seconds=7.0))
    larger = placed(resolve(from_settings([*base, "rl.depth_penalty.weight=0,1", "seed=0,1"]), "rl", check), False)
    records.save(larger)
    assert larger.directory == small.directory and records.find_sweep("t", tmp_path / "runs") == larger
    # What was done is done: traces and one calibration are shared, one run is finished.
    assert records.run_state(larger, larger.runs[0]) == records.FINISHED
    assert records.read_record(larger, larger.runs[0].tasks[-1]).seconds == 7.0
    todo = [[stage for stage, _ in task.stages] for task in to_start(larger, {}, False)]
    assert todo == [["calibrate"], ["rl"], ["rl"], ["rl"]]
    # The first grid again is a part of it: nothing is left to do of it, and nothing is forgotten.
    lines = plan_of([*base, "rl.depth_penalty.weight=0"], capsys)
    assert lines[0] == f"{small.directory}: 4 run(s), 7 task(s), 0 to start"
    again = placed(resolve(from_settings([*base, "rl.depth_penalty.weight=0"]), "rl", check), False)
    assert [(run.id, run.settings) for run in again.runs] == [(run.id, run.settings) for run in larger.runs]
    # Another part: only what was asked for starts.
    lines = plan_of([*base, "rl.depth_penalty.weight=1", "seed=1"], capsys)
    assert lines[0].endswith("2 to start") and sum(line.startswith("  start ") for line in lines) == 2


@pytest.mark.usefixtures("no_weights")
def test_points_are_added_by_extend_and_by_nothing_else(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [*base, "teacher=null"]
    sweep = made(base, "rl.depth_penalty.weight=0,1", last="rl")
    with pytest.raises(
        ValueError, match=r"has a sweep of 2 run\(s\) up to rl, and none of these points are its: --ext"
    ):
        main([*base, "rl.depth_penalty.weight=2", "--last", "rl"])
    with pytest.raises(ValueError, match="and not all of these points"):
        main([*base, "rl.depth_penalty.weight=1,2", "--last", "rl"])
    with pytest.raises(ValueError, match="has no sweep up to evaluate yet"):
        main([*base, "rl.depth_penalty.weight=2", "--extend"])
    assert records.find_sweep("t", tmp_path / "runs") == sweep
    lines = plan_of([*base, "rl.depth_penalty.weight=2,3", "rl.steps=5", "--extend"], capsys)
    assert lines[0] == f"{sweep.directory}: 4 run(s), 5 task(s), 3 to start"
    grown = placed(
        resolve(from_settings([*base, "rl.depth_penalty.weight=2", "task.families=[sum],[sum,word]"]), "rl", check),
        True,
    )
    records.save(grown)
    assert records.find_sweep("t", tmp_path / "runs") == grown and len(grown.runs) == 4
    # What only one of the grids varies has its value in every row.
    table = rows(grown)
    assert [row["rl.depth_penalty.weight"] for row in table] == [0, 1, 2, 2]
    defaults = str(load(base).task.families)
    assert [row["task.families"] for row in table] == [defaults, defaults, "['sum']", "['sum', 'word']"]


def test_of_two_sweeps_of_a_name_one_with_all_runs_counts(base: list[str], tmp_path: Path) -> None:
    """As they were left by versions that made a new one for every grid."""
    made(base, "rl.depth_penalty.weight=0,1")
    both = made(base, "rl.depth_penalty.weight=0,1,2")
    assert records.find_sweep("t", tmp_path / "runs") == both


# ---- what is collected ----

EVALUATED = {
    "meta": {"prompt_tokens": 10.0},
    "rows": [
        {"model": "teacher", "exits": "full depth", "n": 2, "accuracy": 1.0, "low": 0.3, "high": 1.0,
         "mean_depth": 1.0, "total_depth": 30.0, "length": 5.0, "kl": None},
        {"model": "reinforced", "exits": "full depth", "n": 2, "accuracy": 1.0, "low": 0.3, "high": 1.0,
         "mean_depth": 1.0, "total_depth": 30.0, "length": 5.0, "kl": 0.1},
        {"model": "reinforced", "exits": "hazard > 0.5", "n": 2, "accuracy": 0.5, "low": 0.1, "high": 0.9,
         "mean_depth": 0.6, "total_depth": 18.0, "length": 5.0, "kl": 0.2},
    ],
    "exit_histogram": {"reinforced, hazard > 0.5": {"2": 4, "4": 2, "6": 4}},
}  # fmt: skip
STEP = {"step": 1, "reward": 0.5, "task_reward": 0.75, "accuracy": 0.5, "mean_depth": 0.75, "total_depth": 22.0,
        "length": 5.0, "prompt_length": 10.0, "tokens": 40.0, "exit_share/2": 0.25, "exit_share/6": 0.75}  # fmt: skip


def results_of(sweep: Sweep, run_index: int, reward: float) -> None:
    run = sweep.runs[run_index]
    for key in run.tasks:
        finish(sweep, key)
    names = {stage: name for key in run.tasks for stage, name in sweep.task(key).stages}
    (records.stage_path(sweep, names["evaluate"]) / "results.json").write_text(json.dumps(EVALUATED))
    lines = [json.dumps({**STEP, "step": step, "reward": reward}) for step in (1, 2)]
    (records.stage_path(sweep, names["rl"]) / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (records.stage_path(sweep, names["rl"]) / "spent.json").write_text('{"seconds": 7, "device_seconds": 14}')


def test_the_table_is_made_of_result_files_and_the_same_to_the_byte(base: list[str]) -> None:
    settings = [*base, "rl.prompts_per_step=4", "rl.group_size=2"]
    sweep = made(settings, "rl.depth_penalty.weight=0,0.5,1", "task.families=[sum],[sum,word]")
    results_of(sweep, 0, 0.25)
    write_missing_results(sweep)
    own = sweep.runs[1].tasks[-1]
    records.write_record(sweep, own, records.Record(records.FAILED, "rl", 1, 'a "quoted", comma'))
    paths = collect(sweep)
    first = [path.read_bytes() for path in paths]
    # Nothing but the result file is looked at: what the stages left may be gone, and clocks don't count.
    for file in records.stage_path(sweep, sweep.task(sweep.runs[0].tasks[-1]).stages[0][1]).glob("metrics*"):
        file.unlink()
    records.write_record(sweep, sweep.runs[2].tasks[-1], records.Record(records.STOPPED, "rl", 85, seconds=3.0))
    assert [path.read_bytes() for path in collect(sweep)] == first

    table = list(csv.DictReader(io.StringIO(first[0].decode())))
    assert len(table) == 6 and [row["status"] for row in table[:3]] == ["finished", "failed", "unfinished"]
    row = table[0]
    assert (row["run"], row["rl.depth_penalty.weight"], row["task.families"]) == (sweep.runs[0].id, "0", "['sum']")
    assert row["policy"] == "reinforced" and row["exits"].startswith("hazard")
    assert (row["accuracy"], row["mean_depth"], row["total_depth"], row["kl"]) == ("0.5", "0.6", "18.0", "0.2")
    assert (row["accuracy_full"], row["accuracy_teacher"], row["tokens"], row["reward"]) == ("1.0", "1.0", "80", "0.25")
    assert (row["seconds_rl"], row["device_seconds_rl"], row["seconds_all_stages"]) == ("7", "14", "")
    assert table[1]["error"] == 'a "quoted", comma' and table[1]["accuracy"] == ""
    parquet = pq.read_table(paths[1])
    assert parquet.column_names == columns(rows(sweep)) and parquet.num_rows == 6
    assert parquet.column("rl.depth_penalty.weight").to_pylist() == [0, 0, 0.5, 0.5, 1, 1]
    assert parquet.column("accuracy").to_pylist()[0] == 0.5 and parquet.column("tokens").to_pylist()[1] is None
    assert "1 finished" in status_table(sweep, {}) and 'a "quoted"' in status_table(sweep, {})


def test_a_run_that_is_unfinished_again_has_no_figures_in_the_table(base: list[str]) -> None:
    """Its result file is still there, but somebody has removed a stage since."""
    sweep = made(base, "rl.depth_penalty.weight=0,1")
    results_of(sweep, 0, 0.25)
    write_missing_results(sweep)
    assert rows(sweep)[0]["reward"] == 0.25
    stage = dict(sweep.task(sweep.runs[0].tasks[-1]).stages)["rl"]
    (records.stage_path(sweep, stage) / "DONE").unlink()
    assert records.read_result(sweep, sweep.runs[0].id) is not None
    again, never = rows(sweep)
    assert again["status"] == "unfinished" and again.keys() == never.keys() and again["error"] == ""


def test_floats_in_the_table_read_back_exactly() -> None:
    values = [0.1 + 0.2, 1e-300, 12345678.123456789]
    text = to_csv([{"x": value} for value in values], ["x"])
    assert [float(line) for line in text.splitlines()[1:]] == values


def test_flops_follow_the_exits_that_were_counted(base: list[str]) -> None:
    """By hand for a tiny model, and never said twice: the plan's own arithmetic at the counted shares."""
    cfg = load([*base, "adapter.rank=4", "rl.prompts_per_step=4", "rl.group_size=2"])
    dims = read_dims(cfg)
    layout = one_rank(cfg, dims)
    # 2 answers of 5 tokens; the first of each comes with the prompt and is counted at full depth.
    load_ = workload(layout, {2: 4, 4: 2, 6: 4}, 10.0, 5.0, 2)
    assert load_.shares == (0.5, 0.25, 0.25) and load_.outcomes == (2, 4, 6)
    run_layers = [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    linears = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96
    span = 10 + 2.5
    each = sum(share * (2 * linears + 4 * 64 * span) + (1 - share) * 2 * 2 * 32 * 64 for share in run_layers)
    gates = sum(share * 2 * 2 * 64 * (64 + 1) for share in (1.0, 0.5))
    by_hand = 4 * (each + gates + 2 * 130 * 64)
    assert decode_cost(layout, load_) == pytest.approx(by_hand, rel=1e-12)
    assert decode_cost(layout, load_) < decode_cost(layout, workload(layout, {6: 10}, 10.0, 5.0, 2))
    # Where first tokens may exit all of them count, and cost what any other does.
    early = one_rank(load([*base, "adapter.rank=4", "exits.first_token=true"]), dims)
    counted = workload(early, {2: 5, 4: 2.5, 6: 2.5}, 10.0, 5.0, 2)
    assert counted.shares == load_.shares and decode_cost(early, counted) == pytest.approx(by_hand / 4 * 5, rel=1e-12)

    shallow = [{**STEP, "exit_share/2": 0.75, "exit_share/6": 0.25}]
    assert reinforced(shallow, cfg, layout)["flops_rl"] < reinforced([STEP], cfg, layout)["flops_rl"]
    twice = reinforced([STEP, {**STEP, "step": 2}], cfg, layout)
    assert twice["flops_rl"] == pytest.approx(2 * reinforced([STEP], cfg, layout)["flops_rl"])


def test_flops_do_not_depend_on_who_shares_the_work(base: list[str], tmp_path: Path) -> None:
    def total(*settings: str) -> float:
        cfg = load([*base, "rl.prompts_per_step=8", *settings])
        return reinforced([{**STEP, "tokens": 160.0}], cfg, one_rank(cfg, read_dims(cfg)))["flops_rl"]

    assert total() == total("parallel.pipeline=2", "parallel.tensor=2", "parallel.data=2")


def test_an_exact_divergence_runs_the_reference_with_the_update_and_reads_it_out(base: list[str]) -> None:
    """In what a run cost and in what a budget buys of it."""

    def phases(*settings: str) -> dict[str, float]:
        cfg = load([*base, "rl.prompts_per_step=8", "rl.group_size=1", *settings])
        return reinforced([STEP], cfg, one_rank(cfg, read_dims(cfg)))

    plain, exact, again = (
        phases(),
        phases("rl.kl_penalty.kind=exact"),
        phases("rl.kl_penalty.kind=exact", "rl.epochs=2"),
    )
    prompt, answer = round(STEP["prompt_length"]), STEP["length"]
    head, positions = 2 * 8 * answer * 130 * 64, prompt + answer - 1
    linears = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 96
    reference = 8 * 6 * (2 * positions * linears + 4 * 64 * positions * (positions + 1) / 2) + head
    # The policy's distribution and the way back through it are there for the likelihood.
    assert exact["flops_update"] - plain["flops_update"] == pytest.approx(reference)
    assert plain["flops_scoring"] - exact["flops_scoring"] == pytest.approx(reference)
    assert again["flops_update"] == pytest.approx(2 * exact["flops_update"])
    assert phases("rl.kl_penalty.kind=exact", "rl.minibatches=2")["flops_update"] == pytest.approx(
        exact["flops_update"]
    )
    how = IsoFlop("rl.steps", 10, 16)
    # With every epoch anew: in one it costs what the reference's scores do.
    cfg, dear = (
        load([*base, "adapter.rank=4", "rl.epochs=2", f"rl.kl_penalty.kind={kl}"]) for kl in ("reward", "exact")
    )
    assert int(buy(dear, read_dims(cfg), 1e13, how).text) < int(buy(cfg, read_dims(cfg), 1e13, how).text)


def test_parameters_are_counted_by_kind(base: list[str], tmp_path: Path) -> None:
    cfg = load([*base, "adapter.rank=4", "adapter.targets=attention"])
    row = measure(cfg, {})
    block = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64
    assert row["parameters_embedding"] == 130 * 64 and row["parameters_layers"] == 6 * block + 64
    assert row["parameters_adapters"] == 6 * 4 * (2 * (64 + 64) + 2 * (64 + 32))
    assert row["parameters_gates"] == 2 * (128 * 64 + 128 + 128 + 1)
    assert row["parameters_trained"] == row["parameters_adapters"] + row["parameters_gates"]


def test_a_choice_of_style_has_its_columns_by_the_runs_own_settings(base: list[str], tmp_path: Path) -> None:
    """Deepest tokens of 4 and 1 of 6 layers, half the teacher's share: ln 2 of beta buys the three layers between."""

    def of(layers: int) -> dict[str, float]:
        d = layers / 6
        depths = {"mean_depth": d, "total_depth": 3 * d, "max_depth": d, "square": d * d}
        return {"n": 2, "correct": 1.0, "length": 3.0, **depths}

    styles = {"terse": 2 / 3, "steps": 1 / 3}
    free = {**of(4), "share": {**styles, "other": 0.0}}
    model = {"families": {"hop2": {"hops": 2, "free": free, "forced": {"terse": of(4), "steps": of(1)}}}}
    models = {"teacher": model, "start": model}
    choice = {"styles": list(styles), "weights": [0.5, 0.5], "num_layers": 6, "models": models}
    (tmp_path / "results.json").write_text(json.dumps({**EVALUATED, "choice": choice}))
    cfg = load([*base, "rl.kl_penalty.weight=0.3", "rl.depth_penalty.cost_tokens=6"])
    row = measure(cfg, {"evaluate": tmp_path})
    assert row["share_terse_hop2"] == 2 / 3 and row["start_layers_terse_hop2"] == 4.0 == row["layers_terse_hop2"]
    assert row["start_price_max_hop2"] == pytest.approx(0.3 * math.log(2) / 0.5)
    assert row["start_price_total_hop2"] == pytest.approx(0.3 * math.log(2) / (1.5 / 6))
    del models["start"]
    (tmp_path / "results.json").write_text(json.dumps({**EVALUATED, "choice": choice}))
    assert not [name for name in measure(cfg, {"evaluate": tmp_path}) if name.startswith("start_")]


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


# ---- budgets ----


@pytest.mark.parametrize("setting", ["rl.steps", "calibrate.epochs", "pretrain.steps"])
def test_a_budget_buys_the_nearest_number_of_updates(setting: str, base: list[str]) -> None:
    cfg = load(base)
    how = IsoFlop(set=setting, prompt_tokens=20, answer_tokens=16)
    one = buy(cfg, read_dims(cfg), 1e11, how)
    assert abs(one.flops - 1e11) < 0.2e11
    ten = buy(cfg, read_dims(cfg), 1e12, how)
    assert ten.flops == pytest.approx(1e12, rel=0.05) and ten.tokens == pytest.approx(10 * one.tokens, rel=0.2)
    with pytest.raises(ValueError, match=r"budget=1000: less than half of one"):
        buy(cfg, read_dims(cfg), 1e3, how)


def test_the_student_is_scored_once_whether_its_gates_or_the_reach_ask_for_it(base: list[str]) -> None:
    how = IsoFlop(set="calibrate.epochs", prompt_tokens=20, answer_tokens=16)

    def bought(*settings: str) -> float:
        cfg = load([*base, "calibrate.depth_power=1.5", *settings])
        return float(buy(cfg, read_dims(cfg), 1e13, how).text)

    reach, current = "calibrate.kl_scale=1", "calibrate.gate_targets=current"
    once = bought(reach, "calibrate.gate_targets=sampled")
    assert once == bought(current) == bought(reach, current) < bought("calibrate.gate_targets=sampled")


def test_an_isoflop_grid_gives_larger_models_fewer_steps(base: list[str], tmp_path: Path) -> None:
    (tmp_path / "wide").mkdir()
    wide = {**TINY, "hidden_size": 128, "intermediate_size": 192}
    (tmp_path / "wide" / "config.json").write_text(json.dumps(wide))
    rest = [text for text in base if not text.startswith("model.path")]
    sweep = made(rest, f"model.path={tmp_path}/model,{tmp_path}/wide", "budget=1e12,1e13", last="rl")
    steps = [run.settings["rl.steps"] for run in sweep.runs]
    assert steps[0] > steps[2] and steps[1] == pytest.approx(10 * steps[0], rel=0.1)
    for run in sweep.runs:
        assert load(run.overrides).rl.steps == run.settings["rl.steps"]
        assert run.settings["budget_flops"] == pytest.approx(run.settings["budget"], rel=0.2)
    with pytest.raises(Faults, match="raise it"):
        made(base, "budget=1,2")


# ---- executors ----


def test_time_limits_are_read_as_slurm_reads_them() -> None:
    found = {text: minutes_of(text) for text in ("90", "2:30", "1:30:00", "1-12", "1-12:30")}
    assert found == {"90": 90, "2:30": 3, "1:30:00": 90, "1-12": 2160, "1-12:30": 2190}
    with pytest.raises(ValueError, match="--slurm time=soon"):
        minutes_of("soon")


def test_a_sweeps_jobs_ask_for_what_the_job_scripts_ask_for_and_the_site_says(
    base: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = made([*base, "cluster.gpus_per_node=4"], "rl.depth_penalty.weight=0,1").tasks
    monkeypatch.delenv("EE_SBATCH", raising=False)
    asked = asked_for(tasks, {})
    lines = (Path(__file__).parents[2] / "slurm" / "rl_7b.sh").read_text()
    for key in ("cpus-per-task", "mem"):
        assert f"#SBATCH --{key}={asked[key]}\n" in lines
    assert (asked["nodes"], asked["ntasks-per-node"], asked["gpus-per-node"]) == ("1", "4", "4")
    monkeypatch.setenv("EE_SBATCH", "--cpus-per-task=12 --mem=900G --gres=gpu:h100:4 --exclusive")
    site = asked_for(tasks, {})
    assert (site["cpus-per-task"], site["mem"], site["gres"], site["exclusive"]) == ("12", "900G", "gpu:h100:4", "")
    assert "gpus-per-node" not in site
    own = asked_for(tasks, {"cpus-per-gpu": "6", "mem-per-gpu": "80G"})
    assert own["cpus-per-gpu"] == "6" and own["mem-per-gpu"] == "80G" and not {"cpus-per-task", "mem"} & own.keys()
    assert "--cpus-per-task=12 --mem=900G --gres=gpu:h100:4 --exclusive" in " ".join(
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
        executor = _executor(sweep, sweep.tasks[-2:], {"time": "90", **options}, 2, 3, "afterany:7")
        return executor._make_submission_file_text("command", "id").splitlines()

    lines = script()
    for option in ("cpus-per-task=8", "mem=0", "gpus-per-node=4", "nodes=1", "exclusive", "requeue", "time=90",
                   "ntasks-per-node=4", "dependency=afterany:7", "signal=B:USR2@300"):  # fmt: skip
        assert f"#SBATCH --{option}" in lines, (option, lines)
    assert not any("wckey" in line for line in lines)
    assert "#SBATCH --wckey=physics" in script(wckey="physics")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("-p gpu", r"'-p': expected options of sbatch as --option=value"),
        ("--comment='a", "No closing quotation; expected options of sbatch"),
        ("--mem-per-gpu=80G", "the job scripts say --mem, beside which sbatch refuses it"),
        ("--cpus-per-gpu=4", "the job scripts say --cpus-per-task"),
        ("--nodes=2", "follows from the settings"),
    ],
)
def test_a_sites_options_that_no_job_could_take_are_named(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=f"EE_SBATCH: .*{says}"):
        site_options({"EE_SBATCH": text})


def test_devices_are_shared_out_among_slots() -> None:
    assert (
        visible_devices({"CUDA_VISIBLE_DEVICES": "2,3"}) == ["2", "3"]
        and visible_devices({"CUDA_VISIBLE_DEVICES": ""}) == []
    )
    assert split_devices(["0", "1", "2", "3"], 2) == ["0,1", "2,3"]
    assert split_devices(["0", "1"], 4) == ["0", "1", "0", "1"]
    assert split_devices(["0", "1"], 1) == [] and split_devices([], 4) == []
