"""How many positions are read out at a time. Plans count it without the readout itself, whose import takes seconds."""

from __future__ import annotations

# Bytes of a chunk's fp32 logits, and the fewest positions that still make an efficient product.
CHUNK_BYTES, LEAST_CHUNK = 2**27, 64


def chunk_positions(rows: int) -> int:
    """Positions of a chunk, for a rank that holds so many rows of the head."""
    return max(LEAST_CHUNK, CHUNK_BYTES // (4 * rows))
