"""Make every peer's calls of the attention suites once: what they compile is there when they are timed.

    python -m tools.compile_peers [SHARD SHARDS]

FlashInfer compiles with nvcc, a minute for each of some thirty kernels. Processes side by side do that in the
time of two or three; ``make gpu`` has them do so before the benchmark. Failures are the suite's to tell.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Hashable, Iterator

import torch

from flash_decoding.bench import baselines
from flash_decoding.bench.cases import Case, announced_cases
from flash_decoding.bench.column import Column
from flash_decoding.bench.serving.kinds import serving_cases
from tools.compare import make_once


def calls(device: torch.device) -> Iterator[tuple[Column, Case]]:
    """Columns of peers that run here, each with one case of all those for which it compiles the same."""
    cases = [*announced_cases(device, torch.float16), *serving_cases(device, torch.bfloat16)]
    different: dict[Hashable, tuple[Column, Case]] = {}
    for column, case in itertools.product(baselines.serving_columns(device), cases):
        if column.role == "peer" and column.why_not(case) is None:
            kind = (case.group, case.head_dim, case.dtype, case.q_len > 1, case.page_size, case.window > 0)
            different.setdefault((column.name, *kind), (column, case))
    yield from different.values()


if __name__ == "__main__":
    first, step = map(int, sys.argv[1:] or (0, 1))
    make_once(calls(torch.device("cuda")), first, step)
