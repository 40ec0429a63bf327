"""Verifier processes: a hung or dead one costs its own answer and nothing else."""

from __future__ import annotations

import os
import pickle
import re
import signal
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from ee_megatron.config.schema import TaskConfig
from ee_megatron.tasks import Task, Verdict, VerifierPool, make_task
from ee_megatron.types import Prompt

PROMPT = Prompt("p", "Question: 3 x 8?\nAnswer:", "24", "hostile")


@dataclass
class HostileTask(Task):
    """Does what the answer says."""

    name: str = "hostile"
    broken: bool = False

    def __getstate__(self) -> dict:
        return self.__dict__

    def warm_up(self) -> None:
        if self.broken:
            raise OSError("no calculator here")

    def verify(self, prompt: Prompt, text: str) -> Verdict:
        if text == "sleep":
            time.sleep(3600)
        if text == "spin":
            # The regex engine holds the interpreter lock: no signal handler and no thread of Python's gets a turn.
            re.match(r"(a+)+b", "a" * 64)
        if text == "eat":
            hoard = []
            while True:
                hoard.append(b"x" * (16 << 20))
        if text == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if text == "raise":
            raise KeyError("what?")
        if text.startswith("run "):
            exec(text.removeprefix("run "))
        if text == "print":
            print("noise" * 1000)
        return Verdict(text == prompt.answer, True, True)


def test_hung_and_dead_verifiers_are_replaced_within_the_deadline_and_the_rest_is_answered_in_order() -> None:
    texts = ["24", "sleep", "23", "die", "24", "spin", "print", "24"] + ["24", "23"] * 20
    with VerifierPool(HostileTask(), workers=2, deadline_s=1.0) as pool:
        pool.verify_many([(PROMPT, "24")])
        begun = time.monotonic()
        verdicts = pool.verify_many([(PROMPT, text) for text in texts])
        took = time.monotonic() - begun
        assert pool.timeouts == 3
        again = pool.verify_many([(PROMPT, "24")] * 4)
    bad = {"sleep", "die", "spin"}
    assert [v.timed_out for v in verdicts] == [text in bad for text in texts]
    assert [v.correct for v in verdicts] == [text == "24" for text in texts]
    assert all(v.correct for v in again)
    # Two deadlines of a second on two workers, and three starts.
    assert took < 10


def test_a_verifier_that_eats_memory_is_stopped_at_its_limit_and_the_step_ends_on_time() -> None:
    texts = ["24", "eat", "24", "eat", "sleep", "23"]
    with VerifierPool(HostileTask(), workers=2, deadline_s=5, memory_mb=256) as pool:
        pool.verify_many([(PROMPT, "24")])
        begun = time.monotonic()
        verdicts = pool.verify_many([(PROMPT, text) for text in texts])
        took = time.monotonic() - begun
        # A quarter of a gigabyte is filled long before the deadline: these failed on memory, not on time.
        assert (pool.failures, pool.timeouts) == (2, 1)
    assert [v.timed_out for v in verdicts] == [False, True, False, True, True, False]
    assert [v.correct for v in verdicts] == [True, False, True, False, False, False]
    assert took < 15


def test_an_exception_costs_one_verdict_and_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    with VerifierPool(HostileTask(), deadline_s=20) as pool:
        verdicts = pool.verify_many([(PROMPT, "raise"), (PROMPT, "24"), (PROMPT, "raise")])
        assert [v.timed_out for v in verdicts] == [True, False, True]
        assert (pool.failures, pool.timeouts) == (2, 0)
    assert caplog.text.count("KeyError") == 1


def test_an_answer_that_gets_itself_run_writes_no_file_and_starts_no_program(tmp_path: Path) -> None:
    marker = str(tmp_path / "touched")
    programs = [
        f"open({marker!r}, 'w')",
        f"import os; os.open({marker!r}, os.O_CREAT | os.O_WRONLY)",
        f"import os; os.system('touch {marker}')",
        f"import subprocess; subprocess.run(['touch', {marker!r}])",
        f"import pathlib; pathlib.Path({marker!r}).mkdir()",
        "import socket; socket.create_connection(('127.0.0.1', 9), timeout=1)",
        "import os; os.fork()",
    ]
    with VerifierPool(HostileTask(), deadline_s=20) as pool:
        verdicts = pool.verify_many([(PROMPT, f"run {program}") for program in programs])
        assert pool.failures == len(programs)
        # Reading is allowed: scorers load word lists.
        assert not pool.verify_many([(PROMPT, f"run open({__file__!r}).read()")])[0].timed_out
    assert all(verdict.timed_out for verdict in verdicts)
    assert not Path(marker).exists()


class Unpickled:
    """Makes a directory where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.timeout(120)
def test_what_an_answer_writes_to_the_pool_itself_costs_its_own_verdict_and_is_not_unpickled(tmp_path: Path) -> None:
    marker = tmp_path / "unpickled"
    hostile, refusal = pickle.dumps(Unpickled(marker)), pickle.dumps(("failed", "no"))
    lines = [b"failed 2 no", b"verdict 2 11000", b"verdict 9 1110", b"\xff"]
    wholes = [struct.pack("!i", len(hostile)) + hostile, struct.pack("!i", len(refusal)) + refusal]
    wholes += [b"x" * 9000, b"verdict 2 1110\n" * 2, *(line + b"\n" for line in lines)]
    # As much of a message as makes a reader wait for more, and a gigabyte announced.
    parts = [struct.pack("!i", 100), struct.pack("!i", 1 << 30), b"verdict 2 111"]
    write = "run import faulthandler, os, sys, time\nfaulthandler.cancel_dump_traceback_later()\n"
    write += "os.write(int(sys.argv[1]), {})\ntime.sleep({})"
    texts = [write.format(said, 0) for said in wholes] + [write.format(said, 3600) for said in parts]
    with VerifierPool(HostileTask(), deadline_s=1) as pool:
        # A process is replaced after each, so that each is its second answer.
        verdicts = pool.verify_many(
            [(PROMPT, text) for hostile in texts for text in ("24", hostile)] + [(PROMPT, "24")]
        )
        assert (pool.timeouts, pool.failures) == (len(texts), 0)
    assert [v.correct for v in verdicts] == [True, False] * len(texts) + [True]
    assert not marker.exists()


@pytest.mark.timeout(60)
def test_a_verifier_that_reads_no_more_costs_one_verdict() -> None:
    deaf = "run import pickle, time\npickle.load = lambda _: time.sleep(3600)"
    with VerifierPool(HostileTask(), deadline_s=1) as pool:
        # More than the connection's buffers hold.
        verdicts = pool.verify_many([(PROMPT, text) for text in (deaf, "x" * 2_000_000, "24")])
    assert [v.timed_out for v in verdicts] == [False, True, False] and verdicts[2].correct


def test_a_verifier_killed_from_outside_while_idle_is_replaced_without_losing_an_answer() -> None:
    with VerifierPool(HostileTask(), deadline_s=20) as pool:
        assert pool.verify_many([(PROMPT, "24")])[0].correct
        process = pool._idle[0].process
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        verdicts = pool.verify_many([(PROMPT, "24"), (PROMPT, "24")])
        assert [v.correct for v in verdicts] == [True, True]
        assert pool.timeouts == 0


def test_the_pool_gives_the_verdicts_of_the_task_itself_and_works_in_a_thread() -> None:
    task = make_task(TaskConfig("arithmetic", train=6))
    texts = (" The answer is {}", " {}1", "x" * 2_000_000)
    items = [(p, text.format(p.answer)) for p in task.prompts("train") for text in texts]
    got: list[Verdict] = []
    with VerifierPool(task, workers=2, deadline_s=20) as pool:
        thread = threading.Thread(target=lambda: got.extend(pool.verify_many(items)))
        thread.start()
        thread.join(60)
        assert pool.verify_many([]) == []
    assert got == [task.verify(p, text) for p, text in items]
    assert [v.reward for v in got[:3]] == [1.0, 0.0, -1.0]


def test_closing_ends_the_processes_and_a_closed_pool_says_so() -> None:
    pool = VerifierPool(HostileTask(), workers=2)
    processes = [worker.process for worker in pool._idle]
    pool.close()
    pool.close()
    assert all(process.poll() is not None for process in processes)
    with pytest.raises(RuntimeError, match="closed"):
        pool.verify_many([(PROMPT, "24")])


def test_a_task_that_cannot_start_and_bad_settings_are_errors() -> None:
    with (
        VerifierPool(HostileTask(broken=True)) as pool,
        pytest.raises(RuntimeError, match="can't start: OSError: no calculator here"),
    ):
        pool.verify_many([(PROMPT, "24")])
    with pytest.raises(ValueError, match="must be positive"):
        VerifierPool(HostileTask(), workers=0)
    with pytest.raises(ValueError, match="must be positive"):
        VerifierPool(HostileTask(), deadline_s=0)
    with pytest.raises(ValueError, match="memory_mb=-1"):
        VerifierPool(HostileTask(), memory_mb=-1)
