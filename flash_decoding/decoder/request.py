"""What a call to generate asks for: read by Transformers' own rules, then checked against what we honour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)

from flash_decoding.decoder.prompts import padded, unpadded
from flash_decoding.errors import InvalidInput, Unsupported
from flash_decoding.transformers import names

DRAFT_TOKENS = 5
"""Tokens that an assistant drafts at once where nobody says how many."""

LOOKUP_NGRAM = 2
"""Longest run of tokens to look up where nobody says."""

ELSEWHERE = "model.generate(past_key_values=FlashCache(...)) does it"
ONE_BY_ONE = "repeat the prompt in the batch"
OURS = "the Decoder has a cache of its own"
TOKENS_ONLY = "tokens are all that is returned"

REFUSED: Mapping[str, tuple[tuple[object, ...], str]] = {
    "num_beams": ((1,), ELSEWHERE),
    "num_beam_groups": ((1,), ELSEWHERE),
    "diversity_penalty": ((0.0,), ELSEWHERE),
    "constraints": ((), ELSEWHERE),
    "force_words_ids": ((), ELSEWHERE),
    "penalty_alpha": ((0.0,), "contrastive search is not supported"),
    "dola_layers": ((), "contrasting layers is not supported"),
    "guidance_scale": ((1.0,), "guidance would need a second row for each"),
    "low_memory": ((False,), "contrastive search is not supported"),
    "num_return_sequences": ((1,), ONE_BY_ONE),
    "token_healing": ((False,), ELSEWHERE),
    "output_scores": ((False,), TOKENS_ONLY),
    "output_logits": ((False,), TOKENS_ONLY),
    "output_attentions": ((False,), TOKENS_ONLY),
    "output_hidden_states": ((False,), TOKENS_ONLY),
    "return_dict_in_generate": ((False,), TOKENS_ONLY),
    "use_cache": ((True,), OURS),
    "cache_implementation": ((), OURS),
    "cache_config": ((), OURS),
    "max_cache_len": ((), "Decoder(capacity=...) says how long"),
    "prefill_chunk_size": ((), "Decoder(prefill_chunk=...) says how long"),
    "continuous_batching_config": ((), "model.generate_batch has batches that change"),
    "compile_config": ((), "steps are captured as graphs"),
    "use_mtp": ((False,), ELSEWHERE),
    "speculation_type": ((), ELSEWHERE),
    "is_assistant": ((False,), "give the assistant to the Decoder of the larger model"),
    "assistant_early_exit": ((), ELSEWHERE),
    "assistant_ensemble_weight": ((), ELSEWHERE),
    "num_assistant_tokens_schedule": (("constant",), "assistants draft num_assistant_tokens each time"),
}
"""Settings that are not honoured: the values that ask for nothing (as None), and what to do instead."""

SET_BY_DEFAULT: Mapping[str, tuple[tuple[object, ...], str]] = {
    "assistant_confidence_threshold": ((0.0,), "assistants draft num_assistant_tokens each time"),
}
"""The same for settings that Transformers fills in itself: refused where the caller gives them."""

BESIDE_THE_CONFIG = frozenset({"attention_mask", "generator", "prefix_allowed_tokens_fn", "tokenizer"})
"""Options that no GenerationConfig has."""


@dataclass(frozen=True, eq=False)
class Request:
    """A checked call: prompts without padding, and the rules that new tokens follow."""

    prompts: list[Tensor]
    """One for each row, (tokens,) int64 on the host."""
    limit: int
    """New tokens of a row at most."""
    ends: frozenset[int]
    """Tokens that end a row, and belong to it."""
    pad: int
    """What stands in place of tokens that a row has not."""
    sample: bool
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    """Reasons to stop beyond ``limit`` and ``ends``."""
    generator: torch.Generator | None
    draft_tokens: int
    lookup_tokens: int
    """Tokens to draft from the text itself; 0 where nobody asks for it."""
    lookup_ngram: int
    """Longest run of tokens that is looked up."""

    @property
    def width(self) -> int:
        """Tokens of the longest prompt: columns that processors and criteria see before new tokens."""
        return max(prompt.shape[0] for prompt in self.prompts)

    @property
    def reads_ids(self) -> bool:
        """Whether anything wants to see the tokens of the rows so far."""
        return bool(self.processors or self.criteria)


def read_request(
    model: PreTrainedModel,
    prompts: Sequence[Tensor] | Tensor,
    *,
    generation_config: GenerationConfig | None,
    logits_processor: LogitsProcessorList | None,
    stopping_criteria: StoppingCriteriaList | None,
    options: Mapping[str, Any],
) -> Request:
    """Merge all settings as ``model.generate`` does, and refuse what the Decoder does not honour.

    Args:
        model: whose own settings are the defaults.
        prompts: one for each row, or (batch, tokens) with padding as ``attention_mask`` says.
        generation_config: settings, over those of the model.
        logits_processor: more processors.
        stopping_criteria: more reasons to stop.
        options: settings by name, over all others, and :data:`BESIDE_THE_CONFIG`.

    Raises:
        Unsupported: a setting that is not honoured, with the way out.
        InvalidInput: an option of an unknown name, prompts of wrong shapes.
    """
    known = vars(GenerationConfig())  # type: ignore[no-untyped-call]
    unknown = sorted(set(options) - set(known) - BESIDE_THE_CONFIG)
    if unknown:
        wanted = f"settings of a GenerationConfig, or {', '.join(sorted(BESIDE_THE_CONFIG))}"
        raise InvalidInput("options", unknown, wanted)
    given: dict[str, Any] = {} if generation_config is None else dict(vars(generation_config))
    given |= options
    refuse(given, {**REFUSED, **SET_BY_DEFAULT})
    defaults: Any = model.generation_config
    asked = {name: value for name, value in options.items() if name not in BESIDE_THE_CONFIG}
    criteria = StoppingCriteriaList(stopping_criteria or ())
    stop_strings = given.get("stop_strings") or defaults.stop_strings
    if stop_strings is not None:
        # Transformers hands its tokenizer to its own loops alone, so the criterion is made here
        criteria.append(_stop_strings(stop_strings, options.get("tokenizer")))
        asked["stop_strings"] = None
    pad = _first_of(given.get("pad_token_id"), defaults.pad_token_id, given.get("eos_token_id"), 0)
    ids, mask = padded(prompts, options.get("attention_mask"), pad)
    prepared = _prepare(
        model,
        ids.to(model.device),
        attention_mask=None if mask is None else mask.to(model.device),
        generation_config=generation_config,
        logits_processor=LogitsProcessorList(logits_processor or ()),
        stopping_criteria=criteria,
        prefix_allowed_tokens_fn=options.get("prefix_allowed_tokens_fn"),
        **asked,
    )
    refuse(vars(prepared.config), REFUSED)
    drafts = _first_of(given.get("num_assistant_tokens"), defaults.num_assistant_tokens, DRAFT_TOKENS)
    return _request(prepared, pad, drafts, options.get("generator"))


@dataclass(frozen=True, eq=False)
class Prepared:
    """What Transformers makes of a call before its loop begins."""

    ids: Tensor
    mask: Tensor
    config: GenerationConfig
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList


def _prepare(model: Any, ids: Tensor, **call: Any) -> Prepared:
    """Let ``model.generate`` merge its settings, build its processors and criteria, and give them to us."""
    found: list[Prepared] = []

    def instead_of_a_loop(
        _: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **rest: Any,
    ) -> Tensor:
        mask = rest["attention_mask"]
        if mask is None:  # newer releases drop a mask that hides nothing
            mask = torch.ones_like(input_ids)
        found.append(Prepared(input_ids, mask, generation_config, logits_processor, stopping_criteria))
        return input_ids

    # An empty cache of the caller's keeps generate from allocating one as cache_implementation has it.
    call |= {names.GENERATE: DynamicCache(), "custom_generate": instead_of_a_loop}
    model.generate(ids, **call)
    return found[0]


def _request(prepared: Prepared, pad: int, drafts: int, generator: torch.Generator | None) -> Request:
    lengths, ends, others = [], set[int](), StoppingCriteriaList()
    for criterion in prepared.criteria:
        if type(criterion) is MaxLengthCriteria:
            lengths.append(criterion.max_length)
        elif type(criterion) is EosTokenCriteria:
            ends |= set(criterion.eos_token_id.tolist())
        else:
            others.append(criterion)
    config = prepared.config
    return Request(
        prompts=unpadded(prepared.ids, prepared.mask),
        limit=max(1, min(lengths) - prepared.ids.shape[1]),
        ends=frozenset(ends),
        pad=pad,
        sample=bool(config.do_sample),
        processors=prepared.processors,
        criteria=others,
        generator=generator,
        draft_tokens=drafts,
        lookup_tokens=config.prompt_lookup_num_tokens or 0,
        lookup_ngram=config.max_matching_ngram_size or LOOKUP_NGRAM,
    )


def refuse(settings: Mapping[str, Any], refused: Mapping[str, tuple[tuple[object, ...], str]]) -> None:
    """Raise Unsupported for the first setting that asks for something we do not do.

    Args:
        settings: values by name.
        refused: by name, the values that ask for nothing, and what to do instead.
    """
    for name, (harmless, way_out) in refused.items():
        value = settings.get(name)
        if value is not None and value not in harmless:
            raise Unsupported(f"{name}={value!r} in Decoder.generate", (way_out,))


def _stop_strings(strings: str | list[str], tokenizer: Any) -> StopStringCriteria:
    if tokenizer is None:
        raise InvalidInput("tokenizer", None, "the model's tokenizer, which stop_strings need")
    return StopStringCriteria(tokenizer=tokenizer, stop_strings=strings)


def _first_of(*values: Any) -> int:
    """The first value that is given; of a list, its first element."""
    for value in values:
        if value is not None and value != []:
            return int(value[0] if isinstance(value, list | tuple) else value)
    raise AssertionError("the last value is a default")
