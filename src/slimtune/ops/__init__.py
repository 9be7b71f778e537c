"""Autograd primitives that know no method."""
