"""Loss and gradients from hidden states with no logit in memory."""
