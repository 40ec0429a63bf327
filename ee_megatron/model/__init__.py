"""The policy on megatron-core: a GPT whose layers know how to stop, with gates at the exits and LoRA on its linears."""
