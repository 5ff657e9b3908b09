"""What else one wants to know of a GPU. The second of two commands, in under seven minutes.

    POPSD_COMMIT=$(git rev-parse --short=12 HEAD) python benchmarks/gpu/second.py --out DIR --work KEPT

In the order of what a failure would cost: the single read, whose programs wait for one another and so might hang the GPU,
after everything but what compiles. README.md here says how to read the output. `--dry` runs every part on a CPU.
"""

import sys

import environment  # noqa: F401 (it comes first)
import measuring
from bench import Part
from runner import main

SANITIZER = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9")
NO_CACHE = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
"""The caching allocator's blocks would hide what lies between tensors."""
MEMCHECK = ("-m memcheck -p no:xdist --case-seconds 300",)
SINGLE_READ = ("-n 1 -m single_read --single-read --case-seconds 15",)
PARTS = [
    Part("planning", 50, measuring.planning, gib=16),
    Part("step", 60, measuring.step, gib=40, modules=("trl", "peft", "datasets")),
    Part("forward-kl", 30, measuring.forward_kl, gib=16),
    Part("width-2560", 30, measuring.width_2560, gib=16),
    Part("accuracy", 35, measuring.accuracy, gib=24),
    Part("dram", 35, measuring.one_step, gib=16, tool=measuring.NCU, collect=measuring.read_ncu),
    Part("memcheck", 60, cases=MEMCHECK, tool=SANITIZER, environment=NO_CACHE),
    Part("streaming", 20, measuring.streaming, gib=16),
    Part("single-read", 40, measuring.single_read, gib=16, cases=SINGLE_READ),
    Part("compiled", 40, measuring.compiled, gib=30),
]

if __name__ == "__main__":
    sys.exit(main(__doc__, PARTS))
