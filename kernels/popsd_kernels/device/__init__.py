"""Functions that run inside kernels, one formula each. Importing a module of this package imports Triton."""

import re

import triton

OLDEST = (3, 6)
_found = tuple(map(int, re.findall(r"\d+", triton.__version__)[:2]))
if _found < OLDEST:  # a CUDA build of torch 2.8 brings 3.4
    raise ImportError(
        f"popsd's kernels need triton>={'.'.join(map(str, OLDEST))}; got {triton.__version__}. Install a torch that brings it "
        "(2.11 or newer); popsd itself computes without Triton where impl='torch'.",
        name="triton",
    )
