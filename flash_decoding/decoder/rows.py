"""The host's side of generation: what each row has got, whether it is over, and the way tokens get here."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flash_decoding.decoder.request import Request

OnTokens = Callable[[list[list[int]]], bool | None]
"""Called with the tokens that have come, a list for each row; False stops."""


class Rows:
    """New tokens of each row, and whether more will come.

    Args:
        request: its prompts, limit and ends.

    Attributes:
        tokens: new tokens of each row.
        over: for each row, whether it has ended.
    """

    def __init__(self, request: Request) -> None:
        self._prompts = [prompt.shape[0] for prompt in request.prompts]
        self._limit, self._ends = request.limit, request.ends
        self.tokens: list[list[int]] = [[] for _ in request.prompts]
        self.over = [False for _ in request.prompts]

    def add(self, row: int, token: int, stops: bool = False) -> None:
        """Take a token.

        Args:
            row: whose it is; one that is not over.
            token: the token.
            stops: whether a criterion says that the row ends with it.
        """
        self.tokens[row].append(token)
        self.over[row] = stops or token in self._ends or self.left(row) == 0

    def left(self, row: int) -> int:
        """Tokens that the row may still get, if nothing ends it.

        Args:
            row: which.
        """
        return self._limit - len(self.tokens[row])

    @property
    def made(self) -> list[int]:
        """New tokens of each row."""
        return [len(tokens) for tokens in self.tokens]

    @property
    def seen(self) -> list[int]:
        """Tokens of each row that the model has to have seen for the next: all but the last."""
        return [prompt + made - 1 for prompt, made in zip(self._prompts, self.made, strict=True)]


class Readback:
    """Small integer tensors on their way to the host, while the device goes on.

    Args:
        device: where they come from.
    """

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._sent: Tensor | None = None

    def send(self, values: Tensor) -> None:
        """Queue a copy behind the work that is queued now.

        Args:
            values: integers of any shape.
        """
        if self._event is None:
            self._sent = values
            return
        self._sent = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._sent.copy_(values, non_blocking=True)
        self._event.record()

    def receive(self) -> list[list[int]]:
        """What was sent last, once it is here; work queued behind it is not waited for."""
        assert self._sent is not None
        if self._event is not None:
            self._event.synchronize()
        values: list[list[int]] = self._sent.tolist()
        return values
