"""Models loaded in few bits, and back."""
