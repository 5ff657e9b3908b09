"""Is it right, and how fast is it? The first of two commands for one GPU, in four minutes.

    POPSD_COMMIT=$(git rev-parse --short=12 HEAD) python benchmarks/gpu/first.py --out DIR --work KEPT

README.md here says what to bring and how to read the output. `--dry` runs every part on a CPU at a tiny size.
"""

import sys
from dataclasses import replace
from functools import partial

import environment  # noqa: F401 (it comes first)
import measuring
from bench import Part
from measuring import EFFORT, cells
from runner import main

CASES = ("PYTEST WORKERS --resume-results -m 'not alone'", "PYTEST --resume-results -m alone")
THREE = replace(EFFORT, rounds=3, peak=False)
PARTS = [
    Part("probe", 25, measuring.probe),
    Part("correctness", 75, programs=CASES, environment=(("OMP_NUM_THREADS", "2"),)),  # workers draw inputs on the CPU
    Part("headline", 105, measuring.headline),
    Part("profile", 30, partial(cells, part="profile", losses=("purified",), effort=THREE)),
]

if __name__ == "__main__":
    sys.exit(main(__doc__, PARTS))
