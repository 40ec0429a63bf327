"""What a part runs on: sizes, random models and policies, the settings that `plan` is asked with; and what it found."""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerFast

from ee_megatron.config.derive import policy_spec
from ee_megatron.config.schema import DeepspeedConfig, RunConfig
from ee_megatron.families import FAMILIES, ModelDims, dims_from_config
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.observe.rundir import write_atomic
from ee_megatron.planning.devices import Device, Reach
from ee_megatron.planning.plan import Assumptions, make_plan, published_config
from ee_megatron.policy import PolicySpec
from ee_megatron.report.results import strict_json
from ee_megatron.rollout import Decoder

if TYPE_CHECKING:
    from ee_megatron.learner.learner import Learner
    from ee_megatron.planning.plan import RunPlan

GROWTH = 2**20
"""Bytes by which live tensors may grow over repeats."""
SMALL_MODEL = {
    "model_type": "qwen2", "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 12,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 512,
}  # fmt: skip


class Findings:
    """What a part found, written to its file as it comes: a part that is ended half-way keeps what it had.

    Checks can fail, figures and tables only tell. `device`: cpu or cuda.
    """

    def __init__(self, file: Path, device: str):
        self.file, self.device = file, device
        self.content: dict[str, list[dict[str, Any]]] = {"checks": [], "figures": [], "tables": []}

    def check(
        self, name: str, value: float, *, at_most: float | None = None, at_least: float | None = None,
        unit: str = "", why: str = "",
    ) -> None:  # fmt: skip
        """A value with the limit that it has to keep and where the limit comes from. What is no number fails."""
        passed = (at_most is None or value <= at_most) and (at_least is None or value >= at_least)
        limits = {"at_most": at_most, "at_least": at_least}
        self._add("checks", name=name, value=value, unit=unit, **limits, why=why, status=("failed", "passed")[passed])

    def only_on_cuda(self, name: str) -> bool:
        """Whether there is CUDA; if not, the check `name` is noted as not applicable."""
        if self.device != "cuda":
            self._add("checks", name=name, status="not applicable on cpu")
        return self.device == "cuda"

    def figure(self, name: str, value: float | str, unit: str = "") -> None:
        self._add("figures", name=name, value=value, unit=unit)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self._add("tables", title=title, columns=list(columns), rows=[list(row) for row in rows])

    def _add(self, kind: str, **entry: Any) -> None:
        self.content[kind].append(strict_json(entry))
        write_atomic(self.file, json.dumps(self.content, allow_nan=False))


@dataclass(frozen=True)
class Size:
    """`whole`: config.json of the model whose speed and memory are measured; `shallow`: layers of the one that is
    compared with the CPU, and its exits; decode: answers, tokens of a prompt and of an answer; step: prompts, answers
    to each, tokens of a prompt and of an answer, positions of a micro-batch; depth: mean, as a share of the layers."""

    whole: dict[str, Any]
    shallow: int
    exits: tuple[int, ...]
    decode: tuple[int, int, int]
    step: tuple[int, int, int, int, int]
    repeats: int
    depth: float = 0.7


REAL = Size(published_config("DeepSeek-R1-Distill-Qwen-1.5B"), 8, (2, 4, 6), (64, 128, 64), (4, 4, 128, 384, 2048), 3)
SMALL = Size(SMALL_MODEL, 6, (2, 4), (4, 16, 12), (2, 2, 16, 32, 96), 2)


@dataclass
class Bench:
    """Where a part runs and what on."""

    scratch: Path
    kind: str
    small: bool

    @property
    def size(self) -> Size:
        return SMALL if self.small else REAL

    @property
    def device(self) -> torch.device:
        return torch.device(self.kind, 0) if self.kind == "cuda" else torch.device("cpu")

    def folder(self, shallow: bool) -> Path:
        return self.scratch / ("shallow" if shallow else "whole")

    def settings(self, shallow: bool, prompts: int = 1, answers: int = 1, tokens: int = 2048) -> RunConfig:
        """Of an RL run on the model, as a user would set them."""
        cfg = RunConfig(name="gpu-check", device=self.kind)
        cfg.model.path, cfg.model.dtype = str(self.folder(shallow)), "bfloat16"
        cfg.exits.depths = list(self.size.exits) if shallow else []
        cfg.parallel.tokens_per_micro_batch = tokens
        cfg.rl.prompts_per_step, cfg.rl.group_size, cfg.rl.loss.advantage = prompts, answers, "none"
        cfg.rollout.backend, cfg.rollout.max_num_seqs = "local", prompts * answers
        return cfg

    def spec(self, shallow: bool) -> PolicySpec:
        return policy_spec(self.settings(shallow), self.dims(shallow))

    def dims(self, shallow: bool) -> ModelDims:
        return HFDirectory(self.folder(shallow)).dims

    def plan(self, cfg: RunConfig, device: Device, prompt: int, answer: int, depth: float | None = None) -> RunPlan:
        """What `ee-megatron plan` would say of the whole model; depth: mean, if it is not the size's."""
        cfg.rollout.max_new_tokens = answer
        return make_plan(cfg, self.dims(False), device, Assumptions(prompt, answer, depth or self.size.depth))

    def decoder(self, shallow: bool, dtype: torch.dtype) -> Decoder:
        """With the random policy loaded."""
        decoder = Decoder.from_hf(self.folder(shallow), self.spec(shallow), dtype, self.device)
        decoder.load_policy(self.policy(shallow))
        return decoder

    def learner(
        self, cfg: RunConfig, dtype: torch.dtype, policy: dict[str, Tensor], deepspeed: DeepspeedConfig | None = None
    ) -> Learner:
        # Late, as in `join`: a part that only decodes starts in half the time without megatron-core.
        from ee_megatron.learner.learner import Learner

        source = HFDirectory(cfg.model.path)
        return Learner(
            source, policy_spec(cfg, source.dims), policy, cfg.parallel, deepspeed or cfg.deepspeed,
            device=self.device, dtype=dtype,
        )  # fmt: skip

    def policy(self, shallow: bool) -> dict[str, Tensor]:
        """Adapters that change what the model says and gates whose hazards lie around a half, float32 on the CPU."""
        generator, found = torch.Generator().manual_seed(0), {}
        for name, shape in self.spec(shallow).tensor_shapes(self.dims(shallow)).items():
            fan_in = shape[-1] if len(shape) > 1 else 16
            found[name] = torch.randn(shape, generator=generator) * (0.2 if ".lora_B." in name else 1.0) * fan_in**-0.5
        return found

    def join(self) -> None:
        """The process groups of a learner on its own."""
        from ee_megatron.parallel import groups
        from ee_megatron.parallel.groups import Degrees

        groups.initialise(Degrees(), device=self.kind, timeout_s=120.0)

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.kind == "cuda":
            torch.cuda.synchronize()

    def seconds(self, action: Callable[[], Any]) -> float:
        """By the clock, with everything that the action gave the device."""
        self.wait()
        begun = time.perf_counter()
        action()
        self.wait()
        return time.perf_counter() - begun

    def forget_peak(self) -> None:
        """What `peak_bytes` counts begins here."""
        if self.kind == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        """Most bytes of tensors on a GPU at any time."""
        return torch.cuda.max_memory_allocated()

    def live_bytes(self) -> int:
        """Of tensors on the device, once what nobody holds is gone."""
        gc.collect()
        if self.kind == "cuda":
            return torch.cuda.memory_allocated()
        storages = {}
        for thing in gc.get_objects():
            # Those in oneDNN's layout have no storage to ask for.
            if type(thing) in (Tensor, torch.nn.Parameter) and not thing.is_mkldnn:
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())


def tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """A word per token id, without a token that ends an answer."""
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocab)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words)


def write_models(findings: Findings, bench: Bench) -> None:
    """Both models, bfloat16, drawn on the device."""
    for shallow in (False, True):
        config = dict(bench.size.whole)
        if shallow:
            config["num_hidden_layers"] = bench.size.shallow
        begun = time.perf_counter()
        elements = write_model(config, bench.folder(shallow), bench.device)
        what = f"{config['num_hidden_layers']} layers of width {config['hidden_size']}"
        findings.figure(f"{what}: parameters", elements)
        findings.figure(f"{what}: written in", time.perf_counter() - begun, "s")


def write_model(config: dict[str, Any], folder: Path, device: torch.device) -> int:
    """A Hugging Face directory with random weights; its number of parameters. Gains and biases are random too: ones and
    zeros would hide mistakes."""
    folder.mkdir()
    hf = AutoConfig.for_model(
        **{"bos_token_id": None, "eos_token_id": None, **config}, dtype="bfloat16",
        architectures=[FAMILIES[config["model_type"]].architecture],
    )  # fmt: skip
    hf.save_pretrained(folder)
    generator, tensors = torch.Generator(device).manual_seed(0), {}
    for name, shape in dims_from_config(hf.to_dict()).tensor_shapes().items():
        drawn = torch.randn(shape, generator=generator, device=device)
        gain = len(shape) == 1 and not name.endswith(".bias")
        tensors[name] = (1 + 0.1 * drawn if gain else 0.02 * drawn).to("cpu", torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in tensors.values())


def ideal(device: Device) -> Device:
    """The device as a roofline sees it: its peaks, no time for the host's work.

    A CPU without bfloat16 instructions multiplies bfloat16 more slowly than float32, and what runs there in part or
    whole in float32 is faster than its bfloat16 peak; the faster of the two is the ceiling."""
    perfect = Reach(compute=1.0, memory=1.0, links=1.0, launch=0.0, host=math.inf)
    return replace(device, tflops=max(device.tflops, device.fp32), likely=perfect, best=perfect)
