"""popsd beside what a user would pick instead: speed, memory and accuracy, each figure traceable to a file and a command."""
