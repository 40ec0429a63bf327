"""The ranks of one machine: one line at the end whatever goes wrong, the rest in logs; none outlives the others."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ee_megatron.config.load import load
from ee_megatron.training import launch
from ee_megatron.training.ranks import Forked, run_ranks
from tests.processes import start

ROOT = Path(__file__).parents[2]
# What a rank does, by its number.
RANK = """
import os, sys, time, traceback
rank = os.environ["RANK"]
print("rank", rank, "of", os.environ["WORLD_SIZE"], "speaks", flush=True)
print("noise of rank", rank, file=sys.stderr, flush=True)
{body}
"""
WAITS = "open(f'{sys.argv[1]}/here-{rank}', 'w').write(str(os.getpid()))\ntime.sleep(60)"


def run(body: str, logs: Path) -> int:
    """The exit code of three ranks."""
    return run_ranks([sys.executable, "-c", RANK.format(body=body), str(logs.parent)], 3, logs, dict(os.environ))


def test_all_end_well_and_only_the_leader_is_heard(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("", tmp_path / "ranks") == 0
    said = capfd.readouterr()
    assert said.out == "rank 0 of 3 speaks\n" and said.err == ""
    logs = [(tmp_path / "ranks" / f"rank-{rank}.log").read_text() for rank in range(3)]
    assert all(f"noise of rank {rank}" in log for rank, log in enumerate(logs)) and "rank 2 of 3 speaks" in logs[2]


FAILS = """
if rank == "1":
    try: 1 / 0
    except ZeroDivisionError: traceback.print_exc()
    sys.exit(print("error: rank 1 of 3: it broke", file=sys.stderr) or 1)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        (FAILS, 1, "error: rank 1 of 3: it broke .*{logs}/rank-1.log"),
        ("sys.exit(print('error: bad input', file=sys.stderr) or 2)", 2, "error: bad input"),
        ("if rank == '2': os.kill(os.getpid(), 9)\ntime.sleep(60)", 137,
         "error: rank 2 of 3: .*SIGKILL.*{logs}/rank-2.log"),
        ("if rank == '0': sys.exit(7)\ntime.sleep(60)", 7,
         r"error: rank 0 of 3: .*\b7\b.*{logs}/rank-0.log"),
    ],
)  # fmt: skip
def test_the_reason_is_the_last_and_only_line(
    body: str, code: int, line: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    begun, logs = time.monotonic(), tmp_path / "ranks"
    assert run(body, logs) == code
    err = capfd.readouterr().err
    assert re.match(line.format(logs=logs), err) and err.count("\n") == 1 and time.monotonic() - begun < 50
    if "1 / 0" in body:
        assert "ZeroDivisionError" in (logs / "rank-1.log").read_text()


LAUNCHER = """
import os, sys
from pathlib import Path
from ee_megatron import cli
from ee_megatron.training.ranks import run_ranks
command = [sys.executable, "-c", sys.argv[1], sys.argv[2]]
sys.exit(cli._guarded(lambda: run_ranks(command, 2, Path(sys.argv[2]) / "ranks", dict(os.environ))))
"""


@pytest.mark.parametrize(("number", "code", "said"), [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "")])
def test_a_signal_ends_all_of_them_without_a_word(number: signal.Signals, code: int, said: str, tmp_path: Path) -> None:
    """The whole group gets it, as from a terminal."""
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, RANK.format(body=WAITS), str(tmp_path)], stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while len(started := [path for path in tmp_path.glob("here-*") if path.read_text()]) < 2:
            assert time.monotonic() < deadline and launcher.poll() is None
            time.sleep(0.05)
        children = [int(path.read_text()) for path in started]
        if number == signal.SIGINT:
            os.killpg(launcher.pid, number)
        else:
            launcher.send_signal(number)
        assert launcher.communicate(timeout=60)[1] == said and launcher.returncode == code
        assert not any(Path(f"/proc/{child}").exists() for child in children)
    finally:
        launcher.kill()
        launcher.wait()


def fork(folder: Path) -> None:
    """In a process that may: two commands side by side, one with a faulty variable."""
    children = []
    for name in ("one", "two"):
        environment = {**os.environ, "RANK": "x" if name == "two" else "0"}
        with (folder / name).open("w") as log:
            children.append(Forked(["rl", "experiment=nothing"], environment, stdout=log, stderr=log))
    (folder / "codes").write_text(" ".join(str(child.wait(60)) for child in children))
    killed = Forked(["--help"], os.environ, before=lambda: time.sleep(60))
    killed.kill()
    (folder / "killed").write_text(str(killed.wait(60)))


def test_a_forked_command_has_an_environment_streams_and_an_end_of_its_own(tmp_path: Path) -> None:
    process = start(fork, tmp_path)
    process.join(200)
    assert process.exitcode == 0 and (tmp_path / "codes").read_text() == "2 2"
    assert "experiment=nothing" in (tmp_path / "one").read_text()
    assert (tmp_path / "two").read_text().startswith("error: RANK='x'")
    assert int((tmp_path / "killed").read_text()) == -signal.SIGKILL


def test_nothing_is_forked_for_gpus_or_where_threads_may_have_started(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = []
    monkeypatch.setattr(launch, "import_ahead", lambda: imported.append(1))
    assert launch.may_fork(load(["experiment=demo_cpu"])) and imported
    assert not launch.may_fork(load(["experiment=demo_cpu", "device=cuda"]))
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    assert not launch.may_fork(load(["experiment=demo_cpu"])) and len(imported) == 1
