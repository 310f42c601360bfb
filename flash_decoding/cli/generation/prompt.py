"""The prompt: where its text comes from, and its tokens."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flash_decoding.errors import InvalidInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STANDARD_INPUT = Path("-")


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """Text from the argument, a file, or standard input: ``-`` or neither of them.

    Raises:
        InvalidInput: both, a file that cannot be read as text, or nobody types into standard input.
    """
    if prompt is not None and file is not None:
        raise InvalidInput("prompt", "both --prompt and --file", "one of them")
    if prompt is not None and prompt != str(STANDARD_INPUT):
        return prompt
    if prompt is None and file is None and sys.stdin.isatty():
        raise InvalidInput("prompt", None, "--prompt TEXT, --file PATH, or text on standard input")
    if file is None or file == STANDARD_INPUT:
        return sys.stdin.read()
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput("file", repr(str(file)), f"a text file ({error})") from error


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, chat: bool) -> Tensor:
    """Tokens of a prompt, (tokens,) int64 on the CPU.

    Args:
        tokenizer: of the model.
        text: the prompt.
        chat: the prompt is what a user says in a chat, and the answer is to follow.

    Raises:
        InvalidInput: an empty prompt, or a tokenizer that knows no chat.
    """
    if not text.strip():
        raise InvalidInput("prompt", "no text", "some")
    if chat and not tokenizer.chat_template:
        raise InvalidInput("chat", "a tokenizer without a chat template", "one of a model made for chats")
    if chat:  # the template's text has the special tokens in it already
        messages = [{"role": "user", "content": text}]
        text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    if not ids:
        raise InvalidInput("prompt", f"{text[:40]!r}, which has no tokens", "one token or more")
    return torch.tensor(ids, dtype=torch.long)
