"""Small tasks with generated data and an exact score, to see tuning work without downloading a data set."""
