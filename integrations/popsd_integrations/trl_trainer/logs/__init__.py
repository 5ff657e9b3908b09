"""What a run of the trainer says of itself: metrics of all processes, the lines of its console, its model card."""
