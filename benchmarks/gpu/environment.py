"""Imported first: the repository's own packages come before any installed ones, in this process and in those it starts."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_PATHS = [
    str(folder)
    for folder in (ROOT, *(ROOT / name for name in ("kernels", "integrations", "benchmarks", "benchmarks/gpu")))
]
sys.path[:0] = _PATHS
os.environ["PYTHONPATH"] = os.pathsep.join([*_PATHS, *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ["PYTHONUNBUFFERED"] = "1"
