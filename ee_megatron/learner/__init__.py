"""The learner: DeepSpeed round a Megatron model; scores rollouts under their recorded exits and learns from them."""
