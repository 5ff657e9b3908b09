"""Is it right, and how fast is it? The first of two commands for one GPU, in four minutes.

    POPSD_COMMIT=$(git rev-parse --short=12 HEAD) python benchmarks/gpu/first.py --out DIR --work KEPT

README.md here says what to bring and how to read the output. `--dry` runs every part on a CPU at a tiny size.
"""

import sys

import environment  # noqa: F401 (it comes first)
import measuring
from bench import Part
from runner import main

CASES = ("WORKERS --resume-results -m not~alone", "--resume-results -m alone")
PARTS = [
    Part("probe", 25, measuring.probe, gib=16),
    Part("correctness", 75, cases=CASES, environment=(("OMP_NUM_THREADS", "2"),)),  # workers draw inputs on the CPU
    Part("headline", 105, measuring.headline, gib=30),
    Part("profile", 30, measuring.profile, gib=16),
]

if __name__ == "__main__":
    sys.exit(main(__doc__, PARTS))
