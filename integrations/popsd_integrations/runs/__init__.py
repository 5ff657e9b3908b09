"""What a training run leaves in its folder beside its weights: metrics, options, held-out completions, a page."""
