"""The sweeps in plain torch, with the arguments and meaning of the Triton launchers."""
