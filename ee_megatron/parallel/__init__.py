"""Process groups, megatron-core on a CPU, the pipeline schedule, and losses over a sharded vocabulary."""
