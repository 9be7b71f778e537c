"""LoHa and LoKr: updates from Hadamard and Kronecker products."""
