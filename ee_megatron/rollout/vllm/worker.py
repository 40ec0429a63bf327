"""vLLM's worker with exits: they are attached, weights set in place, tokens fetched; and one step of its model runner:
what the model must know of each token before it runs, the sampling of the next tokens with this package's random
numbers, and what comes back of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config import CUDAGraphMode
from vllm.distributed.aux_output_connector.connector import AuxRequestOutput
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform
from vllm.v1.outputs import SamplerOutput

from ...exit_rules import NEVER, ExitRule, forced_bounds
from ...families.hf_directory import HFDirectory
from ...policy import PolicySpec
from ...tensors import to_device, to_host
from ..engine.request import Event
from ..engine.sampling import SamplingParams, inverse_cdf, log_prob, prescribe, sample_tokens, truncate, uniforms
from .model import EarlyExit, Watched
from .request_metadata import EXTRA, RequestMetadata

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker

# That sample together on a CPU: what sampling leaves of more is handed back to the machine and had anew every step.
ROWS = 16
# vLLM's: temperatures below are greedy.
GREEDY = 1e-5


class ExitWorker(Worker):
    """What can be called from outside begins with `exits_`, for none may be vLLM's own."""

    model_runner: Any

    def load_model(self, **options: Any) -> None:
        super().load_model(**options)
        runner = self.model_runner
        # On a GPU `runner.model` is what captures and replays graphs of it.
        model = runner.get_model()
        assert isinstance(model, EarlyExit), type(model)
        self._exits_model, self._exits_changed = model, set[str]()
        steps = self._exits_steps = runner.sampler = ExitSampler(runner, model)
        run, sample = runner._model_forward, runner.sample_tokens

        def forward(*args: Any, **kwargs: Any) -> Any:
            model.gated_layers.watched = steps.prepare()
            if model.gated_layers.watched:
                # Rules that see readouts are no part of a graph.
                context = get_forward_context()
                context.skip_compiled, context.cudagraph_runtime_mode = True, CUDAGraphMode.NONE
            try:
                return run(*args, **kwargs)
            finally:
                model.gated_layers.watched = ()

        def sample_tokens(grammar: Any) -> Any:
            output = sample(grammar)
            if steps.outputs:
                output.aux_output_connector_output, steps.outputs = steps.outputs, {}
            return output

        runner._model_forward, runner.sample_tokens = forward, sample_tokens

    def exits_take(self) -> list[Event]:
        """The tokens that have been made since the last call; whether they are the last is not known here."""
        made, self._exits_steps.made = self._exits_steps.made, []
        return made

    @torch.inference_mode()
    def exits_load(self, spec: PolicySpec | None, tensors: dict[str, Tensor] | None) -> None:
        """Make a policy's tensors the model's, in place: adapters merged into the base, or the whole base, and gates.
        None: the base without gates."""
        self._exits_model.replace_weights(self._exits_changes(spec, tensors or {}))

    def _exits_changes(self, spec: PolicySpec | None, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """What isn't the base's, or wasn't: other tensors are neither read nor written. W + scale · B A in float32, as
        the embedded engine merges, where the model is."""
        device, source = self.model_runner.device, HFDirectory(Path(self.model_runner.model_config.model))
        for name in source.dims.tensor_shapes():
            prefix = name.removesuffix(".weight")
            down, up = (tensors.get(f"{prefix}.{factor}.weight") for factor in ("lora_A", "lora_B"))
            if name in tensors:
                changed = tensors[name]
            elif spec is not None and down is not None and up is not None:
                base, down, up = (one.float() for one in to_device([source.tensor(name), down, up], device))
                changed = torch.addmm(base, up, down, alpha=spec.scale)
            else:
                if name in self._exits_changed:
                    yield name, source.tensor(name)
                    self._exits_changed.discard(name)
                continue
            self._exits_changed.add(name)
            yield name, changed
        source.close()
        yield from ((name, tensor) for name, tensor in tensors.items() if name.startswith("gates."))


class Draws(nn.Module):
    """Stands in place of the part of vLLM's sampler that draws tokens: by the numbers that are set here, one per row,
    where there are any. Penalties, biases, grammars and log-probabilities stay vLLM's."""

    def __init__(self, plain: nn.Module):
        super().__init__()
        self.plain = plain
        self.uniform: Tensor | None = None
        self.logprobs: Tensor | None = None

    def forward(
        self, logits: Tensor, generators: Any, k: Tensor | None, p: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """logits float32 [R, V], temperature applied, k int [R], p float [R] -> tokens int64 [R], logits or
        log-probabilities [R, V] if vLLM is to report those. `logprobs` float32 [R]: of what was drawn from."""
        if self.uniform is None:
            return self.plain(logits, generators, k, p)
        rows = len(logits)
        k, p = (None if bound is None else to_host(bound)[0] for bound in (k, p))
        kinds: dict[tuple[int, float], list[int]] = {}
        for i, kind in enumerate(
            zip([0] * rows if k is None else k.tolist(), [1.0] * rows if p is None else p.tolist(), strict=True)
        ):
            kinds.setdefault(kind, []).append(i)
        remaining = logits
        for (top_k, top_p), which in kinds.items():
            if 0 < top_k < logits.shape[-1] or top_p < 1:
                # A bound that keeps all is vLLM's way to say none.
                remaining = remaining.clone() if remaining is logits else remaining
                remaining[which] = truncate(logits[which], top_k if top_k < logits.shape[-1] else 0, top_p)
        tokens, self.logprobs = inverse_cdf(remaining, self.uniform)
        if self.plain.logprobs_mode == "processed_logits":
            return tokens, remaining
        return tokens, remaining.log_softmax(dim=-1) if self.plain.logprobs_mode == "processed_logprobs" else None


class Batch:
    """The runner's requests in its order, as arrays: which are `ours`, and of these the `users`, whose tokens vLLM
    chooses, bool [N]; int64 [N] lengths of prompts; uint64 [N] keys; by rule, and of rollouts by sampling, which they
    are, bool [N]."""

    def __init__(self, names: list[str], requests: list[RequestMetadata | None]):
        self.names, self.requests = names, requests
        self.ours = np.array([one is not None for one in requests], dtype=bool)
        self.prompts = np.array([one.prompt if one else 0 for one in requests], dtype=np.int64)
        self.keys = np.array([one.key if one else 0 for one in requests], dtype=np.uint64)
        self.users = np.array([bool(one and one.sampling is None) for one in requests], dtype=bool)
        # Of these every token's exit is given.
        self.prescribed = np.array([bool(one and one.prescribed) for one in requests], dtype=bool)
        self.rules: dict[ExitRule, np.ndarray] = {}
        self.samplings: dict[SamplingParams, np.ndarray] = {}
        for i, one in enumerate(requests):
            if one is not None:
                self.rules.setdefault(one.rule, np.zeros(len(requests), dtype=bool))[i] = True
                if one.sampling is not None:
                    self.samplings.setdefault(one.sampling, np.zeros(len(requests), dtype=bool))[i] = True

    @property
    def made(self) -> np.ndarray:
        """int64 [N]: tokens that there are of each answer."""
        return np.array([len(one.depths) if one else 0 for one in self.requests], dtype=np.int64)


class ExitSampler(nn.Module):
    """Stands in place of the runner's sampler, and before its forward pass. Requests without `EXTRA` never exit and are
    sampled by vLLM; those of users have depths here, and are sampled by vLLM with this package's random numbers."""

    def __init__(self, runner: Any, model: Any):
        super().__init__()
        self.runner, self.model, self.exit_depths = runner, model, model.exit_depths
        self.plain = runner.sampler
        # What else the runner has of its sampler, for the log-probabilities of prompts.
        for name in ("logprobs_mode", "compute_logprobs", "gather_logprobs"):
            setattr(self, name, getattr(self.plain, name))
        self.draws = self.plain.topk_topp_sampler = Draws(self.plain.topk_topp_sampler)
        self.made: list[Event] = []
        # What goes back with users' tokens: depth, log-probabilities of token and exit, float64 [1, 3].
        self.outputs: dict[str, AuxRequestOutput] = {}
        self._metadata: dict[str, RequestMetadata] = {}
        self._batch = Batch([], [])
        self._bounds, self._fine = _host(model.bounds), _host(model.fine)

    def batch(self) -> Batch:
        names = self.runner.input_batch.req_ids[: self.runner.input_batch.num_reqs]
        if names != self._batch.names:
            self._metadata = {name: one for name, one in self._metadata.items() if name in self.runner.requests}
            self._batch = Batch(list(names), [self.metadata(name) for name in names])
        return self._batch

    def metadata(self, request: str) -> RequestMetadata | None:
        extra = (self.runner.requests[request].sampling_params.extra_args or {}).get(EXTRA)
        if extra is None:
            return None
        if request not in self._metadata:
            self._metadata[request] = RequestMetadata.of(extra)
        return self._metadata[request]

    # ---- before the model runs ----

    def prepare(self) -> list[Watched]:
        """Tells the model the bounds of what the runner has scheduled, for each request a stretch of positions."""
        batch, device = self.batch(), self.model.bounds.device
        starts = self.runner.query_start_loc.np[: len(batch.names) + 1].astype(np.int64)
        total, exits = int(starts[-1]), len(self.exit_depths)
        bounds, fine = self._bounds.numpy()[:total], self._fine.numpy()[:total]
        bounds.fill(NEVER)
        fine.fill(False)
        # Position prompt - 1 + t predicts token t. Token 0 comes from the prompt, whose last position may exit or not.
        begin = self.runner.input_batch.num_computed_tokens_cpu[: len(batch.names)] - batch.prompts + 1
        end = begin + np.diff(starts)
        first = np.maximum(begin, 0 if self.model.first_token else 1)
        counts = np.where(batch.ours, np.maximum(end - first, 0), 0)
        row = np.repeat(np.arange(len(batch.names)), counts)
        token = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts) + first[row]
        place = starts[row] + token - begin[row]
        watched = []
        if exits and len(row):
            drawn = uniforms(batch.keys[row], token, exits + 1)
            said = batch.prescribed[row] | (token < batch.made[row])
            for rule, members in batch.rules.items():
                which = np.flatnonzero(members[row] & ~said)
                if not len(which):
                    continue
                at, names = place[which], [("", 0, t) for t in token[which].tolist()]
                ahead = rule.hazard_bounds(drawn[which], self.exit_depths, names)
                if ahead is not None:
                    bounds[at], fine[at] = ahead, rule.compares_in_float64
                    continue
                assert (token[which] == end[row[which]] - 1).all(), "a rule that sees readouts decides token by token"
                places, numbers = to_device((torch.from_numpy(at), torch.from_numpy(drawn[which])), device)
                watched.append(
                    Watched(
                        rule, places, names, numbers,
                        torch.zeros(len(at), rule.state_size, dtype=torch.float64, device=device), self.model.readout,
                    )
                )  # fmt: skip
            which = np.flatnonzero(said)
            if len(which):
                pairs = zip(row[which].tolist(), token[which].tolist(), strict=True)
                given = np.array([batch.requests[i].said(t) for i, t in pairs])  # type: ignore[union-attr]
                bounds[place[which]] = forced_bounds(given[:, None] == np.array(self.exit_depths), self.exit_depths)
        for host, buffer in ((self._bounds, self.model.bounds), (self._fine, self.model.fine)):
            if host is not buffer:
                buffer[:total].copy_(host[:total], non_blocking=True)
        return watched

    # ---- after it ----

    def forward(self, logits: Tensor, sampling_metadata: Any, **options: Any) -> SamplerOutput:
        """Logits [requests, V] -> the next tokens, this package's where a request has `EXTRA`."""
        batch = self.batch()
        if not batch.ours.any():
            return self.plain(logits=logits, sampling_metadata=sampling_metadata, **options)
        # Rows in the middle of a prompt have logits too, which nobody wants.
        wanted = ~self.runner.discard_request_mask.np[: len(batch.names)]
        made, newest = batch.made, self._newest()
        tokens = torch.zeros(len(batch.names), dtype=torch.int32, device=logits.device)
        others, users, drawn = None, np.empty(0, dtype=np.int64), list[tuple[np.ndarray, Sequence[Tensor]]]()
        if batch.users.any() or not batch.ours.all():
            users = np.flatnonzero(batch.users & wanted)
            others, logprobs = self._by_vllm(batch, users, logits, sampling_metadata, options)
            tokens.copy_(others.sampled_token_ids[:, 0])
            drawn.append((users, [logprobs]))
        for params, members in batch.samplings.items():
            every = np.flatnonzero(members & wanted)
            step = ROWS if logits.device.type == "cpu" else max(1, len(every))
            for rows in (every[at : at + step] for at in range(0, len(every), step)):
                which = to_device(torch.from_numpy(rows), logits.device)
                uniform = self._uniform(batch, rows, made)
                # Neighbours mostly: no copy then.
                together = rows[-1] - rows[0] + 1 == len(rows)
                wide = (logits[rows[0] : rows[-1] + 1] if together else logits[which]).float()
                states = [self.runner.requests[batch.names[i]] for i in rows] if params.is_penalised else ()
                histories = [(s.prompt_token_ids, s.output_token_ids) for s in states]
                sampled = sample_tokens(wide, params, uniform, histories)
                given = [
                    (j, one.given[len(one.depths)])
                    for j, i in enumerate(rows.tolist())
                    if (one := batch.requests[i]) is not None and len(one.depths) < len(one.given)
                ]
                if given:
                    sampled = prescribe(wide, params, sampled, given)
                tokens[which] = sampled[0].to(torch.int32)
                drawn.append((rows, sampled))
        # The only wait of a step, with all its kernels on their way.
        depths, exits, *found = (x.tolist() for x in to_host(*newest, *(x for _, columns in drawn for x in columns)))
        columns = iter(found)
        asked = self.model.gated & ((made > 0) | self.model.first_token)
        for rows, parts in drawn:
            for i, *values in zip(rows.tolist(), *(next(columns) for _ in parts), strict=True):
                one, exit_logprob = batch.requests[i], exits[i] if asked[i] else 0.0
                assert one is not None
                if one.sampling is None:
                    row = np.array([[depths[i], *values, exit_logprob]])
                    self.outputs[batch.names[i]] = AuxRequestOutput(len(one.depths), row)
                else:
                    token, logprob, full = values
                    self.made.append(Event(one.name, token, depths[i], logprob, full, exit_logprob, None))
                one.depths.append(depths[i])
        tensors = None if others is None else others.logprobs_tensors
        return SamplerOutput(sampled_token_ids=tokens.unsqueeze(-1), logprobs_tensors=tensors)

    def _by_vllm(
        self, batch: Batch, users: np.ndarray, logits: Tensor, sampling_metadata: Any, options: dict[str, Any]
    ) -> tuple[SamplerOutput, Tensor]:
        """vLLM's choice for all rows; the log-probabilities of those of `users`, int64 [U] -> float32 [U]."""
        if len(users):
            # Nobody asks what the others of these rows draw: they are in the middle of a prompt.
            where = to_device(torch.from_numpy(users), logits.device)
            uniform = torch.zeros(len(batch.names), dtype=torch.float64, device=logits.device)
            uniform[where] = self._uniform(batch, users, batch.made)
            self.draws.uniform = uniform
        try:
            output = self.plain(logits=logits.clone(), sampling_metadata=sampling_metadata, **options)
        finally:
            self.draws.uniform = None
        if not len(users):
            return output, logits.new_empty(0)
        # A greedy choice has the log-probability of temperature 1.
        logprobs = log_prob(logits.float(), output.sampled_token_ids[:, 0].long())
        if not sampling_metadata.all_greedy:
            assert self.draws.logprobs is not None
            random = sampling_metadata.temperature >= GREEDY
            logprobs = torch.where(random, self.draws.logprobs, logprobs)
        return output, logprobs[where]

    def _uniform(self, batch: Batch, rows: np.ndarray, made: np.ndarray) -> Tensor:
        """float64 [R]: the numbers that draw the next tokens of these rows."""
        drawn = uniforms(batch.keys[rows], made[rows], len(self.exit_depths) + 1)[:, -1]
        return to_device(torch.from_numpy(drawn), self.runner.device)

    def _newest(self) -> tuple[Tensor, Tensor]:
        """Depth and exit log-probability of each request's newest position, [N]."""
        ends = self.runner.query_start_loc.np[1 : self.runner.input_batch.num_reqs + 1]
        newest = to_device(torch.from_numpy(ends - 1), self.model.depths.device)
        return self.model.depths[newest], self.model.logprobs[newest]


def _host(buffer: Tensor) -> Tensor:
    """Where the host writes what goes into `buffer`: itself on a CPU."""
    return buffer if buffer.device.type == "cpu" else torch.empty_like(buffer, device="cpu", pin_memory=True)
