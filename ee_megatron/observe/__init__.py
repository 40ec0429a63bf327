"""What a run leaves behind: its directory, its metrics, its progress and its report. Knows nothing of models."""
