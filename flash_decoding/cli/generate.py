"""The command ``generate``: options in, text out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from flash_decoding.cli.generation import Job, run
from flash_decoding.cli.generation.job import ATTENTION
from flash_decoding.cli.generation.prompt import read_prompt
from flash_decoding.errors import FlashDecodingError

MISUSED = 2
"""Exit status where the command cannot do what was asked."""


def generate(
    model: Annotated[str, typer.Argument(help="Folder with a checkpoint and its tokenizer, or a hub id.")],
    *,
    prompt: Annotated[str | None, typer.Option(help="The text to go on from; - for standard input.")] = None,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from a file; - as above.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many.")] = 256,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token each time.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Sample among tokens of this share.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among so many tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same text again with the same seed.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens to make room for; as many as needed.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of weights and cache; the checkpoint's.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU where there is one.")] = None,
    attention: Annotated[str, typer.Option(help=f"{', '.join(ATTENTION)}, to compare.")] = ATTENTION[0],
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a message, the text an answer.")
    ] = False,
    prefill_chunk: Annotated[
        int | None, typer.Option(help="Read the prompt so many tokens at a time.")
    ] = None,
) -> None:
    """Write text with a model of Transformers: the text to standard output, all else to standard error.

    At the end, on standard error: time to the first token, tokens per second, and how much of what the
    memory allows that is. Exit status 2: what was asked for cannot be done, and why.
    """
    try:
        job = Job(
            model=model,
            prompt=read_prompt(prompt, file),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            context=context,
            dtype=dtype,
            device=device,
            attention=attention,
            chat=chat,
            prefill_chunk=prefill_chunk,
        )
        run(job, Console(stderr=True))
    except (FlashDecodingError, torch.OutOfMemoryError) as error:
        typer.echo(f"flash-decoding: {error}", err=True)
        raise typer.Exit(MISUSED) from None
