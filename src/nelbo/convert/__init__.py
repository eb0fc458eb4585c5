"""Other programs' checkpoints, read as data."""
