"""GGUF files for llama.cpp, Ollama and what builds on them, on the tables of the `gguf` package.

An architecture is a row in `architectures.py`; what no row knows is refused, never guessed.
"""
