"""slimtune beside its peers, measured in turns on one machine: `python -m benchmarks --help`."""
