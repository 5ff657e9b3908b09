"""popsd inside training frameworks: models, prompts and frozen weights, a plain loop, a TRL trainer, the command line."""
