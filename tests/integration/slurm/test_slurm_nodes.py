"""Nodes that lack something: one line says what before anything starts, or the job works. And slurm/check.sh, which
looks at the nodes of a job."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

RL = ["sbatch", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "slurm/rl_7b.sh"]
CHECK = ["sbatch", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=2", "slurm/check.sh"]
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "VLLM_CACHE_ROOT", "XDG_CACHE_HOME")
# As Debian's installers write it.
LOOPBACK = "sed 's/^.* {0}$/127.0.1.1 {0}/' /etc/hosts > {1}\nmount --bind {1} /etc/hosts\n"
SMALL_SHM = "mount -t tmpfs -o size=64m tmpfs /dev/shm\n"
READ_ONLY_HOME = "mount --bind $HOME $HOME\nmount -o remount,bind,ro $HOME\n"
COMPILERS = {Path(found).resolve() for name in ("gcc", "clang", "cc") if (found := shutil.which(name))}
NO_COMPILER = "".join(f"mount --bind /dev/null {path}\n" for path in COMPILERS)


@contextlib.contextmanager
def differing(site, **setups: str) -> Iterator[None]:
    """Nodes that are started anew by these commands, and as they were afterwards."""
    for node, setup in setups.items():
        site.cluster.power_off(node)
        site.cluster.power_on(node, setup)
    try:
        yield
    finally:
        for node in setups:
            site.cluster.power_off(node)
            site.cluster.power_on(node)


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short path, because those of Ray's sockets are; where compilers keep their files is not decided yet."""
    for name in CACHES:
        monkeypatch.delenv(name, raising=False)
    with tempfile.TemporaryDirectory(prefix="ee", dir="/tmp") as folder:
        monkeypatch.setenv("EE_SCRATCH", folder)
        yield Path(folder)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("node", ["node1", "node2"])
def test_a_node_whose_name_is_a_loopback_address_is_named(node, site, tmp_path: Path):
    with differing(site, **{node: LOOPBACK.format(node, tmp_path / "hosts")}):
        job = site.submit([*RL, *site.rl("loopback")], "--nodelist=node1,node2")
        found = site.end(job, 60)
        assert found["JobState"] == "FAILED" and found["ExitCode"] == "2:0", site.everything(job)
        lines = [line for line in site.log(job).splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, lines
        assert all(part in lines[0] for part in (f"error: {node}: ", "127.0.1.1", "EE_INTERFACE")), lines
    assert not (site.folder / "runs" / "loopback").exists()


@pytest.mark.timeout(400)
def test_a_job_runs_without_compiler_writable_home_and_more_than_64_mb_of_shared_memory(site, scratch: Path):
    assert COMPILERS
    setup = SMALL_SHM + READ_ONLY_HOME + NO_COMPILER
    with differing(site, node1=setup, node2=setup):
        job = site.submit([*RL, *site.rl("poor", "rl.steps=2")], "--nodelist=node1,node2")
        assert site.end(job, 240)["JobState"] == "COMPLETED", site.everything(job)
        assert len(site.rows("poor")) == 2


VARIABLES = """#!/bin/bash
. slurm/common.sh || exit 2
prepare
srun --ntasks=1 bash -c 'touch ~/x && echo writable; gcc --version && echo compiles; env'
"""


@pytest.mark.timeout(120)
def test_what_is_compiled_is_kept_on_the_nodes_own_disk(site, scratch: Path):
    script = site.folder / "variables.sh"
    script.write_text(VARIABLES)
    with differing(site, node1=READ_ONLY_HOME + NO_COMPILER):
        job = site.submit(["sbatch", str(script)], "--nodelist=node1")
        assert site.end(job, 60)["JobState"] == "COMPLETED", site.everything(job)
        lines = site.log(job).splitlines()
    assert not {"writable", "compiles"} & {*lines}, lines
    caches = {name: value for name, _, value in (line.partition("=") for line in lines) if "CACHE" in name}
    assert all(caches.get(name, "").startswith(f"{scratch}/ee-cache-") for name in CACHES), caches


def checked(site, *options: str) -> tuple[dict[str, str], str]:
    """How a job of slurm/check.sh ended, and what it said."""
    job = site.submit([*CHECK, *options], "--nodelist=node1,node2")
    found = site.end(job, 300)
    log = site.log(job)
    for folder in re.findall(r"logs in (\S+)", log):
        shutil.rmtree(folder)
    site.no_strays()
    return found, log


@pytest.mark.timeout(400)
def test_the_nodes_of_a_job_are_looked_at_part_by_part(site, scratch: Path):
    ended, log = checked(site, "device=cpu")
    assert ended["JobState"] == "COMPLETED", log
    said = re.findall(r"passed  (\S+), \d+ s: (.*)", log)
    assert [name for name, _ in said] == ["nodes", "all-reduce", "Ray", "training"], log
    found = dict(said)
    assert re.match(r"node\d is 10\.77\.0\.\d; ", found["nodes"])
    assert re.match(r"4 ranks, 4 MiB at [\d.]+ GB/s", found["all-reduce"]), found
    assert found["Ray"].startswith("2 nodes, 64 MiB") and "loss" in found["training"], found


@pytest.mark.timeout(400)
def test_parts_that_fail_are_named_with_their_reason_and_the_others_run(site, scratch: Path):
    """No GPU is here, and nothing may be written on the second node's own disk."""
    with differing(site, node2=f"mount -t tmpfs -o ro tmpfs {scratch}\n"):
        ended, log = checked(site, "device=cuda")
    assert ended["JobState"] == "FAILED" and ended["ExitCode"] == "1:0", log
    failed = dict(re.findall(r"FAILED  (\S+), \d+ s: (.*)", log))
    assert list(failed) == ["nodes", "all-reduce", "Ray", "training"], log
    assert "error: failed: nodes all-reduce Ray training" in log.splitlines()
    assert str(scratch) in failed["nodes"] or "device=cuda" in failed["nodes"], log
    assert "error: node" in failed["all-reduce"], log
    assert "device=cuda" in failed["training"] and "1 of 2 Ray nodes joined" in failed["Ray"], log
