"""The tuning methods, one file each: its config, its deltas and their names on disk. A file enrols itself."""
