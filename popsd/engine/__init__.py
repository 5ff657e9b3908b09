"""How a loss is computed: the operator, its chunks of tokens, and the backends that sweep them."""
