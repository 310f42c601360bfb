"""A Transformers model, ready to decode: its cache, its step, and nothing between them and the memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from flash_decoding.decoder import blocks as llama
from flash_decoding.decoder.drafts import Assistant, Drafter, Lookup, check_speculation
from flash_decoding.decoder.forward import Attention, by_blocks, by_model, library_attention
from flash_decoding.decoder.generate import check_room, generate
from flash_decoding.decoder.graphs import Graphs
from flash_decoding.decoder.graphs import why_not as why_no_graphs
from flash_decoding.decoder.prefill import Progress, prefill
from flash_decoding.decoder.request import Request, read_request
from flash_decoding.decoder.rows import OnTokens
from flash_decoding.decoder.speculate import speculate
from flash_decoding.errors import CacheFull, InvalidInput, Unsupported
from flash_decoding.transformers import register
from flash_decoding.transformers.cache import FlashCache


class Decoder:
    """A causal language model of Transformers with a cache of its own, which decodes at full speed::

        decoder = Decoder(model, batch=2, capacity=65536)
        logits = decoder.prefill([prompt_a, prompt_b])      # of any lengths
        for _ in range(100):
            logits = decoder.step(logits.argmax(-1, keepdim=True))[:, -1]

    A step of one ``q_len`` is captured in a CUDA graph once, and then replayed for all lengths. Models of the
    Llama family run as blocks on this library's kernels (norm, gate, residual and rotary embedding on the
    way); all others run their own forward, with our attention and cache.

    Args:
        model: its attention implementation becomes "flash_decoding", and it is set to evaluate.
        batch: rows, one for each sequence.
        capacity: slots of a row, for prompt and new tokens.
        page_size: slots of a page; 0 for a contiguous cache.
        graphs: replay steps as CUDA graphs; None for where they can be captured.
        fused: run as blocks; None for where the model is known to be made of them.
        prefill_chunk: tokens of a chunk of prompts, over all rows.
        attention: what computes attention in a step in place of the library's own, to compare with;
            None for that.

    Attributes:
        model: as given.
        cache: keys, values and lengths.

    Raises:
        Unsupported: the model is not made of blocks though ``fused`` or ``attention`` asks for it, its steps
            cannot be captured though ``graphs`` asks for it, or its layers do not all keep keys and values of
            the same sizes.
        InvalidInput: a size below 1.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        batch: int = 1,
        capacity: int,
        page_size: int = 0,
        graphs: bool | None = None,
        fused: bool | None = None,
        prefill_chunk: int = 2048,
        attention: Attention | None = None,
    ) -> None:
        if prefill_chunk < 1:
            raise InvalidInput("prefill_chunk", prefill_chunk, "1 or more tokens")
        if graphs and (obstacles := why_no_graphs(model)):
            raise Unsupported(f"steps of {type(model).__name__} as CUDA graphs", obstacles)
        reasons = llama.why_not(model)
        if reasons and (fused or attention is not None):
            raise Unsupported(f"{type(model).__name__} as blocks", reasons)
        register()
        model.set_attn_implementation("flash_decoding")
        model.train(False)
        self.model = model
        self.cache = FlashCache(
            model.config,
            batch=batch,
            capacity=capacity,
            page_size=page_size,
            dtype=model.dtype,
            device=model.device,
        )
        self._prefill_chunk = prefill_chunk
        self._attention = attention or library_attention
        as_blocks = not reasons and fused is not False
        self._blocks = llama.read(model, positions=self.cache.capacity) if as_blocks else None
        replays = not why_no_graphs(model) if graphs is None else graphs
        self._graphs = Graphs(self._forward) if replays else None
        self._assistant: Decoder | None = None

    @property
    def batch(self) -> int:
        """Rows."""
        return self.cache.batch

    @property
    def capacity(self) -> int:
        """Slots of a row."""
        return self.cache.capacity

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row holds (host)."""
        return self.cache.lengths

    @property
    def is_fused(self) -> bool:
        """Whether steps run as blocks on this library's kernels."""
        return self._blocks is not None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, keys and values."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Tensor], *, progress: Progress | None = None) -> Tensor:
        """Append a prompt to each row, in chunks.

        Args:
            prompts: one for each row, (tokens,) integers; one or more tokens each.
            progress: called with tokens done and tokens in all, after each chunk.

        Returns:
            (batch, vocabulary) logits behind the last token of each prompt.

        Raises:
            InvalidInput: another number of prompts, or an empty one.
            CacheFull: a row has too few slots; nothing has been written.
        """
        wanted = f"{self.batch} tensors of one dimension with a token or more, one a row"
        shapes = [tuple(prompt.shape) for prompt in prompts]
        if len(shapes) != self.batch or any(len(shape) != 1 or shape[0] < 1 for shape in shapes):
            raise InvalidInput("prompts", f"shapes {shapes}", wanted)
        for row, (held, prompt) in enumerate(zip(self.lengths, prompts, strict=True)):
            if held + prompt.shape[0] > self.capacity:
                free = self.capacity - held
                raise CacheFull("prompts", prompt.shape[0], free, f"slots of row {row}")
        return prefill(self.model, self.cache, prompts, budget=self._prefill_chunk, progress=progress)

    @torch.no_grad()
    def step(self, tokens: Tensor, *, counts: Sequence[int] | None = None) -> Tensor:
        """Append tokens to each row, and give the logits behind each of them. Waits for nothing.

        Args:
            tokens: (batch, q_len) integers on the model's device: one each, or a few to verify.
            counts: how many of them, from the left, are meant in each row; all if None. The others are
                padding: their logits are noise, and a row of 0 stays as it is.

        Returns:
            (batch, q_len, vocabulary), which the next step of this q_len overwrites.

        Raises:
            InvalidInput: another shape or device, counts that do not fit.
            CacheFull: a row has too few slots, padding included; nothing has been written.
        """
        if tokens.ndim != 2 or tokens.shape[0] != self.batch or tokens.shape[1] < 1:
            raise InvalidInput("tokens", f"shape {tuple(tokens.shape)}", f"({self.batch}, q_len >= 1)")
        if tokens.device != self.device:
            raise InvalidInput("tokens", f"a tensor on {tokens.device}", f"one on {self.device}")
        q_len = tokens.shape[1]
        with self.cache.step(q_len if counts is None else counts, q_len=q_len):
            return self._forward(tokens) if self._graphs is None else self._graphs.run(tokens)

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget the last tokens of rows, such as rejected drafts.

        Args:
            lengths: tokens to keep, for each row.
        """
        self.cache.truncate(lengths)

    def reset(self) -> None:
        """Empty all rows."""
        self.cache.reset()

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Tensor] | Tensor,
        *,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        on_tokens: OnTokens | None = None,
        assistant: PreTrainedModel | Decoder | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> list[Tensor]:
        """New tokens behind prompts, by the settings of ``model.generate``: the same tokens, but faster::

            decoder.generate([prompt_a, prompt_b], max_new_tokens=200)
            decoder.generate(prompts, do_sample=True, temperature=0.7, top_p=0.9, stop_strings=["\\n\\n"],
                             tokenizer=tokenizer, on_tokens=lambda new: print(new))
            decoder.generate([prompt], assistant=smaller_model)     # drafts, which this model verifies
            decoder.generate([prompt], prompt_lookup_num_tokens=8)  # drafts from the text itself

        Rows begin empty: what they hold is forgotten. Afterwards each holds its prompt and its new tokens but
        the last, which the model has not seen.

        Settings mean what they mean there. Processors and criteria see the rows padded on the left, so
        ``max_length`` and what counts columns go by the longest prompt. Samples come from PyTorch's global
        generator, or from ``generator``. Where drafts are verified, rows differ in length, and processors and
        criteria get one row at a time.

        Args:
            prompts: one for each row, (tokens,) integers on any device; or all in one, (batch, tokens), with
                padding as ``attention_mask`` says.
            generation_config: settings; those of the model where they say nothing.
            logits_processor: processors besides those that the settings ask for.
            stopping_criteria: reasons to stop besides them.
            on_tokens: called in order with the tokens that have come, a list for each row, empty for rows
                that are over; several at once where drafts were right. Returning False stops.
            assistant: a smaller model of the same vocabulary, which gets a Decoder that is kept with this
                one, or a Decoder of as many rows. It drafts ``num_assistant_tokens``, or 5.
            progress: of the prompts, as in :meth:`prefill`.
            options: settings by name; ``tokenizer`` for ``stop_strings``; ``attention_mask``;
                ``prefix_allowed_tokens_fn``; ``generator``, a :class:`torch.Generator` of the device.

        Returns:
            For each row its new tokens, (tokens,) int64 on the model's device: without the prompt, without
            padding, with the token that ended it.

        Raises:
            Unsupported: a setting that is not honoured, such as beams (``model.generate`` with a
                :class:`~flash_decoding.transformers.FlashCache` has them), or scores to be returned.
            InvalidInput: an unknown option, prompts that are none, an assistant that does not fit.
            CacheFull: prompt and new tokens would not fit a row. As with the others, nothing has changed.
        """
        request = read_request(
            self.model,
            prompts,
            generation_config=generation_config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            options=options,
        )
        check_room(self, request)
        drafter = self._drafter(request, assistant)
        self.reset()
        if drafter is None:
            tokens = generate(self, request, on_tokens, progress)
        else:
            tokens = speculate(self, request, drafter, on_tokens=on_tokens, progress=progress)
        return [torch.tensor(row, dtype=torch.int64, device=self.device) for row in tokens]

    def _drafter(self, request: Request, assistant: PreTrainedModel | Decoder | None) -> Drafter | None:
        """What drafts tokens, if anything is asked to."""
        if assistant is None and not request.lookup_tokens:
            return None
        check_speculation(request, assistant is not None)
        if assistant is None:
            return Lookup(request, self.device)
        if not isinstance(assistant, Decoder):
            room, kept = self.capacity + request.draft_tokens, self._assistant
            if kept is None or kept.model is not assistant or kept.capacity < room:
                self._assistant = kept = Decoder(assistant, batch=self.batch, capacity=room)
            assistant = kept
        return Assistant(assistant, request, self)

    def _forward(self, tokens: Tensor) -> Tensor:
        if self._blocks is None:
            return by_model(self.model, self.cache, tokens)
        return by_blocks(self._blocks, self.cache, tokens, self._attention)
