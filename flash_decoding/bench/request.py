"""What was asked of the bench, and what of it each suite understands."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from flash_decoding.errors import InvalidInput

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

OPTIONS: dict[str, tuple[str, ...]] = {
    "attention": ("rows", "quick"),
    "serving": ("cases", "quick"),
    "model": ("quick", "model", "contexts", "compiled_contexts", "batch", "ragged", "columns", "steps"),
}
"""What each suite takes beyond device, dtype, out and plot, which all of them do."""

SUITES = tuple(OPTIONS)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for on the command line."""

    suite: str = "attention"
    device: str | None = None
    """None: the GPU where there is one."""
    dtype: str | None = None
    """None: what the suite measures on such a device."""
    out: Path = Path("results")
    plot: bool = True
    rows: str | None = None
    """Such as ``256x256,1x65536``; None: the announcement's."""
    cases: str | None = None
    """Names of the kinds of work to measure, with commas between; None: all."""
    quick: bool = False
    """Less time: fewer samples, three rows of attention, a small model and nothing that compiles for long."""
    model: str | None = None
    """A configuration by name, a folder with a checkpoint, or an id of the hub."""
    contexts: str | None = None
    """Such as ``512,65536``."""
    compiled_contexts: str | None = None
    """Those of the contexts for which columns that compile are measured; None: all, or none if quick."""
    batch: str | None = None
    """Batch sizes, such as ``1,16``; None: 1."""
    ragged: bool = False
    """Lengths spread evenly from an eighth of the context to all of it."""
    columns: str | None = None
    """Names of the columns to measure, with commas between; None: all."""
    steps: int | None = None
    """Steps measured per column and context, at most."""

    def check(self) -> None:
        """Refuse an unknown suite, and options that belong to another one.

        Raises:
            InvalidInput: which of them.
        """
        if self.suite not in OPTIONS:
            raise InvalidInput("suite", repr(self.suite), " or ".join(SUITES))
        known = {name for names in OPTIONS.values() for name in names}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in known - set(OPTIONS[self.suite]) and value != field.default:
                takers = " or ".join(suite for suite, names in OPTIONS.items() if field.name in names)
                raise InvalidInput(field.name, repr(value), f"nothing: the suite for it is {takers}")


def device_of(request: Request) -> torch.device:
    """The device to measure, made the current one.

    Raises:
        InvalidInput: there is no such device here.
    """
    count = torch.cuda.device_count()
    name = request.device
    if name is None:
        name = "cuda" if count else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    spelt = re.fullmatch(r"cuda(?::(\d+))?", name)
    if spelt is None or int(spelt[1] or 0) >= count:
        raise InvalidInput("device", repr(name), f"cpu, cuda or cuda:N; PyTorch sees {count} GPUs here")
    if spelt[1] is not None:
        torch.cuda.set_device(int(spelt[1]))
    return torch.device(name)


def dtype_of(request: Request, default: str) -> torch.dtype:
    """The dtype to measure.

    Raises:
        InvalidInput: no dtype of the bench has that name.
    """
    name = request.dtype or default
    if name not in DTYPES:
        raise InvalidInput("dtype", repr(name), " or ".join(DTYPES))
    return DTYPES[name]
