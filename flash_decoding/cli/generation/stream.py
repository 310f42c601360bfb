"""Text to standard output as it comes, a bar on standard error while the prompt is read, and a clock."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CLOCK = time.perf_counter


class Stream:
    """Takes tokens as they come, inside a ``with``, from our decoder or from Transformers' ``generate``.

    Args:
        tokenizer: what makes text of tokens.
        prompt_tokens: how many tokens are read before the first one comes.
        console: of standard error.

    Attributes:
        tokens: how many have come.
        first, last: seconds from the start to the first token, and to the newest.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int, console: Console) -> None:
        from transformers import TextStreamer

        self._text = TextStreamer(tokenizer, skip_special_tokens=True)
        columns = (TextColumn("reading the prompt"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, transient=True)
        self._read = self._bar.add_task("prompt", total=prompt_tokens)
        self._start = 0.0
        self.tokens = 0
        self.first = self.last = 0.0

    def __enter__(self) -> Stream:
        """Show the bar and start the clock."""
        self._bar.start()
        self._start = CLOCK()
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        """Take the bar away; write what is left of the text and an end of line, if nothing went wrong."""
        self._bar.stop()
        if failed is None:
            self._text.end()  # type: ignore[no-untyped-call]

    def progress(self, done: int, all_tokens: int) -> None:
        """Move the bar: so many tokens of the prompt have been read."""
        self._bar.update(self._read, completed=done, total=all_tokens)

    def write(self, tokens: list[int]) -> None:
        """Write new tokens. A word is shown when the next one begins."""
        if not tokens:
            return
        self.last = CLOCK() - self._start
        if self.tokens == 0:
            self.first = self.last
            self._bar.stop()  # it would share the terminal with the text
        self.tokens += len(tokens)
        self._text.put(torch.tensor(tokens))  # type: ignore[no-untyped-call]


class Streamer:
    """A stream as Transformers' ``generate`` takes it: the prompt comes first, and is not written.

    Args:
        stream: where new tokens go.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._prompt_came = False

    def put(self, value: Tensor) -> None:
        """Take the prompt (1, tokens), then new tokens (n,)."""
        if self._prompt_came:
            self._stream.write(value.flatten().tolist())
        self._prompt_came = True

    def end(self) -> None:
        """All tokens have come; whoever opened the stream closes it."""
