"""LoRA and what is built on its pair of factors."""
