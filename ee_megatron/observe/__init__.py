"""What a run leaves behind while it works: its directory, its metrics, its progress. Knows nothing of models."""
