"""Modules and tensors of the libraries that quantize; each file imports its library, and is imported once needed."""
