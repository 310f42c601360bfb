"""The command from end to end: check, load, generate, sum up."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from torch import Tensor

from flash_decoding.bench.request import DTYPES
from flash_decoding.cli.generation import checkpoint, engines, memory
from flash_decoding.cli.generation.job import Job
from flash_decoding.cli.generation.prompt import encode
from flash_decoding.cli.generation.stream import Stream
from flash_decoding.cli.generation.summary import Summary
from flash_decoding.errors import InvalidInput
from flash_decoding.plan import Hardware

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel


def run(job: Job, console: Console) -> Summary:
    """Generate text: it goes to standard output, all else to the console.

    Args:
        job: what to do.
        console: of standard error.

    Raises:
        MissingDependency: Transformers is not installed.
        InvalidInput: an option, prompt or checkpoint that will not do, or too little memory.
        Unsupported: a model that is none for this command.
    """
    job.check()
    device = job.place()
    checkpoint.need_transformers()
    config = checkpoint.load_config(job.model)
    tokenizer = checkpoint.load_tokenizer(job.model)
    prompt = encode(tokenizer, job.prompt, chat=job.chat)
    capacity = room_for(job, prompt.shape[0])
    warning = check_positions(config, prompt.shape[0] + job.max_new_tokens)
    if warning:
        console.print(f"warning: {warning}", style="yellow", highlight=False)
    dtype = dtype_for(job, config)
    memory.check_memory(config, capacity=capacity, dtype=dtype, device=device)
    attention = None if job.is_ours else job.attention
    model = checkpoint.load_model(job.model, config, dtype=dtype, device=device, attention=attention)
    engine = engines.Ours(model, capacity, job) if job.is_ours else engines.Transformers(model, job)
    stream = Stream(tokenizer, prompt.shape[0], console)
    if job.seed is not None:
        torch.manual_seed(job.seed)
    with stream:
        engine.generate(prompt.to(device), generation_config(model, job), stream)
    summary = sum_up(job, model, prompt, stream, engine.compile_seconds)
    console.print(summary.table(), highlight=False)
    return summary


def room_for(job: Job, prompt_tokens: int) -> int:
    """Slots that the cache needs.

    Raises:
        InvalidInput: a context that is too short for the prompt and the new tokens.
    """
    needed = prompt_tokens + job.max_new_tokens
    if job.context is not None and job.context < needed:
        wanted = f"{needed} or more: {prompt_tokens} for the prompt and {job.max_new_tokens} for new tokens"
        raise InvalidInput("context", f"{job.context} tokens", wanted)
    return job.context or needed


def check_positions(config: PretrainedConfig, tokens: int) -> str | None:
    """What to say about a text that is longer than those the model was made for; None if it is not.

    Rotary embeddings go on beyond it, and some people do so on purpose; a table of positions ends.

    Raises:
        InvalidInput: the model has no positions for so many tokens.
    """
    text = config.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None)
    if positions is None or tokens <= positions:
        return None
    if getattr(text, "rope_parameters", None) is None:
        raise InvalidInput("context", f"{tokens} tokens", f"at most {positions}, the model's positions")
    return f"{tokens} tokens are more than the {positions} that the model was made for"


def dtype_for(job: Job, config: PretrainedConfig) -> torch.dtype:
    """The dtype asked for, or that of the checkpoint; float32 where it names none."""
    if job.dtype is not None:
        return DTYPES[job.dtype]
    text = config.get_text_config(decoder=True)
    named = getattr(config, "dtype", None) or getattr(text, "dtype", None)
    return named if isinstance(named, torch.dtype) else torch.float32


def generation_config(model: PreTrainedModel, job: Job) -> GenerationConfig:
    """The checkpoint's own, for where to stop, with the job's way to choose tokens."""
    config: GenerationConfig = copy.deepcopy(model.generation_config)
    for name, value in job.sampling().items():
        setattr(config, name, value)
    config.max_length = None
    if config.pad_token_id is None:  # nothing is padded here, but Transformers would say so
        eos = config.eos_token_id
        config.pad_token_id = eos[0] if isinstance(eos, list) else eos
    if not job.is_ours:
        config.prefill_chunk_size = job.prefill_chunk
    return config


def sum_up(job: Job, model: PreTrainedModel, prompt: Tensor, stream: Stream, compiled: float) -> Summary:
    """What it cost. The newest token is written, but not in the cache."""
    prompt_tokens = prompt.shape[0]
    return Summary(
        attention=job.attention,
        prompt_tokens=prompt_tokens,
        new_tokens=stream.tokens,
        first=stream.first,
        rest=stream.last - stream.first,
        weight_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        kv_bytes=memory.kv_bytes(model.config, prompt_tokens + stream.tokens - 1, model.dtype),
        step_bytes=memory.step_bytes(model, prompt_tokens + stream.tokens / 2),
        bandwidth=Hardware.of(model.device).bandwidth,
        compile_seconds=compiled,
    )
