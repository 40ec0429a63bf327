"""Weights between the model's bodies: Hugging Face directories, Megatron ranks, policy checkpoints."""
