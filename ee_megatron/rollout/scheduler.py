"""Continuous batching: prompts enter free cache rows, all rows advance by one token per step, finished rows leave.

The samples of a prompt share its prefill, and what all prompts of a call begin with is read once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..exits import log_exit_distribution
from ..types import Prompt, Rollout
from .cache import KVCache
from .decoder import Decoder, ExitChooser, Prefilled
from .sampling import ExitPolicy, SamplingParams, sample_tokens, stream_key, uniforms
from .stopping import StopChecker

# Prompt positions read in one parallel forward, padding included: bounds the memory of a prefill.
PREFILL_POSITIONS = 8192
# A shorter common beginning isn't worth a forward of its own.
SHORTEST_PREFIX = 8

Progress = Callable[[int, int], None]


@dataclass
class Row:
    """One answer being generated; fields as in `Rollout`."""

    prompt_index: int
    sample: int
    prompt_tokens: list[int]
    key: int
    tokens: list[int] = field(default_factory=list)
    exit_depths: list[int] = field(default_factory=list)
    token_logprobs: list[float] = field(default_factory=list)
    exit_logprobs: list[float] = field(default_factory=list)
    finished: bool = False

    def append(self, token: int, depth: int, token_logprob: float, exit_logprob: float) -> None:
        self.tokens.append(token)
        self.exit_depths.append(depth)
        self.token_logprobs.append(token_logprob)
        self.exit_logprobs.append(exit_logprob)

    @property
    def length(self) -> int:
        return len(self.prompt_tokens) + len(self.tokens)


@dataclass
class _Ready:
    """A prompt that has been read: its keys and values, the logits [V] of its first token, the next sample to start."""

    prompt_index: int
    prefilled: Prefilled
    logits: Tensor
    next_sample: int = 0


class Scheduler:
    """Generates `samples` answers per prompt with at most `rows` in flight. `advance` until `done`, then `results`."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        samples: int,
        sampling: SamplingParams,
        exits: ExitPolicy,
        seed: int,
        rows: int,
    ):
        if samples < 1 or rows < 1:
            raise ValueError(f"samples={samples}, rows={rows}: both must be at least 1")
        exits.check(decoder.layout, decoder.gates is not None)
        self.decoder, self.prompts, self.samples = decoder, prompts, samples
        self.sampling, self.exits, self.seed, self.limit = sampling, exits, seed, rows
        self.stopping = StopChecker(tokenizer, decoder.eos_ids, sampling.stop)
        self.encoded = [encode(tokenizer, prompt) for prompt in prompts]
        longest = max((len(ids) for ids in self.encoded), default=1) + sampling.max_new_tokens
        if longest > decoder.dims.max_positions:
            raise ValueError(
                f"prompt and answer take up to {longest} positions, the model has {decoder.dims.max_positions}; "
                "shorten the prompts or lower max_new_tokens"
            )
        # The longest prompts first: rows of like length are read together and pad each other least.
        self.waiting = deque(sorted(range(len(prompts)), key=lambda i: -len(self.encoded[i])))
        self.ready: deque[_Ready] = deque()
        self.active: list[Row] = []
        self.complete: list[Row] = []
        self.cache = KVCache(
            decoder.dims, min(rows, max(1, len(prompts) * samples)), longest, decoder.dtype, decoder.device
        )
        self.prefix = self._read_prefix()

    @property
    def done(self) -> bool:
        return not (self.active or self.ready or self.waiting)

    def advance(self) -> list[Row]:
        """Let prompts enter free rows if there are any, else run one step; returns the rows that got a token."""
        started = self._admit()
        return started or self._step()

    def results(self, version: int) -> list[list[Rollout]]:
        """Finished answers, per prompt in the order given, samples in order."""
        table: list[dict[int, Rollout]] = [{} for _ in self.prompts]
        for row in self.complete:
            table[row.prompt_index][row.sample] = self.rollout(row, version)
        return [[by_sample[k] for k in sorted(by_sample)] for by_sample in table]

    def rollout(self, row: Row, version: int) -> Rollout:
        return Rollout(
            prompt_id=self.prompts[row.prompt_index].id,
            prompt_tokens=np.array(row.prompt_tokens, dtype=np.int64),
            tokens=np.array(row.tokens, dtype=np.int64),
            exit_depths=np.array(row.exit_depths, dtype=np.int32),
            token_logprobs=np.array(row.token_logprobs, dtype=np.float32),
            exit_logprobs=np.array(row.exit_logprobs, dtype=np.float32),
            text=self.stopping.text(row.tokens),
            finished=row.finished,
            weight_version=version,
        )

    # ---- entering ----

    def _read_prefix(self) -> Prefilled | None:
        if len(self.encoded) < 2:
            return None
        first, last = min(self.encoded), max(self.encoded)
        common = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
        common = min(common, min(map(len, self.encoded)) - 1)
        if common < SHORTEST_PREFIX:
            return None
        tokens = torch.tensor([first[:common]], device=self.decoder.device)
        return self.decoder.prefill(tokens, torch.tensor([common]))[0]

    def _admit(self) -> list[Row]:
        free = self.cache.rows - len(self.active)
        if not free or not (self.ready or self.waiting):
            return []
        # Reading prompts one by one wastes the batch: wait for a few free rows unless some prompt is ready.
        if not self.ready and self.active and free < self.cache.rows // 8:
            return []
        chosen: list[tuple[_Ready, Row]] = []
        while len(chosen) < free and (self.ready or self.waiting):
            if not self.ready:
                self._read_prompts(-(-(free - len(chosen)) // self.samples))
            entry = self.ready[0]
            i, k = entry.prompt_index, entry.next_sample
            key = stream_key(self.seed, self.prompts[i].id, k)
            chosen.append((entry, Row(i, k, self.encoded[i], key)))
            entry.next_sample += 1
            if entry.next_sample == self.samples:
                self.ready.popleft()
        self._start(chosen)
        return [row for _, row in chosen]

    def _read_prompts(self, count: int) -> None:
        past = self.prefix.keys.shape[1] if self.prefix else 0
        longest = len(self.encoded[self.waiting[0]]) - past
        count = max(1, min(count, len(self.waiting), PREFILL_POSITIONS // longest))
        indices = [self.waiting.popleft() for _ in range(count)]
        tokens, lengths = pad([self.encoded[i][past:] for i in indices], self.decoder.device)
        prefilled = self.decoder.prefill(tokens, lengths, self.prefix)
        logits = self.decoder.readout(torch.stack([p.hidden for p in prefilled]))
        self.ready.extend(_Ready(i, p, row) for i, p, row in zip(indices, prefilled, logits, strict=True))

    def _start(self, chosen: list[tuple[_Ready, Row]]) -> None:
        """Sample first tokens (full depth: prompt positions never exit) and give unfinished answers a cache row."""
        rows = [row for _, row in chosen]
        uniform = self._uniforms(rows)[:, -1]
        tokens, logprobs = sample_tokens(torch.stack([entry.logits for entry, _ in chosen]), self.sampling, uniform)
        for (entry, row), token, logprob in zip(chosen, tokens.tolist(), logprobs.tolist(), strict=True):
            row.append(token, self.decoder.dims.num_layers, logprob, 0.0)
            if self._ended(row):
                self.complete.append(row)
                continue
            slot = len(self.active)
            if self.prefix:
                self.cache.fill(slot, 0, self.prefix.keys, self.prefix.values)
            self.cache.fill(slot, entry.prefilled.start, entry.prefilled.keys, entry.prefilled.values)
            self.active.append(row)

    # ---- one token for every row ----

    def _step(self) -> list[Row]:
        rows, device = list(self.active), self.decoder.device
        tokens = torch.tensor([row.tokens[-1] for row in rows], device=device)
        positions = torch.tensor([row.length - 1 for row in rows], device=device)
        uniform = self._uniforms(rows)
        output = self.decoder.step(self.cache, tokens, positions, self._chooser(rows, uniform))
        new, logprobs = sample_tokens(self.decoder.readout(output.hidden), self.sampling, uniform[:, -1])
        depths = [self.decoder.layout.outcomes[i] for i in output.outcome.tolist()]
        exits = torch.zeros(len(rows))
        if self.decoder.gates is not None:
            exits = log_exit_distribution(output.gate_logits).gather(-1, output.outcome[:, None]).squeeze(-1)
        for row, *entry in zip(rows, new.tolist(), depths, logprobs.tolist(), exits.tolist(), strict=True):
            row.append(*entry)
        self._retire()
        return rows

    def _retire(self) -> None:
        for slot in reversed(range(len(self.active))):
            row = self.active[slot]
            if not self._ended(row):
                continue
            self.complete.append(row)
            last = self.active.pop()
            if slot < len(self.active):
                self.active[slot] = last
                self.cache.move(len(self.active), slot, last.length - 1)

    def _ended(self, row: Row) -> bool:
        row.finished = self.stopping.ended(row.tokens)
        return row.finished or len(row.tokens) >= self.sampling.max_new_tokens

    def _uniforms(self, rows: list[Row]) -> Tensor:
        """float64 [R, M+1]: one number per gate and one for the token that each row generates next."""
        keys = np.array([row.key for row in rows], dtype=np.uint64)
        at = np.array([len(row.tokens) for row in rows])
        draws = len(self.decoder.layout.depths) + 1
        return torch.from_numpy(uniforms(keys, at, draws)).to(self.decoder.device)

    def _chooser(self, rows: list[Row], uniform: Tensor) -> ExitChooser | None:
        kind, value, depths = self.exits.kind, self.exits.value, self.decoder.layout.depths
        if kind == "sample":
            return lambda i, h, z, at: uniform[at, i] < z.double().sigmoid()  # type: ignore[union-attr]
        if kind == "threshold":
            return lambda i, h, z, at: z.sigmoid() > value  # type: ignore[union-attr]
        if kind == "confidence":
            return lambda i, h, z, at: self.decoder.readout(h).softmax(dim=-1).amax(dim=-1) > value
        if kind == "fixed":
            return lambda i, h, z, at: torch.ones_like(at, dtype=torch.bool) if depths[i] == value else None
        if kind == "prescribed":
            wanted = torch.tensor([self._prescribed(row) for row in rows], device=self.decoder.device)
            return lambda i, h, z, at: wanted[at] == depths[i]
        # Off: without gates nothing is to be recorded either.
        return None if self.decoder.gates is None else lambda i, h, z, at: None

    def _prescribed(self, row: Row) -> int:
        name = (self.prompts[row.prompt_index].id, row.sample)
        depths = self.exits.depths.get(name)
        if depths is None or len(depths) <= len(row.tokens):
            found = "none" if depths is None else str(len(depths))
            raise ValueError(f"prescribed exits of {name}: {found} given, token {len(row.tokens)} needs one; give more")
        return int(depths[len(row.tokens)])


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a prompt's text as it stands; begin-of-sequence only where the tokenizer asks for it."""
    ids = list(tokenizer(prompt.text, add_special_tokens=False)["input_ids"])
    if tokenizer.bos_token_id is not None and getattr(tokenizer, "add_bos_token", False):
        ids = [tokenizer.bos_token_id, *ids]
    if not ids:
        raise ValueError(f"prompt {prompt.id!r} has no tokens; give it a text")
    return ids


def pad(sequences: Sequence[Sequence[int] | np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token lists -> int64 [B, T] right-padded with 0, lengths int64 [B] (on the CPU)."""
    lengths = torch.tensor([len(s) for s in sequences])
    tokens = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.int64)
    for b, sequence in enumerate(sequences):
        tokens[b, : len(sequence)] = torch.as_tensor(sequence)
    return tokens.to(device), lengths


@torch.inference_mode()
def generate(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    samples: int,
    sampling: SamplingParams,
    exits: ExitPolicy,
    seed: int,
    version: int,
    progress: Progress | None = None,
    rows: int = 64,
) -> list[list[Rollout]]:
    """`samples` answers to every prompt, in the prompts' order; a seed gives the same ones whatever `rows` is.

    In float32 that holds up to rounding: a different batch shape may change the last bits of a logit. `progress(done,
    total)` counts answers. Raises ValueError for impossible settings and for prompts that do not fit the model.
    """
    scheduler = Scheduler(decoder, tokenizer, prompts, samples, sampling, exits, seed, rows)
    reported = 0
    while not scheduler.done:
        scheduler.advance()
        if progress and len(scheduler.complete) > reported:
            reported = len(scheduler.complete)
            progress(reported, len(prompts) * samples)
    return scheduler.results(version)


@dataclass(frozen=True)
class StreamedToken:
    """One generated token: its id, the text that became certain with it, its exit depth, its log-probability."""

    token: int
    text: str
    depth: int
    logprob: float


@torch.inference_mode()
def stream(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    sampling: SamplingParams,
    exits: ExitPolicy,
    seed: int = 0,
) -> Iterator[StreamedToken]:
    """Sample 0 of `generate`, token by token; the texts concatenate to the rollout's."""
    scheduler = Scheduler(decoder, tokenizer, [prompt], 1, sampling, exits, seed, rows=1)
    shown = 0
    while not scheduler.done:
        row = scheduler.advance()[0]
        text = scheduler.stopping.text(row.tokens) if scheduler.done else scheduler.stopping.settled(row.tokens)
        yield StreamedToken(row.tokens[-1], text[shown:], row.exit_depths[-1], row.token_logprobs[-1])
        shown = max(shown, len(text))
