"""What ranks do while their leader works alone, for longer than any collective may take."""

from __future__ import annotations

import os
import signal
import threading
import time

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from ee_megatron.config.load import load
from ee_megatron.exit_rules import Off
from ee_megatron.parallel import groups
from ee_megatron.parallel.groups import Degrees
from ee_megatron.parallel.heartbeat import Heartbeat
from ee_megatron.rollout import GenerationRequest, SamplingParams
from ee_megatron.training.context import StageContext
from ee_megatron.types import Prompt

PROMPTS = [Prompt(id=f"p{i}", text=f"Question: {i} + 1\nAnswer:", answer="", task="") for i in range(4)]


def ready() -> None:
    """Everything is imported."""


def join(port: int, timeout_s: float) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    groups.initialise(Degrees(data=2), timeout_s=timeout_s)


def slow_actor(settings: list[str], port: int, asleep_s: float) -> tuple[int, float]:
    """(answers, seconds waited) of a stage whose only actor is stopped for so long in the middle of its call."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    cfg = load(settings)
    with StageContext(cfg, "rl", cfg.model.path, learner=True) as context:
        pool = context.make_pool(None) if context.leads else None

        def act():
            pool.load(None)
            (process,) = pool.health()["pids"]
            os.kill(process, signal.SIGSTOP)
            threading.Timer(asleep_s, os.kill, (process, signal.SIGCONT)).start()
            return pool.generate(GenerationRequest(PROMPTS, 1, SamplingParams(1.0, 8), Off(), 0))

        begun = time.monotonic()
        answers = context.ranks.broadcast_from_rank0(act if context.leads else None)
        waited = time.monotonic() - begun
        context.stop_if_requested(None, 0)
        return len(answers), waited


def frozen_leader(port: int, silence_s: float) -> tuple[str, float]:
    """(what is said, seconds) where the leader, and with it the store, stops in its work. The other rank wakes it."""
    join(port, 60)
    heartbeat, store = Heartbeat(silence_s), dist.distributed_c10d._get_default_store()
    said, begun = "", time.monotonic()
    if dist.get_rank() == 0:
        store.set("process", str(os.getpid()))
        store.wait(["there"])
        os.kill(os.getpid(), signal.SIGSTOP)
        heartbeat.meet()
        store.wait(["heard"])
    else:
        leader = int(store.get("process"))
        store.set("there", "")
        try:
            heartbeat.meet()
        except RuntimeError as error:
            said = str(error)
        waited = time.monotonic() - begun
        os.kill(leader, signal.SIGCONT)
        store.set("heard", "")
    heartbeat.close()
    groups.finish()
    return said, waited if said else 0.0


def leader_leaves_last(settings: list[str], port: int, asleep_s: float) -> float:
    """Seconds that the end of a stage takes, where rank 1 still needs the store for `asleep_s`."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    cfg = load(settings)
    with StageContext(cfg, "rl", cfg.model.path, learner=True) as context:
        context.ranks.heartbeat.meet()
        begun = time.monotonic()
        if dist.get_rank() > 0:
            time.sleep(asleep_s)
    return time.monotonic() - begun


def group_deadline(port: int, timeout_s: float) -> float:
    """Seconds that a collective of a part of the ranks may take."""
    join(port, timeout_s)
    try:
        group = parallel_state.get_data_parallel_group()
        return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    finally:
        groups.finish()
