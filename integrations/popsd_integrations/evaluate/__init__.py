"""``popsd evaluate``: a base model beside its trained checkpoints on benchmarks; ``popsd compare``: runs beside one another."""
