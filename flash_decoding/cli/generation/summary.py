"""What a generation cost, in a few lines."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class Summary:
    """Numbers of one generation; times in seconds."""

    attention: str
    prompt_tokens: int
    new_tokens: int
    first: float
    """Time to the first token, which reads the prompt."""
    rest: float
    """Time of all tokens after the first."""
    weight_bytes: int
    kv_bytes: int
    """Of the tokens in the cache at the end."""
    step_bytes: float | None
    """What a step has to read on average; None where that is not known."""
    bandwidth: float
    """Of the device's memory, in bytes per second; 0 where it is not known."""
    compile_seconds: float = 0.0

    @property
    def rate(self) -> float | None:
        """Tokens per second after the first one; None if there was one only."""
        return (self.new_tokens - 1) / self.rest if self.new_tokens > 1 and self.rest > 0 else None

    @property
    def bound(self) -> float | None:
        """Tokens per second that reading the memory once per token allows; None where it is not known."""
        return self.bandwidth / self.step_bytes if self.step_bytes and self.bandwidth else None

    def table(self) -> Table:
        """For the console."""
        table = Table.grid(padding=(0, 2))
        for name, value in self._rows():
            table.add_row(name, value)
        return table

    def _rows(self) -> list[tuple[str, str]]:
        rows = [("attention", self.attention), ("prompt", f"{self.prompt_tokens} tokens")]
        if self.compile_seconds:
            rows.append(("kernels", f"ready after {self.compile_seconds:.1f} s"))
        rows.append(("first token", f"after {self.first:.3f} s"))
        rate = "" if self.rate is None else f", {self.rate:.1f} tokens/s after the first"
        rows.append(("new", f"{self.new_tokens} tokens{rate}"))
        rows.append(("weights", in_bytes(self.weight_bytes)))
        rows.append(("keys and values", in_bytes(self.kv_bytes)))
        if self.bound is not None and self.rate is not None:
            share = f"{self.rate / self.bound:.0%} of the {self.bound:.1f} tokens/s that the memory allows"
            rows.append(("bound", share))
        return rows


def in_bytes(count: float) -> str:
    """A number of bytes, as people say it: ``1.50 GB``."""
    for unit in UNITS[:-1]:
        if count < 1000:
            return f"{count:.3g} {unit}" if count < 1000 and unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} {UNITS[-1]}"
