"""In the place of ncu and compute-sanitizer in a dry run: checks how it was called, runs the program, answers in kind.

python stub.py TOOL [OPTIONS ...] PYTHON ...
"""

import subprocess
import sys
from pathlib import Path

REQUIRED = {
    "ncu": ("--clock-control", "none", "--csv", "--log-file"),
    "compute-sanitizer": ("--tool", "memcheck", "--error-exitcode", "9"),
}
ANSWER = """==PROF== Connected to process 1
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","row_statistics_kernel","dram__bytes_read.sum","byte","1,200"
"0","row_statistics_kernel","dram__bytes_write.sum","byte","400"
"0","row_statistics_kernel","gpu__time_duration.sum","ns","2,000"
"1","row_loss_gradient_kernel","dram__bytes_read.sum","byte","1,600"
"1","row_loss_gradient_kernel","dram__bytes_write.sum","byte","200"
"1","row_loss_gradient_kernel","gpu__time_duration.sum","ns","2,000"
"""

if __name__ == "__main__":
    tool, arguments = sys.argv[1], sys.argv[2:]
    program = arguments.index(sys.executable)
    if absent := [word for word in REQUIRED[tool] if word not in arguments[:program]]:
        sys.exit(f"{tool}: {' '.join(absent)} is missing")
    print(f"dry: {tool} is a stub; the program runs by itself")
    if tool == "ncu":
        Path(arguments[arguments.index("--log-file") + 1]).write_text(ANSWER, encoding="utf-8")
    sys.exit(subprocess.run(arguments[program:]).returncode)
