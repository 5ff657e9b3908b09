"""What is computed from the rows of a chunk."""
