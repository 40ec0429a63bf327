"""The policy in plain PyTorch: parallel forward with the frozen mask, cached decoding that skips work after an exit.

Dense Llama, Qwen2 and Qwen3. What an exit does: docs/method.md. Shapes: B sequences, T positions, R cache rows,
D hidden, L layers, M exits, H query heads, KVH key/value heads, hd head size, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..exits import ExitLayout
from ..families import inverse_frequencies
from ..families.hf_directory import HFDirectory
from ..policy import PolicySpec
from .cache import KVCache
from .weights import DecoderWeights, DeepKV

# Called at exit i with the stream h [A, D], gate logits [A] (None without gates) and cache rows [A] of those still
# running; returns bool [A], true where a row leaves, or None if none does.
ExitChooser = Callable[[int, Tensor, Tensor | None, Tensor], Tensor | None]

# Under this share of running rows their cache rows are gathered; above it the queries are scattered to the whole batch.
GATHER_SHARE = 0.5


@dataclass
class Gate:
    """fc1 [w, D] and its bias [w], fc2 [1, w] and its bias [1], float32 whatever the model's dtype."""

    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor
    fc2_bias: Tensor


@dataclass
class Prefilled:
    """A sequence read in parallel: keys, values [L, T, KVH, hd] from `start` on; hidden [D] of the last position."""

    keys: Tensor
    values: Tensor
    hidden: Tensor
    start: int


@dataclass
class StepOutput:
    """hidden [R, D] at each row's exit; outcome int64 [R] in 0..M; gate_logits float32 [R, M], 0 where not asked."""

    hidden: Tensor
    outcome: Tensor
    gate_logits: Tensor


@dataclass
class _Running:
    """What attention needs about the A rows still running: cache rows, positions [A], rotary tables, mask [·, 1, 1, S].

    `whole` while nobody has left; then `gather` says whether cache rows are copied together or queries spread out.
    """

    rows: Tensor
    positions: Tensor
    cos: Tensor
    sin: Tensor
    full_mask: Tensor
    mask: Tensor
    whole: bool = True
    gather: bool = False

    def narrow(self, stay: Tensor) -> _Running:
        rows = self.rows[stay]
        gather = len(rows) < GATHER_SHARE * len(self.full_mask)
        mask = self.full_mask[rows] if gather else self.full_mask
        return _Running(
            rows, self.positions[stay], self.cos[stay], self.sin[stay], self.full_mask, mask, whole=False, gather=gather
        )


class Decoder:
    """A whole replica of the model. `from_hf` makes one; `load_policy` sets adapters and gates (None: the teacher)."""

    def __init__(self, weights: DecoderWeights, spec: PolicySpec | None, eos_ids: frozenset[int] = frozenset()):
        if spec is not None and spec.num_layers != weights.dims.num_layers:
            raise ValueError(
                f"the policy has {spec.num_layers} layers, the model {weights.dims.num_layers}; use the policy's model"
            )
        self.weights, self.dims, self.spec, self.eos_ids = weights, weights.dims, spec, eos_ids
        self.dtype, self.device = weights.dtype, weights.device
        self.layout = spec.layout if spec else ExitLayout(self.dims.num_layers, ())
        self.gates: list[Gate] | None = None
        self._inverse_frequencies = inverse_frequencies(self.dims).to(self.device)
        self._cos = self._sin = torch.empty(0, self.dims.head_dim, dtype=self.dtype, device=self.device)
        self._deep: DeepKV | None = None
        self.load_policy(None)

    @staticmethod
    def from_hf(path: str | Path, spec: PolicySpec | None, dtype: torch.dtype, device: torch.device | str) -> Decoder:
        """Read a Hugging Face directory. Raises FileNotFoundError or ValueError as `HFDirectory` does."""
        source = HFDirectory(path)
        decoder = Decoder(DecoderWeights(source, dtype, torch.device(device)), spec, read_eos_ids(source))
        source.close()
        return decoder

    @torch.inference_mode()
    def load_policy(self, tensors: dict[str, Tensor] | None) -> None:
        """Merge adapters and set gates; None: base weights, no gates. Raises ValueError if they don't fit the spec."""
        if tensors is not None:
            if self.spec is None:
                raise ValueError("policy tensors given to a decoder without a PolicySpec; pass the spec when making it")
            check_tensors(tensors, self.spec.tensor_shapes(self.dims))
        self.weights.merge(tensors, self.spec)
        self.gates = None
        if tensors is not None:
            parts = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
            self.gates = [
                Gate(*(tensors[f"gates.{depth}.{part}"].to(self.device, torch.float32).clone() for part in parts))
                for depth in self.layout.depths
            ]
        self._deep = self.weights.deep_kv(self.layout.depths[0]) if self.layout.depths else None

    # ---- pieces of the model ----

    def norm(self, hidden: Tensor, gain: Tensor | None) -> Tensor:
        """RMSNorm over the last axis: float32 statistics, rounded to the dtype before the gain, as in transformers."""
        if hidden.dtype == torch.float32:
            return F.rms_norm(hidden, hidden.shape[-1:], gain, self.dims.rms_eps)
        wide = hidden.float()
        normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.dims.rms_eps)).to(hidden.dtype)
        return normed if gain is None else normed * gain

    def readout(self, hidden: Tensor) -> Tensor:
        """Stream [..., D] at any depth -> logits float32 [..., V]."""
        return F.linear(self.norm(hidden, self.weights.final_norm), self.weights.head).float()

    def gate_logit(self, exit_index: int, hidden: Tensor) -> Tensor:
        """Gate i on the stream [..., D] -> z float32 [...]. Raises ValueError when no policy is loaded."""
        if self.gates is None:
            raise ValueError("no gates are loaded; call load_policy with the policy's tensors first")
        gate, wide = self.gates[exit_index], hidden.float()
        if self.spec is not None and self.spec.gate_input == "normalised":
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.dims.rms_eps)
        inner = F.relu(F.linear(wide, gate.fc1, gate.fc1_bias))
        return F.linear(inner, gate.fc2, gate.fc2_bias).squeeze(-1)

    def _rotary(self, positions: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """cos, sin [..., 1, hd] at integer positions [...] < longest; the tables grow as needed."""
        if longest > len(self._cos):
            steps = torch.arange(max(longest, 2 * len(self._cos)), device=self.device).float()
            angles = steps[:, None] * self._inverse_frequencies
            angles = torch.cat([angles, angles], dim=-1)
            self._cos, self._sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        return self._cos[positions].unsqueeze(-2), self._sin[positions].unsqueeze(-2)

    def _qkv(self, layer: int, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Stream [..., D] -> q [..., H, hd], k and v [..., KVH, hd], normed where the family does and rotated."""
        block, dims = self.weights.blocks[layer], self.dims
        fused = F.linear(self.norm(hidden, block.attention_norm), block.matrices["qkv"], block.biases["qkv"])
        heads = fused.unflatten(-1, (dims.heads + 2 * dims.kv_heads, dims.head_dim))
        q, k, v = heads.split([dims.heads, dims.kv_heads, dims.kv_heads], dim=-2)
        if block.q_norm is not None:
            q, k = self.norm(q, block.q_norm), self.norm(k, block.k_norm)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def _after_attention(self, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
        """Output projection, MLP and both residual sums: stream [..., D], attended [..., H·hd] -> stream [..., D]."""
        block = self.weights.blocks[layer]
        hidden = hidden + F.linear(attended, block.matrices["out"], block.biases["out"])
        normed = self.norm(hidden, block.mlp_norm)
        gate, up = F.linear(normed, block.matrices["gate_up"], block.biases["gate_up"]).chunk(2, dim=-1)
        return hidden + F.linear(F.silu(gate) * up, block.matrices["down"], block.biases["down"])

    # ---- all positions at once ----

    @torch.inference_mode()
    def forward_parallel(self, tokens: Tensor, lengths: Tensor, exit_depths: Tensor | None = None) -> Tensor:
        """tokens int64 [B, T] right-padded, lengths [B], exit depths int [B, T] or None (full) -> stream [B, T, D].

        A position of depth e changes in exactly the first e layers; deeper layers make its key and value from the
        frozen stream. Entries past a length are meaningless. Raises ValueError for a depth outside 1..L or a length
        outside 1..T.
        """
        return self._parallel(tokens, lengths, exit_depths)[0]

    @torch.inference_mode()
    def forward_with_residuals(
        self, tokens: Tensor, lengths: Tensor, exit_depths: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """As `forward_parallel`, with the stream at each exit depth, M tensors [B, T, D], for gates and readouts."""
        hidden, residuals, _, _ = self._parallel(tokens, lengths, exit_depths, residuals_at=self.layout.depths)
        return hidden, residuals

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, lengths: Tensor, prefix: Prefilled | None = None) -> list[Prefilled]:
        """Read prompts [B, T] (right-padded) at full depth, after a common prefix if given -> one `Prefilled` each."""
        hidden, _, keys, values = self._parallel(tokens, lengths, None, prefix=prefix, keep_kv=True)
        start = prefix.keys.shape[1] if prefix else 0
        ends = lengths.tolist()
        k_LBT, v_LBT = torch.stack(keys), torch.stack(values)
        return [Prefilled(k_LBT[:, b, :n], v_LBT[:, b, :n], hidden[b, n - 1], start) for b, n in enumerate(ends)]

    def _parallel(
        self,
        tokens: Tensor,
        lengths: Tensor,
        exit_depths: Tensor | None,
        prefix: Prefilled | None = None,
        residuals_at: tuple[int, ...] = (),
        keep_kv: bool = False,
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        B, T = tokens.shape
        if len(lengths) != B or int(lengths.min()) < 1 or int(lengths.max()) > T:
            raise ValueError(f"lengths {lengths.tolist()} do not fit tokens of shape {[B, T]}; expected {B} of 1..{T}")
        if exit_depths is not None and not bool(((exit_depths >= 1) & (exit_depths <= self.dims.num_layers)).all()):
            raise ValueError(
                f"exit depths must lie in 1..{self.dims.num_layers}; give padding and prompts the full depth"
            )
        past = prefix.keys.shape[1] if prefix else 0
        # Right padding needs no mask of its own: under causal attention no valid position sees it.
        mask = None if prefix is None else self._prefix_mask(past, T)
        cos, sin = self._rotary(torch.arange(past, past + T, device=self.device), past + T)
        hidden = self.weights.embedding[tokens.to(self.device)]
        residuals: list[Tensor] = []
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for layer in range(self.dims.num_layers):
            q, k, v = self._qkv(layer, hidden, cos, sin)
            if keep_kv:
                keys.append(k)
                values.append(v)
            if prefix is not None:
                k = torch.cat([prefix.keys[layer].expand(B, -1, -1, -1), k], dim=1)
                v = torch.cat([prefix.values[layer].expand(B, -1, -1, -1), v], dim=1)
            attended = F.scaled_dot_product_attention(
                q.transpose(1, 2),
                k.transpose(1, 2),
                v.transpose(1, 2),
                attn_mask=mask,
                is_causal=mask is None,
                enable_gqa=self.dims.heads != self.dims.kv_heads,
            )
            new = self._after_attention(layer, hidden, attended.transpose(1, 2).flatten(-2))
            hidden = new if exit_depths is None else torch.where((exit_depths > layer)[..., None], new, hidden)
            if layer + 1 in residuals_at:
                residuals.append(hidden)
        return hidden, residuals, keys, values

    def _prefix_mask(self, past: int, steps: int) -> Tensor:
        """bool [T, past + T]: the whole prefix, and causally what follows it."""
        own = torch.ones(steps, steps, dtype=torch.bool, device=self.device).tril()
        return torch.cat([torch.ones(steps, past, dtype=torch.bool, device=self.device), own], dim=1)

    # ---- one position per row, with the cache ----

    @torch.inference_mode()
    def step(self, cache: KVCache, tokens: Tensor, positions: Tensor, choose: ExitChooser | None) -> StepOutput:
        """Read one token int64 [R] per cache row 0..R-1 at its position int64 [R]; `choose` decides exits (None: none).

        Rows run segment by segment between exits; a row that leaves pays for nothing deeper but its keys and values,
        which come from one stacked product per step and are in the cache when this returns.
        """
        M = len(self.layout.depths)
        span = int(positions.max()) + 1
        if span > cache.capacity:
            raise ValueError(f"position {span - 1} outside the cache of {cache.capacity}; make it larger")
        running = self._everyone(positions, span)
        hidden = self.weights.embedding[tokens]
        output = StepOutput(
            torch.empty_like(hidden),
            torch.full_like(tokens, M),
            torch.zeros(len(tokens), M, dtype=torch.float32, device=self.device),
        )
        left: list[tuple[int, Tensor]] = []
        bounds = (0, *self.layout.outcomes)
        for i in range(M + 1):
            for layer in range(bounds[i], bounds[i + 1]):
                hidden = self._step_layer(layer, hidden, cache, running, span)
            if i == M or choose is None:
                continue
            logit = self.gate_logit(i, hidden) if self.gates is not None else None
            if logit is not None:
                output.gate_logits[running.rows, i] = logit
            leave = choose(i, hidden, logit, running.rows)
            if leave is None or not bool(leave.any()):
                continue
            gone = running.rows[leave]
            output.hidden[gone] = hidden[leave]
            output.outcome[gone] = i
            left.append((i, gone))
            hidden, running = hidden[~leave], running.narrow(~leave)
            if not len(hidden):
                break
        output.hidden[running.rows] = hidden
        self._write_deep(cache, output.hidden, positions, left)
        return output

    def _everyone(self, positions: Tensor, span: int) -> _Running:
        cos, sin = self._rotary(positions, span)
        seen = torch.arange(span, device=self.device) <= positions[:, None]
        mask = torch.zeros(seen.shape, dtype=self.dtype, device=self.device).masked_fill_(~seen, float("-inf"))
        mask = mask[:, None, None, :]
        return _Running(torch.arange(len(positions), device=self.device), positions, cos, sin, mask, mask)

    def _step_layer(self, layer: int, hidden: Tensor, cache: KVCache, running: _Running, span: int) -> Tensor:
        """One layer for the running rows, stream [A, D] -> [A, D]; writes their keys and values."""
        q, k, v = self._qkv(layer, hidden, running.cos, running.sin)
        keys, values = cache.keys[layer], cache.values[layer]
        keys[running.rows, running.positions] = k
        values[running.rows, running.positions] = v
        # The query heads that share a key/value head take the place of query positions: no head is repeated.
        q = q.unflatten(1, (self.dims.kv_heads, -1))
        if running.gather:
            k_used, v_used = keys[running.rows, :span], values[running.rows, :span]
        else:
            count = len(running.full_mask)
            k_used, v_used = keys[:count, :span], values[:count, :span]
            if not running.whole:
                q = q.new_zeros(count, *q.shape[1:]).index_copy_(0, running.rows, q)
        attended = F.scaled_dot_product_attention(
            q, k_used.transpose(1, 2), v_used.transpose(1, 2), attn_mask=running.mask
        ).flatten(1)
        if not (running.whole or running.gather):
            attended = attended[running.rows]
        return self._after_attention(layer, hidden, attended)

    def _write_deep(self, cache: KVCache, hidden: Tensor, positions: Tensor, left: list[tuple[int, Tensor]]) -> None:
        """Keys and values of the rows that left, for all layers that they skip: one product, one write per exit."""
        if not left or self._deep is None:
            return
        dims, first = self.dims, self.layout.depths[left[0][0]]
        offset = first - self._deep.first
        rows = torch.cat([gone for _, gone in left])
        normed = self.norm(hidden[rows], None)
        skip = offset * 2 * dims.kv_size
        bias = None if self._deep.bias is None else self._deep.bias[skip:]
        fused = F.linear(normed, self._deep.weight[skip:], bias)
        kv = fused.unflatten(-1, (dims.num_layers - first, 2, dims.kv_heads, dims.head_dim))
        k, v = kv[:, :, 0], kv[:, :, 1]
        if self._deep.k_norm is not None:
            k = self.norm(k, None) * self._deep.k_norm[offset:]
        at = positions[rows]
        cos, sin = self._cos[at][:, None, None], self._sin[at][:, None, None]
        k_LR, v_LR = rotate(k, cos, sin).transpose(0, 1), v.transpose(0, 1)
        start = 0
        for i, gone in left:
            depth, stop = self.layout.depths[i], start + len(gone)
            where = (slice(depth, None), gone, at[start:stop])
            cache.keys[where] = k_LR[depth - first :, start:stop]
            cache.values[where] = v_LR[depth - first :, start:stop]
            start = stop


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in Hugging Face's convention (first half of the head paired with the second): x [..., hd], same shape."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def check_tensors(tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError with one line unless names and shapes are exactly the expected ones."""
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        what = f"lack {missing[0]}" if missing else f"hold the unknown {extra[0]}"
        count = len(missing) + len(extra)
        raise ValueError(
            f"policy tensors {what} ({count} names differ); load weights made with the same policy settings"
        )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"policy tensor {name} has shape {list(tensors[name].shape)}, expected {list(shape)}")


def read_eos_ids(source: HFDirectory) -> frozenset[int]:
    """End-of-sequence ids from generation_config.json, else config.json; empty if neither names one."""
    generation = source.path / "generation_config.json"
    stated = json.loads(generation.read_text()).get("eos_token_id") if generation.is_file() else None
    ids = stated if stated is not None else source.config.get("eos_token_id")
    return frozenset(ids if isinstance(ids, list) else [] if ids is None else [ids])
