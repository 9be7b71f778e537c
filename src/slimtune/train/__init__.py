"""Training: data, the trainer and what it writes."""
