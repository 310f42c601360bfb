"""Measure what importing the package costs over importing torch, each time in a new process."""

from __future__ import annotations

import statistics
import subprocess
import sys

RUNS = 9
SCRIPT = """
import time
import torch
start = time.perf_counter()
import flash_decoding
print(time.perf_counter() - start)
"""


def measure() -> float:
    """Seconds from the end of ``import torch`` to the end of ``import flash_decoding``."""
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    return float(ran.stdout)


def main() -> None:
    """Print the median and the range of several measurements."""
    times = sorted(measure() for _ in range(RUNS))
    print(
        f"import flash_decoding: {statistics.median(times):.3f} s over importing torch "
        f"(median of {RUNS}; {times[0]:.3f} to {times[-1]:.3f})"
    )


if __name__ == "__main__":
    main()
