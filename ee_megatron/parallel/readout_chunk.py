"""How many positions are read out at a time. Plans count it without the readout itself, whose import takes seconds."""

from __future__ import annotations

# Bytes of a chunk's fp32 logits, and the fewest positions that still make an efficient product. On a CPU what is made
# of logits had better find them in its cache, but a trained head's gradient is passed over for every chunk.
CHUNK_BYTES, CACHED_BYTES, LEAST_CHUNK = 2**27, 2**24, 64


def chunk_positions(rows: int, *, on_cpu: bool, trained: bool) -> int:
    """Positions of a chunk, for a rank that holds so many rows of the head."""
    return max(LEAST_CHUNK, (CACHED_BYTES if on_cpu and not trained else CHUNK_BYTES) // (4 * rows))
