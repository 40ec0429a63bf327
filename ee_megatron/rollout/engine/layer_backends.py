"""The decoder's layers for one position per row, in PyTorch and by compiled kernels.

The results of both are the same up to rounding. Shapes: A rows, D hidden, H query heads, KVH key/value heads, hd head
size, I MLP width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...families import ModelDims
from ...kernels import Panels, compiled
from .cache import TABLE, KVCache
from .linear import Linear, WideLinear
from .weights import LayerWeights, SkippedKV

# Of a prompt that go through an MLP at a time on a CPU.
POSITIONS = 768
# Longer sequences are attended to by PyTorch, whose products of blocks are faster than a kernel of vectors.
SHORT = 512


class RotaryPositions:
    """Positions int64 [N] to compute at, and the rotary tables, fp32 [positions, hd / 2]."""

    def __init__(self, positions: Tensor, cos: Tensor, sin: Tensor):
        self.positions, self.cos, self.sin = positions, cos, sin
        self._angles: tuple[Tensor, Tensor] | None = None

    def angles(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions, fp32 [N, 1, hd / 2]."""
        if self._angles is None:
            self._angles = self.cos[self.positions][:, None], self.sin[self.positions][:, None]
        return self._angles


class Rows(RotaryPositions):
    """Cache locations of A rows: `KVCache.where` of them, int64 [A, 4 + blocks] on the cache's device; all positions
    lie below `span`."""

    def __init__(self, where: Tensor, span: int, cos: Tensor, sin: Tensor):
        self.where, self.span = where, span
        self.slots, positions, self.pages, self.offsets = where[:, :TABLE].unbind(1)
        super().__init__(positions, cos, sin)
        self.table = where[:, TABLE:]
        self._mask: Tensor | None = None

    def mask(self) -> Tensor:
        """Attention mask, bool [A, 1, 1, span]: the positions that each row sees."""
        if self._mask is None:
            seen = torch.arange(self.span, device=self.positions.device) <= self.positions[:, None]
            self._mask = seen[:, None, None]
        return self._mask


def norm(hidden: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """RMSNorm over the last axis: float32 statistics, rounded to the dtype before the gain, as in transformers
    (where OLMo-2's are rounded behind it)."""
    if hidden.dtype == torch.float32:
        return F.rms_norm(hidden, hidden.shape[-1:], gain, eps)
    wide = hidden.float()
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(hidden.dtype)
    return normed if gain is None else normed * gain


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in Hugging Face's convention (first half of the head paired with the second): x [..., hd], same shape and
    dtype; cos, sin float32 [..., hd / 2]."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def _heads(fused: Tensor, dims: ModelDims) -> tuple[Tensor, Tensor, Tensor]:
    heads = fused.unflatten(-1, (dims.heads + 2 * dims.kv_heads, dims.head_dim))
    q, k, v = heads.split([dims.heads, dims.kv_heads, dims.kv_heads], dim=1)
    return q, k, v


class TorchOps:
    """Layers in PyTorch: any device, any dtype."""

    blocks: Sequence[LayerWeights] = ()

    def __init__(self, dims: ModelDims):
        self.dims = dims

    def set_layers(self, blocks: Sequence[LayerWeights]) -> None:
        """Set the layers that `run` runs."""
        self.blocks = blocks

    def run(self, first: int, stop: int, hidden: Tensor, cache: KVCache, at: Rows) -> Tensor:
        """Run layers first..stop-1 on the stream hidden [A, D] -> [A, D]; writes the rows' keys and values of these
        layers. `hidden` may be overwritten."""
        blocks = self.blocks
        if self.dims.norm_after:
            for layer, block in enumerate(blocks[first:stop], start=first):
                attended = self.attend(self.project(hidden, block), cache, layer, at, block)
                self.finish(hidden, block.linears["out"](attended), block)
            return hidden
        normed = self.add_norm(hidden, None, blocks[first].attention_norm)
        for layer in range(first, stop):
            block = blocks[layer]
            linears = block.linears
            attended = self.attend(linears["qkv"](normed), cache, layer, at, block)
            normed = self.add_norm(hidden, linears["out"](attended), block.mlp_norm)
            delta = self.mlp(normed, linears)
            if layer + 1 < stop:
                normed = self.add_norm(hidden, delta, blocks[layer + 1].attention_norm)
            else:
                hidden += delta
        return hidden

    def project(self, hidden: Tensor, block: LayerWeights) -> Tensor:
        """A layer's queries, keys and values of the stream [N, D], fused [N, (H + 2 KVH) hd]; queries and keys are
        normed here where that is over all heads together."""
        normed = hidden if self.dims.norm_after else self.add_norm(hidden, None, block.attention_norm)
        fused = block.linears["qkv"](normed)
        if block.whole_norm is None:
            return fused
        sizes, eps = (self.dims.q_size, self.dims.kv_size), self.dims.rms_eps
        q, k, v = fused.split((*sizes, sizes[1]), dim=-1)
        q_gain, k_gain = block.whole_norm.split(sizes)
        return torch.cat([norm(q, q_gain, eps), norm(k, k_gain, eps), v], dim=-1)

    def finish(self, hidden: Tensor, delta: Tensor, block: LayerWeights) -> None:
        """Add attention's delta to the stream hidden [N, D] in place, then the MLP's."""
        if self.dims.norm_after:
            hidden += self.add_norm(delta, None, block.attention_norm)
            hidden += self.add_norm(self.mlp(hidden, block.linears), None, block.mlp_norm)
        else:
            hidden += self.mlp(self.add_norm(hidden, delta, block.mlp_norm), block.linears)

    def mlp(self, normed: Tensor, linears: Mapping[str, Linear]) -> Tensor:
        """The MLP's addition to the stream: normed [N, D] -> [N, D]."""
        return linears["down"](self.silu_mul(linears["gate_up"](normed)))

    def gate(self, hidden: Tensor, fc1: WideLinear, fc2: Tensor, fc2_bias: Tensor, normalise: bool) -> Tensor:
        """Logits of a gate, float32 [...], on streams [..., D], divided by their root mean square if `normalise`."""
        wide = hidden.float()
        if normalise:
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.dims.rms_eps)
        return F.linear(F.relu(fc1(wide)), fc2, fc2_bias).squeeze(-1)

    def add_norm(self, hidden: Tensor, delta: Tensor | None, gain: Tensor | None) -> Tensor:
        """Add delta to hidden [A, D] in place and return RMSNorm(hidden) · gain (None: without one)."""
        if delta is not None:
            hidden += delta
        return norm(hidden, gain, self.dims.rms_eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """SwiGLU's product: gate_up [A, 2 I] -> silu(gate) · up [A, I]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def split_and_rotate(
        self, fused: Tensor, at: RotaryPositions, block: LayerWeights
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Split fused q, k, v [N, (H + 2 KVH) hd], which may be overwritten, into queries [N, H, hd], keys and values
        [N, KVH, hd]; queries and keys are normed where there are gains, and rotated if the layer rotates."""
        q, k, v = _heads(fused, self.dims)
        if block.q_norm is not None:
            q, k = norm(q, block.q_norm, self.dims.rms_eps), norm(k, block.k_norm, self.dims.rms_eps)
        return (apply_rope(q, *at.angles()), apply_rope(k, *at.angles()), v) if block.rotates else (q, k, v)

    def attend(self, fused: Tensor, cache: KVCache, layer: int, at: Rows, block: LayerWeights) -> Tensor:
        """Attention, fused q, k, v [A, (H + 2 KVH) hd] -> [A, H hd]; writes the rows' keys and values to the cache."""
        q, k, v = self.split_and_rotate(fused, at, block)
        keys, values = cache.layers[layer].unbind(1)
        keys[at.pages, at.offsets] = k
        values[at.pages, at.offsets] = v
        # The query heads that share a key/value head take the place of query positions: no head is repeated.
        q = q.unflatten(1, (self.dims.kv_heads, -1))
        k_used, v_used = (pool[at.table].flatten(1, 2)[:, : at.span] for pool in (keys, values))
        return F.scaled_dot_product_attention(
            q, k_used.transpose(1, 2), v_used.transpose(1, 2), attn_mask=at.mask()
        ).flatten(1)

    def attend_parallel(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, ends: Sequence[int]) -> Tensor:
        """Attention of queries [B, T, H, hd] at the last T of the positions of k, v [B, P + T, KVH, hd], ends: lengths
        of the B sequences, right-padded -> [B, T, H, hd]. mask bool [T, P + T]; None: causal."""
        return F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=mask is None,
            enable_gqa=self.dims.heads != self.dims.kv_heads,
        ).transpose(1, 2)  # fmt: skip

    def write_kv(self, fused: Tensor, cache: KVCache, at: Rows, skipped: SkippedKV) -> None:
        """Write keys (normed and rotated here) and values of the first A rows in the layers that they skipped, from the
        product of `skipped`, fused [A, layers·2·KVH·hd]."""
        dims = self.dims
        heads = fused.unflatten(-1, (skipped.layers, 2, dims.kv_heads, dims.head_dim))
        k, v = heads[:, :, 0], heads[:, :, 1]
        if skipped.k_norm is not None:
            k = norm(k, None, dims.rms_eps) * skipped.k_norm[:, None]
        cos, sin = (table[: len(fused), None] for table in at.angles())
        turned = apply_rope(k, cos, sin)
        if skipped.no_rope is not None:
            turned = torch.where(skipped.no_rope[:, None, None], k, turned)
        pairs = torch.stack([turned, v], dim=2)
        pages, offsets = at.pages[: len(fused)], at.offsets[: len(fused)]
        layers = cache.layers[skipped.first : skipped.first + skipped.layers]
        for layer, pair in zip(layers, pairs.unbind(1), strict=True):
            layer[pages, :, offsets] = pair


class KernelOps(TorchOps):
    """Layers by compiled kernels: CPU, float32 or bfloat16, head sizes that LANES divides. The cache's pages are read
    in place, each row's up to its own length. If all matrices are in panels, layers run without returning to Python.
    Not thread-safe: scratch memory is reused between calls."""

    def __init__(self, dims: ModelDims, library: compiled.Library):
        super().__init__(dims)
        self.library = library
        self._layers: ctypes.Array[compiled.Layer] | None = None
        self._shape = compiled.Shape(
            dims.hidden, dims.heads, dims.kv_heads, dims.head_dim, dims.intermediate, dims.rms_eps
        )
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def set_layers(self, blocks: Sequence[LayerWeights]) -> None:
        super().set_layers(blocks)
        self._layers = None
        products = all(isinstance(linear.matrix, Panels) for block in blocks for linear in block.linears.values())
        if products and not (self.dims.norm_after or self.dims.qk_norm_whole):
            self._layers = (compiled.Layer * len(blocks))(*map(_layer, blocks))

    def run(self, first: int, stop: int, hidden: Tensor, cache: KVCache, at: Rows) -> Tensor:
        if self._layers is None:
            return super().run(first, stop, hidden, cache, at)
        dims, rows = self.dims, len(hidden)
        width = dims.hidden + (dims.q_size + 2 * dims.kv_size) + 3 * dims.intermediate + max(dims.q_size, dims.hidden)
        hidden = hidden.contiguous()
        self.library.run_layers(
            self._layers[first], cache.addresses[first:].ctypes.data, stop - first, hidden.data_ptr(),
            self._memory(rows * width * hidden.element_size()), at.where.data_ptr(), at.where.stride(0),
            at.cos.data_ptr(), at.sin.data_ptr(), rows, self._shape,
        )  # fmt: skip
        return hidden

    def mlp(self, normed: Tensor, linears: Mapping[str, Linear]) -> Tensor:
        """Run a prompt's positions in parts, so that intermediates stay in the CPU's cache and their memory is reused
        instead of allocated again."""
        return torch.cat([super(KernelOps, self).mlp(part, linears) for part in normed.split(POSITIONS)])

    def gate(self, hidden: Tensor, fc1: WideLinear, fc2: Tensor, fc2_bias: Tensor, normalise: bool) -> Tensor:
        # Where the model's dtype has no products the matrix may be in panels of float32.
        if not isinstance(fc1.matrix, Panels) or not fc1.matrix.wide:
            return super().gate(hidden, fc1, fc2, fc2_bias, normalise)
        hidden = hidden.contiguous()
        logit = torch.empty(hidden.shape[:-1])
        rows, row = logit.numel(), 4 * fc1.matrix.out + hidden.shape[-1] * hidden.element_size()
        units = self._memory(rows * row)
        self.library.gate(
            fc1.matrix.product, fc2.data_ptr(), float(fc2_bias), hidden.data_ptr(), normalise, self.dims.rms_eps,
            units + 4 * rows * fc1.matrix.out, units, logit.data_ptr(), rows,
        )  # fmt: skip
        return logit

    def _memory(self, size: int) -> int:
        """Address of at least `size` bytes."""
        if len(self._scratch) < size:
            self._scratch = torch.empty(size, dtype=torch.uint8)
        return self._scratch.data_ptr()

    def add_norm(self, hidden: Tensor, delta: Tensor | None, gain: Tensor | None) -> Tensor:
        out = torch.empty_like(hidden)
        rows, width = hidden.shape
        self.library.add_norm(
            hidden.data_ptr(), compiled.pointer(delta), compiled.pointer(gain), out.data_ptr(), rows, width,
            self.dims.rms_eps,
        )  # fmt: skip
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, width)
        self.library.silu_mul(gate_up.data_ptr(), out.data_ptr(), rows, width)
        return out

    def split_and_rotate(
        self, fused: Tensor, at: RotaryPositions, block: LayerWeights
    ) -> tuple[Tensor, Tensor, Tensor]:
        dims, positions = self.dims, at.positions.contiguous()
        self.library.turn_heads(
            fused.data_ptr(), positions.data_ptr(), at.cos.data_ptr(), at.sin.data_ptr(),
            compiled.pointer(block.q_norm), compiled.pointer(block.k_norm), dims.rms_eps, block.rotates, len(fused),
            dims.heads, dims.kv_heads, dims.head_dim,
        )  # fmt: skip
        return _heads(fused, dims)

    def attend(self, fused: Tensor, cache: KVCache, layer: int, at: Rows, block: LayerWeights) -> Tensor:
        dims, rows = self.dims, len(fused)
        out = fused.new_empty(rows, dims.q_size)
        self.library.attend(
            fused.data_ptr(), out.data_ptr(), at.where.data_ptr(), at.where.stride(0), at.cos.data_ptr(),
            at.sin.data_ptr(), cache.layers[layer].data_ptr(), compiled.pointer(block.q_norm),
            compiled.pointer(block.k_norm), dims.rms_eps, block.rotates, rows, dims.heads, dims.kv_heads, dims.head_dim,
        )  # fmt: skip
        return out

    def attend_parallel(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, ends: Sequence[int]) -> Tensor:
        """Each sequence by itself: its bits don't depend on the batch, and padding costs nothing."""
        past, attended = k.shape[1] - q.shape[1], torch.zeros(q.shape, dtype=q.dtype)
        if k.shape[1] <= SHORT:
            lengths = torch.tensor(ends)
            self.library.attend_causal(
                q.data_ptr(), k.data_ptr(), v.data_ptr(), attended.data_ptr(), lengths.data_ptr(), _row_stride(q),
                _row_stride(k), q.shape[0], q.shape[1], past, self.dims.heads, self.dims.kv_heads, self.dims.head_dim,
            )  # fmt: skip
            return attended
        for b, n in enumerate(ends):
            here, seen = slice(b, b + 1), None if mask is None else mask[:n, : past + n]
            attended[here, :n] = super().attend_parallel(
                q[here, :n], k[here, : past + n], v[here, : past + n], seen, [n]
            )  # fmt: skip
        return attended

    def write_kv(self, fused: Tensor, cache: KVCache, at: Rows, skipped: SkippedKV) -> None:
        dims = self.dims
        self.library.write_kv(
            fused.data_ptr(), at.where.data_ptr(), at.where.stride(0), at.cos.data_ptr(), at.sin.data_ptr(),
            cache.addresses[skipped.first :].ctypes.data, compiled.pointer(skipped.k_norm),
            compiled.pointer(skipped.no_rope), dims.rms_eps, len(fused), skipped.layers, dims.kv_heads, dims.head_dim,
        )  # fmt: skip


def _layer(block: LayerWeights) -> compiled.Layer:
    matrices = (block.linears[name].matrix for name in ("qkv", "out", "gate_up", "down"))
    products = (matrix.product for matrix in matrices if isinstance(matrix, Panels))
    gains = (block.attention_norm, block.mlp_norm, block.q_norm, block.k_norm)
    return compiled.Layer(*products, *map(compiled.pointer, gains), block.rotates)


def choose_ops(dims: ModelDims, dtype: torch.dtype, device: torch.device) -> TorchOps:
    """The compiled kernels if they are available for this dtype and device, else PyTorch."""
    library = compiled.library(dtype) if device.type == "cpu" and dims.head_dim % compiled.LANES == 0 else None
    return TorchOps(dims) if library is None else KernelOps(dims, library)


def _row_stride(heads_BT: Tensor) -> int:
    """Elements from a position [B, T, H, hd] to the next, which may be the next sequence's: of a dimension of one torch
    doesn't keep the stride."""
    return heads_BT.stride(1 if heads_BT.shape[1] > 1 else 0)
