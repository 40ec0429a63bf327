"""`EarlyExitModel`: Python interface to a trained model, and its answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from ..config.device import pick_device, pick_dtype
from ..config.schema import RunConfig
from ..exit_rules import ExitRule, parse
from ..rollout.engine.decoder import Decoder
from ..rollout.engine.generation import answer_requests
from ..rollout.engine.prompts import encode_chat, encode_continuation, encode_text, load_tokenizer, piece
from ..rollout.engine.request import Event, Request
from ..rollout.engine.sampling import SamplingParams
from ..rollout.engine.scheduler import Scheduler
from ..types import Rollout
from .model_resolver import ResolvedModel, resolve
from .readout import Readout, read

if TYPE_CHECKING:
    import pandas as pd

DTYPES = ("auto", "float32", "bfloat16")
Message = Mapping[str, str]
"""{"role": "user", "content": "..."}."""
Prompt = str | Sequence[int] | np.ndarray | Sequence[Message]
"""Text as it stands, token ids, or the messages of a chat."""


@dataclass(frozen=True, eq=False)
class Answer:
    """One answer; T tokens, the end-of-sequence token included where the model wrote one.

    - text: without special tokens, up to the first stop string
    - prompt, sample: the prompt's number in the call, and which of its `n` answers this is
    - prompt_tokens int64 [P]; tokens int64 [T], pieces: the text of each token alone
    - depths int32 [T]: layers of num_layers that ran for each token
    - logprobs, full_logprobs, exit_logprobs float32 [T]: natural logs, of the token under the distribution that was
      sampled from, under the one without top_k and top_p, of a sampled exit at this depth (0: no gate ran)
    - finished: "stop" (end of sequence or a stop string) or "length"
    """

    text: str
    prompt: int
    sample: int
    prompt_tokens: np.ndarray
    tokens: np.ndarray
    pieces: tuple[str, ...]
    depths: np.ndarray
    logprobs: np.ndarray
    full_logprobs: np.ndarray
    exit_logprobs: np.ndarray
    finished: str
    num_layers: int

    @property
    def mean_depth(self) -> float:
        """Share of the layers that ran, on average over the tokens."""
        return float(self.depths.mean() / self.num_layers)

    def __str__(self) -> str:
        return self.text


class Answers(list[Answer]):
    """List of one call's answers, those of a prompt next to each other."""

    def to_frame(self) -> pd.DataFrame:
        """A row per token: prompt, sample, position (int), token_id (int), token (str), depth (int), logprob,
        full_logprob, exit_logprob (float)."""
        import pandas as pd

        if not self:
            raise ValueError("no answers, so no tokens to tabulate")
        columns = {
            "token_id": "tokens", "token": "pieces", "depth": "depths", "logprob": "logprobs",
            "full_logprob": "full_logprobs", "exit_logprob": "exit_logprobs",
        }  # fmt: skip
        tables = [
            pd.DataFrame(
                {"prompt": answer.prompt, "sample": answer.sample, "position": np.arange(len(answer.tokens))}
                | {name: getattr(answer, field) for name, field in columns.items()}
            )
            for answer in self
        ]
        return pd.concat(tables, ignore_index=True)


class EarlyExitModel:
    """A model with exits, or a plain one, in this process; made by `load`.

    - decoder, tokenizer: what runs it; name, source: what it is and where it lies
    - settings: those of the run that trained it (config/schema.py), or None
    - chat_template_kwargs: variables of the chat template, as {"enable_thinking": False} of Qwen3's; the run's, if any
    """

    def __init__(self, resolved: ResolvedModel, dtype: torch.dtype, device: str):
        self.name, self.source, self.settings = resolved.name, resolved.path, resolved.settings
        self.checkpoint, self.default_exits = resolved.checkpoint, resolved.default_exits
        self.decoder = Decoder.of(resolved.source, resolved.spec, dtype, device)
        if resolved.tensors is not None:
            self.decoder.load_policy(resolved.tensors)
        self.tokenizer = load_tokenizer(resolved.path)
        self.chat_template_kwargs = dict(self.settings.rollout.chat_template_kwargs) if self.settings else {}

    @classmethod
    def load(
        cls,
        path: str | Path,
        policy: str | Path | None = None,
        *,
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        threads: int = 0,
        base_unchecked: bool = False,
    ) -> EarlyExitModel:
        """Load what `path` names: a run (its reinforced policy, else the calibrated one), a stage or checkpoint of a
        run, a Hugging Face model, an export with its gates, a Megatron checkpoint (docs/api.md).

        - policy: a policy checkpoint or stage directory on top of the model at `path`
        - dtype: float32, bfloat16, or auto: what the run was made in, else bfloat16 where that is fast
        - device: cpu, cuda, or auto: a GPU if there is one
        - threads: torch's on a CPU, for the whole process; 0 leaves them as they are
        - base_unchecked: take a policy that was made on another model

        Raises FileNotFoundError or ValueError, one line that says what was found, what was expected, what to do.
        """
        name = str(dtype).removeprefix("torch.")
        if name not in DTYPES:
            raise ValueError(f"dtype={name}: expected one of {', '.join(DTYPES)}")
        if device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device={device}: expected auto, cpu or cuda")
        if threads < 0:
            raise ValueError(f"threads={threads}: expected 0 or more")
        resolved = resolve(path, policy, base_unchecked)
        cfg = RunConfig(device=device)
        cfg.model.dtype = resolved.settings.model.dtype if name == "auto" and resolved.settings else name
        return cls.of(cfg, resolved, threads)

    @classmethod
    def of(cls, cfg: RunConfig, resolved: ResolvedModel, threads: int = 0) -> EarlyExitModel:
        """Load the resolved model on the device and in the dtype of a configuration."""
        device = pick_device(cfg)
        if threads > 0 and device == "cpu":
            torch.set_num_threads(threads)
        return cls(resolved, pick_dtype(cfg, device), device)

    def __repr__(self) -> str:
        dims, dtype = self.decoder.dims, str(self.decoder.dtype).removeprefix("torch.")
        exits = f"exits at {list(self.exit_depths)}" if self.has_gates else "no exits"
        return f"<EarlyExitModel {self.name}: {dims.family}, {dims.num_layers} layers, {exits}, {dtype}>"

    @property
    def num_layers(self) -> int:
        return self.decoder.dims.num_layers

    @property
    def exit_depths(self) -> tuple[int, ...]:
        """Layers before each exit; () for a plain model."""
        return self.decoder.layout.depths

    @property
    def has_gates(self) -> bool:
        return self.decoder.gates is not None

    @property
    def has_chat_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def encode(self, prompt: Prompt, chat: bool = False) -> list[int]:
        """Tokenise a prompt: a text unchanged (with `chat`: as one user's message), messages in the model's chat
        template. Ids are returned unchanged. Raises ValueError for a missing template or an empty prompt."""
        tokens: list[int]
        if isinstance(prompt, str) and chat:
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(prompt, str):
            tokens = encode_text(self.tokenizer, prompt)
        elif len(prompt) and isinstance(prompt[0], Mapping):
            tokens = encode_chat(self.tokenizer, cast("Sequence[Message]", prompt), self.chat_template_kwargs)
        else:
            tokens = [int(token) for token in cast("Sequence[int]", prompt)]
        vocab = self.decoder.dims.vocab
        if not tokens or not all(0 <= token < vocab for token in tokens):
            raise ValueError(f"{prompt!r:.80}: expected text, messages, or token ids in 0..{vocab - 1}, and not empty")
        return tokens

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        exits: str | ExitRule | None = None,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        max_new_tokens: int = 256,
        n: int = 1,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        chat: bool = False,
        rows: int = 64,
    ) -> Answers:
        """Generate `n` answers to each prompt: a text, a list of texts, lists of token ids, or chat messages.

        - exits: "threshold:0.7", "sample", "fixed:20", "confidence:0.9", "off", ... (exit_rules.py). None: what an
          export says of itself, else the threshold that the run's evaluation chose, else threshold:0.5; without gates
          full depth
        - temperature 0 takes the most probable token; top_k 0 and top_p 1 keep the whole vocabulary
        - max_new_tokens bounds an answer; `stop`: strings that end one, and are cut off
        - seed: makes sampled answers a function of prompt, seed and settings
        - chat: each text is a user's message in the model's chat template; messages are always put through it
        - rows: answers that are made together, up to

        Raises ValueError for settings that this model can't follow, before anything is generated.
        """
        if n < 1 or rows < 1:
            raise ValueError(f"n={n}, rows={rows}: both must be at least 1")
        rule = self.exit_rule(exits)
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        sampling = SamplingParams(temperature, max_new_tokens, stops, top_k, top_p)
        encoded = [self.encode(prompt, chat) for prompt in _several(prompts)]
        # Prompts are named as the server names them: the same seed gives the same answers there.
        requests = [
            Request(tokens, sampling, rule, seed, str(p or ""), k) for p, tokens in enumerate(encoded) for k in range(n)
        ]
        scheduler = Scheduler(self.decoder, self.tokenizer, max(1, min(rows, len(requests))))
        made = enumerate(answer_requests(scheduler, requests, version=0))
        return Answers(self._answer(rollout, *divmod(i, n)) for i, rollout in made)

    def stream(
        self,
        prompt: Prompt,
        exits: str | ExitRule | None = None,
        *,
        sampling: SamplingParams | None = None,
        seed: int = 0,
        chat: bool = False,
    ) -> Iterator[Event]:
        """Generate one answer by tokens: events with `text` (what became certain with this token), `token`, `depth`,
        `logprob`, `exit_logprob`, `finished`. Checked when called, not at the first token; raises as `generate`."""
        sampling = sampling or SamplingParams(0.0, 256)
        scheduler = Scheduler(self.decoder, self.tokenizer, in_flight=1)
        scheduler.add(Request(self.encode(prompt, chat), sampling, self.exit_rule(exits), seed, stream=True))

        def events() -> Iterator[Event]:
            while scheduler.busy:
                yield from scheduler.advance()

        return events()

    def readout(
        self,
        text: str | Sequence[int] | np.ndarray,
        prompt: Prompt | None = None,
        *,
        at: Sequence[int] | None = None,
        exits: Sequence[int] | np.ndarray | None = None,
        top_k: int = 5,
        full: bool = False,
        chat: bool = False,
    ) -> Readout:
        """Read a given text once, in parallel, and return every exit's prediction at every position (logit lens).

        - text: or its token ids, an answer's `tokens` for one. With a `prompt` the text continues it, and position t
          of the result is the one that predicts token t of the text; the last predicts what would follow. Without one
          all positions of the text are read out
        - at: depths to read out at, instead of the exits (for a plain model: every layer)
        - exits: the depths at which the text's tokens were predicted (an answer's `depths`), beyond which their
          positions don't go, as in generation. None: all positions run through all layers
        - top_k: how many tokens are stored per position and depth; full: keep all logits, 4·N·T·V bytes
        - chat: as in `generate`, for the prompt
        """
        before = [] if prompt is None else self.encode(prompt, chat)
        if isinstance(text, str):
            after = encode_continuation(self.tokenizer, text) if before else self.encode(text)
        else:
            after = [int(token) for token in text]
        first, layers, depths = max(0, len(before) - 1), self.num_layers, None
        if exits is not None:
            if not before or len(exits) != len(after):
                raise ValueError(
                    f"exits: {len(exits)} depths for {len(after)} tokens behind a prompt of {len(before)}; give "
                    "a prompt, and a depth for every token of the text"
                )
            depths = [layers] * first + [int(depth) for depth in exits] + [layers]
        return read(self.decoder, self.tokenizer, [*before, *after], first, at, depths, top_k, full)

    def exit_rule(self, exits: str | ExitRule | None) -> ExitRule:
        """The rule that `generate` would follow. Raises ValueError for one that the model can't."""
        rule = self.default_exits if exits is None else parse(exits) if isinstance(exits, str) else exits
        if not self.has_gates and "gates" in rule.needs:
            raise ValueError(f"exits={rule!s}: {self.name} has no gates; load a policy or an export, or use 'off'")
        rule.check(self.decoder.layout, self.has_gates)
        return rule

    def _answer(self, made: Rollout, prompt: int, sample: int) -> Answer:
        assert made.full_logprobs is not None
        return Answer(
            text=made.text, prompt=prompt, sample=sample, prompt_tokens=made.prompt_tokens, tokens=made.tokens,
            pieces=tuple(piece(self.tokenizer, token) for token in made.tokens.tolist()), depths=made.exit_depths,
            logprobs=made.token_logprobs, full_logprobs=made.full_logprobs, exit_logprobs=made.exit_logprobs,
            finished="stop" if made.finished else "length", num_layers=self.num_layers,
        )  # fmt: skip


def _several(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Prompts as a list: a text, one chat and one list of token ids are one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    given: list = prompts.tolist() if isinstance(prompts, np.ndarray) else list(prompts)
    # Else what it holds are tokens or messages.
    several = not given or isinstance(given[0], str | np.ndarray | Sequence)
    return given if several else [given]
