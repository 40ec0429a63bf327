"""What decides how much memory an engine takes, where `rollout.cache_gib` doesn't say."""

from __future__ import annotations

# Of a GPU's, for all that it holds.
GPU_SHARE = 0.9
# Of a CPU's, for its cache.
CPU_CACHE_GIB = 1
# Positions that a step reads at most.
CHUNK = 8192
