"""What other processes take of the device meanwhile. A time measured beside them says little about the code."""

import os
from pathlib import Path

import torch

CONTEXT = 2**30
"""Bytes of a GPU that this process may hold beyond its tensors: the driver's context and the libraries' own buffers."""
SHORTEST = 0.5
"""Processor seconds below which the system's clock, which ticks a hundred times a second, says nothing."""


class Others:
    """Watches from the moment it is made."""

    def __init__(self, device: str) -> None:
        self.device, self.start = device, _seconds()

    def share(self) -> float | None:
        """Theirs of the processors that this process may use; of a GPU, of its memory now. None where it is not known."""
        if self.device == "cuda":
            free, total = torch.cuda.mem_get_info()
            return max(0.0, 1 - (free + torch.cuda.memory_reserved() + CONTEXT) / total)
        own, busy, time = (now - then for now, then in zip(_seconds(), self.start, strict=True))
        return min(max(0.0, (busy - own) / time), 1.0) if time > SHORTEST else None


def _seconds() -> tuple[float, float, float]:
    """Processor seconds until now: of this process and those it has waited for, of all processes, and busy or not (Linux)."""
    path, tick = Path("/proc/stat"), os.sysconf("SC_CLK_TCK")
    if not path.exists():
        return 0.0, 0.0, 0.0
    rows = [text.split() for text in path.read_text(encoding="utf-8").splitlines()]
    usable = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    times = [sum(map(int, row[1:9])) for row in rows if row[0] in usable]
    idle = [sum(map(int, row[4:6])) for row in rows if row[0] in usable]
    return sum(os.times()[:4]), (sum(times) - sum(idle)) / tick, sum(times) / tick
