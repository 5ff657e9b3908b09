"""What the command line knows before it imports anything that takes time."""
