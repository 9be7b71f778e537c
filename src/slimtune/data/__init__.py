"""Training and test data: rows as people write them, encoded examples, batches."""
