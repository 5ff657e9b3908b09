"""What else one wants to know of a GPU. The second of two commands, in under seven minutes.

    POPSD_COMMIT=$(git rev-parse --short=12 HEAD) python benchmarks/gpu/second.py --out DIR --work KEPT

In the order of what a failure would cost: the single read, whose programs wait for one another and so might hang the GPU,
after everything but what compiles. README.md here says how to read the output. `--dry` runs every part on a CPU.
"""

import sys
from dataclasses import replace
from functools import partial

import environment  # noqa: F401 (it comes first)
import measuring
from bench import Part
from measuring import BOTH, EFFORT, cells
from runner import main

SANITIZER = "compute-sanitizer --tool memcheck --error-exitcode 9"
NO_CACHE = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
"""The caching allocator's blocks would hide what lies between tensors."""
MEMCHECK = ("PYTEST -m memcheck -p no:xdist --case-seconds 300",)
SINGLE_READ = ("PYTEST -n 1 -m single_read --single-read --case-seconds 15",)
KERNELS = ("trl", "liger-triton")
SINGLE = partial(cells, models=BOTH, peers=("popsd-single-read",), losses=("purified",))
COMPILED = partial(
    cells, peers=("eager-compiled", "liger-compiled"), losses=("two", "purified"), tokens=2048,
    effort=replace(EFFORT, compilers=True),
)  # fmt: skip
PARTS = [
    Part("planning", 50, measuring.planning),
    Part("step", 60, measuring.step),
    Part("forward-kl", 30, partial(cells, peers=KERNELS, beta=0.0)),
    Part("width-2560", 30, partial(cells, models=("qwen3-4b",), peers=KERNELS)),
    Part("accuracy", 35, measuring.accuracy),
    Part("dram", 35, programs=measuring.ONE_STEP, tool=measuring.NCU, collect=measuring.read_ncu),
    Part("memcheck", 60, programs=MEMCHECK, tool=SANITIZER, environment=NO_CACHE),
    Part("streaming", 20, partial(cells, peers=("popsd-streaming",))),
    Part("single-read", 40, SINGLE, programs=SINGLE_READ),
    Part("compiled", 40, COMPILED),
]

if __name__ == "__main__":
    sys.exit(main(__doc__, PARTS))
