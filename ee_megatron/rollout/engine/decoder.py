"""The policy in plain PyTorch: parallel forward with the frozen mask, cached decoding that skips layers after an exit.

Dense models of families/. What an exit does: docs/method.md. Shapes: B sequences, T positions, R cache rows,
D hidden, L layers, M exits, H query heads, KVH key/value heads, hd head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...exits import ExitLayout
from ...families import inverse_frequencies
from ...families.hf_directory import HFDirectory, read_eos_ids
from ...policy import PolicySpec
from ...tensors import ModelSource, to_device, to_host
from .cache import KVCache, Prefilled
from .layer_backends import RotaryPositions, Rows, TorchOps, choose_ops, norm
from .weights import DecoderWeights, GateWeights, PartialLoad, SkippedKV, gates_from

Prefix = Prefilled | Sequence[Prefilled]
"""What was prefilled before sequences: the same for all, or one for each, all of one length."""


class Decoder:
    """A whole model for generation. `from_hf` makes one; `load_policy` sets adapters and gates (None: the teacher).

    A policy may come in chunks instead: `load_chunk` any number of times, then `finish_load`.
    """

    def __init__(self, weights: DecoderWeights, spec: PolicySpec | None, eos_ids: frozenset[int] = frozenset()):
        if spec is not None and spec.num_layers != weights.dims.num_layers:
            raise ValueError(
                f"the policy has {spec.num_layers} layers, the model {weights.dims.num_layers}; use the policy's model"
            )
        self.weights, self.dims, self.spec, self.eos_ids = weights, weights.dims, spec, eos_ids
        self.dtype, self.device = weights.dtype, weights.device
        self.layout = spec.layout if spec else ExitLayout(self.dims.num_layers, ())
        self.gates: list[GateWeights] | None = None
        self.ops = choose_ops(self.dims, self.dtype, self.device)
        self._inverse_frequencies = inverse_frequencies(self.dims).to(self.device)
        self._cos = self._sin = torch.empty(0, self.dims.head_dim // 2, device=self.device)
        self._skipped: list[SkippedKV] = []
        self._loading: PartialLoad | None = None
        self.load_policy(None)

    @staticmethod
    def from_hf(path: str | Path, spec: PolicySpec | None, dtype: torch.dtype, device: torch.device | str) -> Decoder:
        """Read a Hugging Face directory. Raises FileNotFoundError or ValueError as `HFDirectory` does."""
        return Decoder.of(HFDirectory(path), spec, dtype, device)

    @staticmethod
    def of(
        source: HFDirectory | ModelSource, spec: PolicySpec | None, dtype: torch.dtype, device: torch.device | str
    ) -> Decoder:
        """Make a decoder of the model in `source`."""
        return Decoder(DecoderWeights(source, dtype, torch.device(device)), spec, read_eos_ids(source))

    def use(self, ops: TorchOps) -> None:
        """Use these layer backends instead of the chosen ones."""
        self.ops = ops
        ops.set_layers(self.weights.blocks)

    # ---- weights ----

    @torch.inference_mode()
    def load_policy(self, tensors: dict[str, Tensor] | None) -> None:
        """Merge adapters (or take over a fully fine-tuned base) and set gates; None: the original base, no gates.

        After full fine-tuning None reads the Hugging Face directory again. Raises ValueError, with the weights as they
        were, if the tensors don't fit the spec.
        """
        if tensors is not None:
            whole = PartialLoad(self._needed_spec(), self.dims)
            whole.check(tensors)
            whole.check_whole(tensors)
            self._loading = None
            self.load_chunk(tensors)
            self.finish_load()
            return
        self._loading = None
        self.weights.restore_base()
        self.gates, self._skipped = None, self.weights.merge(None, None, self.layout.depths)
        self.ops.set_layers(self.weights.blocks)

    def load_chunk(self, tensors: dict[str, Tensor]) -> None:
        """Load some of a policy's tensors. From the first chunk to `finish_load` the decoder can't answer.

        Tensors of the base are written over the old ones, so that the model is never held twice; `load_policy(None)`
        is the way back from a load that broke off. Raises ValueError for a name or shape that isn't the spec's.
        """
        if self._loading is None:
            spec = self._needed_spec()
            if not spec.full:
                self.weights.restore_base()
            self._loading = PartialLoad(spec, self.dims)
        self._loading.take(tensors, self.weights)

    @torch.inference_mode()
    def finish_load(self) -> None:
        """Activate the loaded tensors. Raises ValueError if some are missing."""
        if self._loading is None:
            raise ValueError("finish_load without tensors; send them by load_chunk first")
        self._loading.check_whole()
        tensors = self._loading.retained
        self._skipped = self.weights.merge(tensors, self.spec, self.layout.depths)
        self.ops.set_layers(self.weights.blocks)
        self.gates = gates_from(tensors, self.layout.depths, self.dtype, self.device)
        self._loading = None

    def _needed_spec(self) -> PolicySpec:
        if self.spec is None:
            raise ValueError("policy tensors given to a decoder without a PolicySpec; pass the spec when making it")
        return self.spec

    def _check_ready(self) -> None:
        if self._loading is not None:
            raise ValueError(
                f"weights are half loaded ({len(self._loading.seen)} of {len(self._loading.expected)} tensors); "
                "send the rest and finish_load, or load_policy again"
            )

    # ---- pieces of the model ----

    def norm(self, hidden: Tensor, gain: Tensor | None) -> Tensor:
        """RMSNorm of [..., D] with the model's epsilon; gain [D] or None."""
        return norm(hidden, gain, self.dims.rms_eps)

    def readout(self, hidden: Tensor) -> Tensor:
        """Unembed the stream [..., D] at any depth: logits float32 [..., V]."""
        return self.weights.head(self.norm(hidden, self.weights.final_norm))

    def current_readout(self) -> Callable[[Tensor], Tensor]:
        """`readout` with the current weights, even after later loads; copies what full fine-tuning overwrites."""
        if self.spec is None or not self.spec.full:
            return self.readout
        gain, head = self.weights.final_norm.clone(), self.weights.copy_head()
        return lambda hidden: head(self.norm(hidden, gain))

    def gate_logit(self, exit_index: int, hidden: Tensor) -> Tensor:
        """Logit z of gate i on the stream [..., D], float32 [...]. Raises ValueError when no policy is loaded."""
        if self.gates is None:
            raise ValueError("no gates are loaded; call load_policy with the policy's tensors first")
        gate = self.gates[exit_index]
        normalise = self.spec is not None and self.spec.gate_input == "normalised"
        return self.ops.gate(hidden, gate.fc1, gate.fc2, gate.fc2_bias, normalise)

    def _reach(self, longest: int) -> None:
        """Make the rotary tables, float32 [positions, hd / 2], cover positions below `longest`."""
        if longest > len(self._cos):
            steps = torch.arange(max(longest, 2 * len(self._cos)), device=self.device).float()
            angles = steps[:, None] * self._inverse_frequencies
            self._cos, self._sin = angles.cos(), angles.sin()

    # ---- all positions at once ----

    @torch.inference_mode()
    def forward_parallel(
        self, tokens: Tensor, lengths: Tensor, exit_depths: Tensor | None = None, prefix: Prefix | None = None
    ) -> Tensor:
        """Run whole sequences: tokens int64 [B, T] right-padded, lengths [B], exit depths int [B, T] or None (full) ->
        stream [B, T, D]; after a prefix, common to all or one for each, if it is given.

        A position of depth e changes in exactly the first e layers; deeper layers make its key and value from the
        frozen stream. Entries past a length are meaningless. Raises ValueError for a depth outside 1..L or a length
        outside 1..T.
        """
        return self._parallel(tokens, lengths, exit_depths, prefix)[0]

    @torch.inference_mode()
    def forward_with_residuals(
        self,
        tokens: Tensor,
        lengths: Tensor,
        exit_depths: Tensor | None = None,
        prefix: Prefix | None = None,
        at: Sequence[int] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """`forward_parallel` that also returns the stream at each exit depth, M tensors [B, T, D], for gates and
        readouts; or at the depths `at`, which increase and lie in 1..L."""
        residuals_at = self.layout.depths if at is None else tuple(at)
        return self._parallel(tokens, lengths, exit_depths, prefix, residuals_at)[:2]

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, lengths: Tensor, prefix: Prefilled | None = None) -> list[Prefilled]:
        """Prefill prompts [B, T] (right-padded) at full depth, after a common prefix if given; one `Prefilled` each."""
        hidden, _, keys, values = self._parallel(tokens, lengths, None, prefix=prefix, keep_kv=True)
        start = prefix.length if prefix else 0
        return [
            Prefilled(keys[:, b, :n], values[:, b, :n], hidden[b, n - 1], start) for b, n in enumerate(lengths.tolist())
        ]

    def _parallel(
        self,
        tokens: Tensor,
        lengths: Tensor,
        exit_depths: Tensor | None,
        prefix: Prefix | None = None,
        residuals_at: tuple[int, ...] = (),
        keep_kv: bool = False,
    ) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        """The stream [B, T, D], at `residuals_at` too; with `keep_kv` keys and values [L, B, T, KVH, hd]."""
        B, T = tokens.shape
        if len(lengths) != B or int(lengths.min()) < 1 or int(lengths.max()) > T:
            raise ValueError(f"lengths {lengths.tolist()} do not fit tokens of shape {[B, T]}; expected {B} of 1..{T}")
        # The host needs them, to count what runs.
        exit_depths = None if exit_depths is None else to_host(exit_depths)[0]
        if exit_depths is not None and not bool(((exit_depths >= 1) & (exit_depths <= self.dims.num_layers)).all()):
            raise ValueError(
                f"exit depths must lie in 1..{self.dims.num_layers}; give padding and prompts the full depth"
            )
        before = [prefix] * B if isinstance(prefix, Prefilled) else prefix or ()
        past, ends = before[0].length if before else 0, lengths.tolist()
        # Causal, and the whole prefix. Right padding needs no mask of its own: no valid position sees it.
        mask = None if not before else torch.ones(T, past + T, dtype=torch.bool, device=self.device).tril(past)
        self._check_ready()
        self._reach(past + T)
        at = RotaryPositions(torch.arange(past, past + T, device=self.device).repeat(B), self._cos, self._sin)
        ops = self.ops
        # Positions of all sequences one after another; the stream is changed in place.
        stream = self.weights.embedding[to_device(tokens, self.device)].view(B * T, -1)
        residuals, dims = list[Tensor](), self.dims
        shape = (dims.num_layers if keep_kv else 0, B, T, dims.kv_heads, dims.head_dim)
        keys, values = (torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        running = self._running(T, ends, exit_depths)
        for layer, (block, places) in enumerate(zip(self.weights.blocks, running, strict=True)):
            fused = ops.project(stream, block)
            turned = ops.split_and_rotate(fused, at, block)
            q, k, v = (heads.unflatten(0, (B, T)) for heads in turned)
            if keep_kv:
                keys[layer], values[layer] = k, v
            if before:
                k = torch.cat([torch.stack([read.keys[layer] for read in before]), k], dim=1)
                v = torch.cat([torch.stack([read.values[layer] for read in before]), v], dim=1)
            if places is None or len(places):
                attended = ops.attend_parallel(q, k, v, mask, ends).reshape(B * T, -1)
                changed = stream if places is None else stream[places]
                ops.finish(changed, block.linears["out"](attended if places is None else attended[places]), block)
                if places is not None:
                    stream[places] = changed
            if layer + 1 in residuals_at:
                residuals.append(stream.view(B, T, -1).clone())
        return stream.view(B, T, -1), residuals, keys, values

    def _running(self, width: int, ends: Sequence[int], exit_depths: Tensor | None) -> Iterator[Tensor | None]:
        """Yield, per layer, which of the B * `width` positions run it: int64 [N] on the device, None for all. A layer
        still computes keys and values for positions that skip it, except for padding."""
        depths = torch.full((len(ends), width), self.dims.num_layers)
        if exit_depths is not None:
            depths.copy_(exit_depths)
        depths[torch.arange(width) >= torch.tensor(ends)[:, None]] = 0
        known, places = set(depths.unique().tolist()), None
        for layer in range(self.dims.num_layers):
            if layer in known:
                places = to_device((depths.flatten() > layer).nonzero().squeeze(1), self.device)
            yield places

    # ---- one position per row, with the cache ----

    def rows(self, cache: KVCache, slots: Sequence[int], positions: Sequence[int]) -> Rows:
        """`Rows` for A distinct positions in these slots. Raises ValueError for one without a page."""
        self._check_ready()
        where, span = cache.where(slots, positions), 1 + max(positions)
        self._reach(span)
        return Rows(where, span, self._cos, self._sin)

    def run_segment(self, segment: int, hidden: Tensor, cache: KVCache, at: Rows) -> Tensor:
        """Run the layers between exit `segment` - 1 (0: the embedding) and the next: stream [A, D] -> [A, D].

        Writes the rows' keys and values of these layers. `hidden` may be overwritten. Rows may be positions of one
        sequence, of which each sees those before it.
        """
        bounds = (0, *self.layout.outcomes)
        return self.ops.run(bounds[segment], bounds[segment + 1], hidden, cache, at)

    def write_skipped(self, hidden: Tensor, outcome: list[int], cache: KVCache, at: Rows) -> None:
        """Write keys and values in the layers that rows, ordered by outcome, skipped; streams [A, D] at their exits.
        One stacked product per stretch between exits, over the rows that skipped it."""
        early = sum(o < len(self._skipped) for o in outcome)
        if not early:
            return
        normed = hidden[:early] if self.dims.norm_after else self.ops.add_norm(hidden[:early], None, None)
        for i, skipped in enumerate(self._skipped):
            count = sum(o <= i for o in outcome[:early])
            if count:
                fused = skipped.linear(normed[:count])
                if skipped.whole_norm is not None:
                    keys, values = fused.unflatten(-1, (skipped.layers, 2, -1)).unbind(2)
                    keys = self.norm(keys, None) * skipped.whole_norm
                    fused = torch.stack([keys, values], dim=2).flatten(1)
                self.ops.write_kv(fused, cache, at, skipped)
