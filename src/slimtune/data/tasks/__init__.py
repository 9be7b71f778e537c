"""What a model learns from a row, one file a task."""
