"""What an engine takes of a device's memory, where `rollout.cache_gib` doesn't say."""

from __future__ import annotations

# Of a GPU's, for all that it holds.
GPU_SHARE = 0.9
# Of a CPU's, for its cache.
CPU_CACHE_GIB = 1
