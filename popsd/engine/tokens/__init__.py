"""What comes with each token: weights, ids, positions, masks. Their checks, and the weights that the rules of a mask give."""
