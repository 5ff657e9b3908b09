"""Imported first: the repository's own packages come before any installed ones, in this process and in those it starts."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATHS = [str(ROOT / name) for name in ("", "kernels", "integrations", "benchmarks", "benchmarks/gpu")]
sys.path[:0] = PATHS
os.environ["PYTHONPATH"] = os.pathsep.join([*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ["PYTHONUNBUFFERED"] = "1"
