"""What a real learner computes and keeps, measured on its ranks, for the tests that hold the plan against it."""

from __future__ import annotations

from collections import Counter

import torch
from layout_cases import make_learner
from torch.utils.flop_counter import FlopCounterMode

from ee_megatron.config.schema import DeepspeedConfig
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.learner.learner import Learner, Pass
from ee_megatron.policy import PolicySpec, initial_policy
from tools.workloads import make_batch


def attention(query, key, *_args, **_kwargs) -> int:
    """Products of the CPU's attention kernel, grouped heads or not: queries x keys and weights x values."""
    b, h, queries, size = query
    return 4 * b * h * queries * key[2] * size


def attention_backward(_gradient, query, key, *_args, **_kwargs) -> int:
    """Five products where the forward pass has two: the weights are made again."""
    return attention(query, key) * 5 // 2


ATEN = torch.ops.aten
CPU_ATTENTION = {
    ATEN._scaled_dot_product_flash_attention_for_cpu: attention,
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}


class Kept:
    """Bytes that autograd holds now and held at most: every storage once, parameters not counted."""

    def __init__(self, parameters):
        self.parameters = {p.untyped_storage().data_ptr() for p in parameters}
        self.holders: Counter[int] = Counter()
        self.now = self.peak = 0

    def pack(self, tensor):
        return Held(self, tensor.detach())

    def unpack(self, held):
        return held.tensor


class Held:
    def __init__(self, kept: Kept, tensor: torch.Tensor):
        self.kept, self.tensor = kept, tensor
        storage = tensor.untyped_storage()
        self.key, self.size = storage.data_ptr(), storage.nbytes()
        if self.key in kept.parameters:
            self.size = 0
        kept.holders[self.key] += 1
        if kept.holders[self.key] == 1:
            kept.now += self.size
            kept.peak = max(kept.peak, kept.now)

    def __del__(self):
        self.kept.holders[self.key] -= 1
        if not self.kept.holders[self.key]:
            self.kept.now -= self.size


def bytes_of(tensors) -> int:
    """Bytes of the distinct storages behind tensors."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def optimizer_bytes(learner: Learner) -> int:
    engine = learner.updater.engine
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    kept = [v for state in inner.state.values() for v in state.values() if torch.is_tensor(v) and v.dim()]
    return bytes_of([*kept, *getattr(engine.optimizer, "single_partition_of_fp32_groups", [])])


def measure(
    path, spec: PolicySpec, degrees, sizes, sequences: int, prompt: int, answer: int, shares, group: int,
    tokens: int, options,
):  # fmt: skip
    """-> this rank's FLOPs of scoring, of the reference and of a step, and its bytes by kind."""
    source, options = HFDirectory(path), dict(options)
    policy = initial_policy(source.dims, spec, 0, source.tensor)
    options |= {"deepspeed": DeepspeedConfig(options.pop("zero_stage", 1)), "tokens_per_micro_batch": tokens}
    learner = make_learner(path, spec, policy, degrees, sizes, **options)
    batch, weights = make_batch(spec, source.dims.vocab, sequences, prompt, answer, shares, group)
    found: dict[str, float] = {}

    def counted(name: str, action) -> None:
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            action()
        found[f"flops {name}"] = counter.get_total_flops()

    counted("score", lambda: learner.score(batch))
    counted("reference", lambda: learner.score(batch, reference=True))
    counted("step", lambda: learner.step(batch, weights, adapter_lr=1e-4, gate_lr=1e-4))
    found["optimizer"] = optimizer_bytes(learner)
    found["weights"] = bytes_of(list(learner.model.parameters()))
    deepest = batch.at_full_depth(spec.num_layers)
    kept = Kept(learner.model.parameters())
    learner.model.train()
    with learner.updater.accumulate():
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
            learner._run(deepest, Pass("train", weights))
        learner.complete_gradients()
        local = sum(p.grad.nbytes for p in learner.model.parameters() if p.grad is not None)
    # By address: what is averaged over one data-parallel rank is the gradient itself.
    averaged = getattr(learner.updater.engine.optimizer, "averaged_gradients", None) or {}
    parts = {t.data_ptr(): t.nbytes for group in averaged.values() if group is not None for t in group}
    for p in learner.model.parameters():
        if p.grad is not None:
            parts.pop(p.grad.data_ptr(), None)
    found["gradients"] = local + sum(parts.values())
    found["activations"] = kept.peak
    learner.updater.skip()
    return found
