"""Singular values of what was trained, and the intruder dimensions among them."""
