"""Models as users name them: found, loaded, inspected, exported."""
