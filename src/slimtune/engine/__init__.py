"""One model answers many requests at once, each row under its own adapter, whatever its method.

`request` says what is asked and what is answered, `engine` is what users hold, `scheduler` runs the steps.
"""
