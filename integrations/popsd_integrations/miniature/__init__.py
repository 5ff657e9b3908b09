"""The method in miniature: what the target does to the style of a 162k-parameter reasoner, in minutes on a CPU."""
