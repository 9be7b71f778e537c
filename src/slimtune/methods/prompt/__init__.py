"""Prompt tuning, prefix tuning, P-tuning: virtual tokens in front of the input."""
