"""Results: written, checked before they get their names, read back and run."""
