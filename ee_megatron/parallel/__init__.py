"""Process groups, megatron-core on a CPU, and losses over a sharded vocabulary."""
