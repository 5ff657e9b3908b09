"""The sweeps in plain torch, with the arguments and semantics of the Triton launchers."""
