"""What a run is to do: the schema of recipes, their validation."""
