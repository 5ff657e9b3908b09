"""``popsd init``: a commented configuration for ``popsd train``, after a look at the model and the data."""
