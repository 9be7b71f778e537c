"""Models as users name them: loaded, inspected, exported."""
