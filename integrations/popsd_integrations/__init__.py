"""popsd inside training frameworks: heads, contexts, frozen weights, loops."""
