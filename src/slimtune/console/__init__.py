"""What long work and plots look like in a terminal."""
