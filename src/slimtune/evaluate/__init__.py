"""Asking a model and scoring what it answers."""
