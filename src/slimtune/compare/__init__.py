"""Methods and prompting on the same data under the same budget: the runs, the statistics, the choice and the page."""
