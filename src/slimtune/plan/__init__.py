"""What a training will take, before it begins: memory, time and cost, and which method to choose."""
