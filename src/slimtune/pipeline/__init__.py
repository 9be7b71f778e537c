"""Whole runs: where a plan and a training meet."""
