"""The engine: a plain PyTorch decoder with exact early exit and continuous batching."""
