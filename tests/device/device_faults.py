"""Faults that work on a CPU and fail or crawl on a GPU, planted one at a time. Each must be caught by what it names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from device_cases import PATHS, Bench, on, patched
from device_costs import live_bytes, measure

from ee_megatron.learner import engine as learner_engine
from ee_megatron.learner import learner as learner_module
from ee_megatron.model import layer
from ee_megatron.model.packed import Active
from ee_megatron.parallel.vocabulary import Head
from ee_megatron.rollout.engine import cache, layer_backends, scoring
from ee_megatron.rollout.engine import decoder as decoder_module
from ee_megatron.rollout.engine.decoder import Decoder
from ee_megatron.rollout.engine.model_runner import ModelRunner, Prefiller


@dataclass(frozen=True)
class Fault:
    """`faulty(real)` stands in place of `owner.name`. Caught by `caught`: the text of an error of the path `where`, a
    count of the budget `where`, or "memory" that grows with `where`."""

    owner: Any
    name: str
    faulty: Callable[[Any], Any]
    where: str
    caught: str


DEVICE, NUMPY = "same device", "can't convert"
CPU = torch.device("cpu")


def _mask_on_the_cpu(real):
    return lambda rows: (torch.arange(rows.span) <= rows.positions.cpu()[:, None])[:, None, None]


def _tables_on_the_cpu(real):
    def reach(decoder, longest):
        real(decoder, longest)
        decoder._cos = decoder._cos.cpu()

    return reach


def _item_in_every_layer(real):
    def silu_mul(self, gate_up):
        assert float(gate_up.max()) < 1e9
        return real(self, gate_up)

    return silu_mul


def _copied_cache(real):
    return lambda self, fused, cache, *rest: cache.layers[0].clone() is None or real(self, fused, cache, *rest)


def _step_on_the_cpu(real):
    def state_of(state, parameter, updates=None):
        entry = real(state, parameter, updates)
        if updates is not None:
            entry["step"] = torch.tensor(float(updates))
        return entry

    return state_of


def _moments_on_the_cpu(real):
    def state_of(state, parameter, updates=None):
        entry = state[parameter]
        for kind in learner_engine.MOMENTS:
            entry.setdefault(kind, torch.zeros(parameter.shape))
        return real(state, parameter, updates)

    return state_of


def _labels_on_the_host(real):
    return lambda batches, device: [replace(real(batch, device), labels=batch.labels) for batch in batches]


def _asks_each_sequence(real):
    def init(active, segment, packed, *rest):
        assert all(int(packed.positions[start]) >= 0 for start in packed.bounds[:-1])
        real(active, segment, packed, *rest)

    return init


def _copied_keys(real):
    def attend_packed(query, key, value, spans, flex):
        """Of what several sequences begin with each has a copy, whose gradients are then added."""
        copies, once = spans.keys, np.unique(spans.keys, return_index=True)[1]
        key = key.index_select(0, torch.from_numpy(copies).to(key.device))
        return real(query, key.index_select(0, torch.from_numpy(once).to(key.device)), value, spans, flex)

    return attend_packed


FAULTS = {
    "a wrong .to(device): recorded exits": Fault(
        scoring, "replay_depths", lambda real: lambda *args: real(*args).cpu(), "score", DEVICE
    ),
    "a wrong .to(device): the head's input": Fault(
        Head, "entering", lambda real: lambda head, hidden: real(head, hidden.cpu()), "learn_likelihood", DEVICE
    ),
    "random numbers left on the host": Fault(
        ModelRunner, "draw", lambda real: lambda *args: real(*args).cpu(), "decode_sample", DEVICE
    ),
    "part of a batch left on the host": Fault(
        learner_module, "to_device", _labels_on_the_host, "learner_score_likelihood", DEVICE
    ),
    "an attention mask built on the CPU": Fault(layer_backends.Rows, "mask", _mask_on_the_cpu, "decode_off", DEVICE),
    "a table that stayed on the CPU": Fault(Decoder, "_reach", _tables_on_the_cpu, "decode_off", DEVICE),
    "gates loaded to the CPU": Fault(
        decoder_module, "gates_from", lambda real: lambda tensors, depths, dtype, _: real(tensors, depths, dtype, CPU),
        "decode_sample", DEVICE,
    ),
    "a fused optimizer's step on the CPU": Fault(learner_engine, "state_of", _step_on_the_cpu, "resume", DEVICE),
    "an optimizer's moments on the CPU": Fault(
        learner_engine, "state_of", _moments_on_the_cpu, "resume_flat", DEVICE
    ),
    "numpy of a tensor on the device": Fault(
        scoring, "_inspect_chunk",
        lambda real: lambda *given: {name: torch.from_numpy(x.numpy()) for name, x in real(*given).items()},
        "inspect", NUMPY,
    ),
    "a hidden .item() in every layer": Fault(
        layer_backends.TorchOps, "silu_mul", _item_in_every_layer, "decode off", "syncs"
    ),
    "a loop over sequences that asks each": Fault(Active, "__init__", _asks_each_sequence, "score", "syncs"),
    "a gate's answer by way of the host": Fault(
        Decoder, "gate_logit", lambda real: lambda decoder, *args: real(decoder, *args).cpu().to(decoder.device),
        "decode sample", "syncs",
    ),
    "an index on the CPU": Fault(
        layer_backends.Rows, "angles",
        lambda real: lambda rows: tuple(table[rows.positions.cpu()][:, None] for table in (rows.cos, rows.sin)),
        "decode off", "copies",
    ),
    "a table by way of pageable memory": Fault(
        cache, "to_device", lambda real: lambda table, device: table.to(device), "decode off", "pageable"
    ),
    "keys copied for each sequence": Fault(
        layer, "attend_packed", _copied_keys, "learn likelihood, bfloat16", "unordered"
    ),
    "a copy of the whole cache in every layer": Fault(
        layer_backends.TorchOps, "attend", _copied_cache, "decode off", "kernels"
    ),
    "prompts that are kept for ever": Fault(
        Prefiller, "forget", lambda real: lambda reader, waiting: None, "requests", "memory"
    ),
}  # fmt: skip


def plant(path: Path, name: str) -> dict[str, Any]:
    """What a fault does: the "error" that a path on the device ends with, or "counts" of a budget, or bytes "alive".

    A path of which an error is expected runs on the CPU first, which must not notice.
    """
    fault = FAULTS[name]
    faulty = fault.faulty(getattr(fault.owner, fault.name))
    with patched(fault.owner, **{fault.name: faulty}):
        if fault.caught == "memory":
            return {"alive": live_bytes(path, fault.where)}
        if fault.caught not in (DEVICE, NUMPY):
            return {"counts": measure(path, fault.where)}
        with on("cpu"):
            PATHS[fault.where](Bench("cpu", path))
        try:
            with on("gpu"):
                PATHS[fault.where](Bench("gpu", path))
        except (RuntimeError, TypeError) as error:
            return {"error": str(error)}
    return {"error": ""}
