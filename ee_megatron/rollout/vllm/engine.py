"""vLLM's engine with exits, driven step by step, as `rollout.engine.scheduler.Scheduler` drives the embedded one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ...families import VLLM
from ...families.hf_directory import HFDirectory, read_eos_ids
from ...policy import PolicySpec
from ...types import Rollout
from ..engine.request import Event, Request, RequestValidator, Row, check_logits
from . import CHUNK, CPU_CACHE_GIB, GPU_SHARE, architecture, check_version
from .request_metadata import EXTRA, RequestMetadata


@dataclass(frozen=True)
class EngineSettings:
    """One engine; without a `spec` for a model without exits.

    - rows: requests at a time; tensor: devices
    - cache_gib: memory of the cache on each device, 0 for what is left of `GPU_SHARE` or on a CPU `CPU_CACHE_GIB`
    - compile: as vLLM compiles its own models, with CUDA graphs on a GPU; else eagerly
    - others: of vLLM's `EngineArgs`, by name
    """

    model_path: str
    spec: PolicySpec | None
    dtype: torch.dtype
    rows: int = 64
    tensor: int = 1
    cache_gib: float = 0.0
    compile: bool = False
    others: tuple[tuple[str, Any], ...] = ()


class VllmEngine:
    """Requests come and go; `advance` runs one step of vLLM's. Not thread-safe: one owner."""

    def __init__(self, settings: EngineSettings):
        # In this process: the caller owns it, and weights are set between two steps.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if settings.cache_gib:
            # It would override `cache_gib`.
            os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
        else:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(CPU_CACHE_GIB))
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import vllm
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        check_version(vllm.__version__)
        source = HFDirectory(settings.model_path)
        self.dims = source.dims
        spec = self.spec = settings.spec or PolicySpec(self.dims.num_layers, (), rank=0)
        eos_ids = read_eos_ids(source)
        source.close()
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            settings.model_path, local_files_only=True
        )
        others: dict[str, Any] = {"max_num_batched_tokens": CHUNK}
        if settings.cache_gib:
            # As long as the cache has room for: vLLM refuses one that doesn't hold the model's longest sequence.
            others |= {"kv_cache_memory_bytes": int(settings.cache_gib * 2**30), "max_model_len": -1}
        arguments = EngineArgs(
            model=str(Path(settings.model_path)), dtype=str(settings.dtype).removeprefix("torch."),
            skip_tokenizer_init=True, enforce_eager=not settings.compile, async_scheduling=False,
            enable_prefix_caching=True, max_num_seqs=settings.rows,
            enable_chunked_prefill=True, gpu_memory_utilization=GPU_SHARE, tensor_parallel_size=settings.tensor,
            hf_overrides={
                "architectures": [architecture(VLLM[self.dims.family])], "exit_depths": list(spec.exit_depths),
                "gate_width": spec.gate_width, "gate_input": spec.gate_input, "first_token": spec.first_token,
            },
            **(others | dict(settings.others)),
        )  # fmt: skip
        self.engine = LLMEngine.from_engine_args(arguments)
        self.gated = False
        self._intake = RequestValidator(self.tokenizer, eos_ids, self.spec.layout, self.dims.max_positions)
        self._room = int(self.engine.model_config.max_model_len)
        self.finished_rows: dict[int, Row] = {}
        self._rows: dict[int, Row] = {}
        self._next_id = 0

    def _call(self, name: str, *arguments: Any) -> Any:
        """What the first device answers."""
        return self.engine.collective_rpc(name, args=arguments)[0]

    # ---- weights ----

    def load(self, tensors: dict[str, Tensor] | None) -> None:
        """A policy's tensors, or the base without gates. No request may be under way."""
        assert not self._rows, "weights are set between answers"
        self._call("exits_load", self.spec, tensors)
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("vLLM didn't let go of keys and values of the weights before these")
        self.gated = tensors is not None

    def counter(self, name: str) -> int:
        """One of vLLM's counters, as `vllm:num_preemptions`."""
        return sum(int(metric.value) for metric in self.engine.get_metrics() if metric.name == name)

    # ---- requests ----

    def add(self, request: Request) -> int:
        """As `Scheduler.add`."""
        from vllm import SamplingParams

        row = self._intake.begin(self._next_id, request, self.gated)
        if row.longest > self._room:
            raise ValueError(
                f"prompt and answer take up to {row.longest} positions, the cache has {self._room}; enlarge it, "
                "shorten the prompts or lower max_new_tokens"
            )
        self._next_id += 1
        self._rows[row.id] = row
        # Tokens and their end are this package's business.
        params = SamplingParams(
            temperature=0.0, max_tokens=request.sampling.max_new_tokens, ignore_eos=True, detokenize=False,
            extra_args={EXTRA: RequestMetadata.extra(row)},
        )  # fmt: skip
        self.engine.add_request(str(row.id), {"prompt_token_ids": list(row.prompt_tokens)}, params)
        return row.id

    def advance(self) -> list[Event]:
        """One step of vLLM's: an event per new token. Raises RuntimeError where devices that share the model decided
        differently: then each has keys and values of another answer."""
        self.engine.step()
        events = []
        first, *others = self.engine.collective_rpc("exits_take")
        # Request, token and depth have to be the same on every device.
        decided = [made[:3] for made in first]
        for rank, other in enumerate(others, start=1):
            if [made[:3] for made in other] != decided:
                raise RuntimeError(f"tensor rank {rank} made other tokens or exits than rank 0: {other} and {first}")
        check_logits(made.full_logprob for made in first)
        for made in first:
            row = self._rows.get(made.request)
            if row is None:
                continue
            events.append(row.append(made._replace(finished=row.ending(made.token))))
            if row.finished is not None:
                self.engine.abort_request([str(row.id)])
                self.finished_rows[row.id] = self._rows.pop(row.id)
        return events

    @property
    def busy(self) -> bool:
        return bool(self._rows)

    def take(self, request: int, version: int) -> Rollout:
        """As `Scheduler.take`."""
        return self.finished_rows.pop(request).rollout(version)

    def share_prefix(self, tokens: Sequence[int]) -> None:
        """Nothing: vLLM finds prompts, and beginnings of prompts, that it has read by itself."""
