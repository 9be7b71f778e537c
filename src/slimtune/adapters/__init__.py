"""An adapter's life: attached to a model, run, merged, written, taken off again."""
