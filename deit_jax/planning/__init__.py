"""What a run will need: memory, collectives, time."""
