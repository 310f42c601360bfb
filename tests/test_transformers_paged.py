"""Continuous batching: the tokens of eager attention, through the block table; other names are left alone."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig

from flash_decoding import Unsupported
from flash_decoding.transformers import paged
from flash_decoding.transformers.bounds import Bounds, pack
from tests.helpers import Case, assert_close_to_reference, make_inputs
from tests.transformers_tools import VOCAB, make_model

DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            torch.cuda.is_available(), reason="Transformers takes the GPU that it finds"
        ),
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
LENGTHS = (3, 17, 30, 9)
NEW = 12


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each of our functions has been called by the paged attention."""
    counts = {"flash_attn_with_kvcache": 0, "flash_attn_varlen_func": 0}

    def counted(name: str) -> Any:
        function = getattr(paged, name)

        def call(*arguments: Any, **named: Any) -> Any:
            counts[name] += 1
            return function(*arguments, **named)

        return call

    for name in counts:
        monkeypatch.setattr(paged, name, counted(name))
    return counts


def settings() -> tuple[GenerationConfig, ContinuousBatchingConfig]:
    """Greedy, without an end; prompts that do not fit a batch come in chunks."""
    how: dict[str, Any] = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "eos_token_id": VOCAB,
        "pad_token_id": 0,
    }
    generation = GenerationConfig(**how)  # type: ignore[no-untyped-call]
    names = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    page: dict[str, Any] = {"page_size" if "page_size" in names else "block_size": 16}
    return generation, ContinuousBatchingConfig(**page, num_blocks=24, max_batch_tokens=24)


def generate_both(family: str, device: str) -> tuple[Any, list[list[int]], list[list[int]]]:
    """The model, and the tokens for a few prompts: of ``generate`` with eager, of ``generate_batch``."""
    model = make_model(family, device)
    prompts = [torch.randint(3, VOCAB, (length,)).tolist() for length in LENGTHS]
    generation, engine = settings()
    wanted = []
    for prompt in prompts:
        row = torch.tensor([prompt], device=device)
        whole = model.generate(row, attention_mask=torch.ones_like(row), generation_config=generation)
        wanted.append(whole[0, len(prompt) :].tolist())
    model.set_attn_implementation("flash_decoding")
    if family == "gpt_oss":  # its loop over experts cannot be captured
        model.set_experts_implementation("batched_mm")
    outputs = model.generate_batch(prompts, generation_config=generation, continuous_batching_config=engine)
    assert [output.error for output in outputs.values()] == [None] * len(prompts)
    got = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    return model, wanted, [got[tuple(prompt)] for prompt in prompts]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_a_batch_has_the_tokens_of_eager_attention(family: str, device: str) -> None:
    """Grouped heads, windows, softcap, sinks; on a GPU the decoding steps are captured in graphs."""
    model, wanted, got = generate_both(family, device)
    assert got == wanted
    assert model.config._attn_implementation == "flash_decoding"


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_are_decoded_through_the_block_table(device: str, calls: dict[str, int]) -> None:
    model, wanted, got = generate_both("llama", device)
    layers = model.config.num_hidden_layers
    assert got == wanted
    assert calls["flash_attn_varlen_func"] > 0
    # Once a layer for each step, or, where steps are replayed, for each graph.
    assert calls["flash_attn_with_kvcache"] >= (layers * (NEW - 3) if device == "cpu" else layers)


def test_windows_are_decoded_from_gathered_keys(calls: dict[str, int]) -> None:
    """Transformers keeps windows as rings, which have no block table."""
    generate_both("mistral", "cpu")
    assert calls["flash_attn_with_kvcache"] == 0
    assert calls["flash_attn_varlen_func"] > 2 * (NEW - 3)


@dataclasses.dataclass
class Grouped:
    """As much of Transformers' paged cache as a step of decoding asks for: two groups of one layer each."""

    k: Tensor
    v: Tensor
    window: int | None = None

    def __post_init__(self) -> None:
        self.block_size = 8
        self.key_cache, self.value_cache = [self.k.flatten(0, 1)], [self.v.flatten(0, 1)]
        self.sliding_windows = {0: 1, 1: self.window or 1}
        self.layer_index_to_group_indices = {0: (0, 0), 1: (1, 0)}


@dataclasses.dataclass
class Allocating:
    """The same, as later releases have it."""

    k: Tensor
    v: Tensor
    window: int | None = None

    def __post_init__(self) -> None:
        pools = {"get_cache_for_block_table": lambda layer: (self.k, self.v)}
        one, other = SimpleNamespace(index=0), SimpleNamespace(index=1, **pools)
        if self.window is not None:
            other.sliding_window = self.window
        self.layer_to_allocator = {0: one, 1: other}


class Updated(Allocating):
    """The same where the layer asks it, and attention gets what it answers: as it is from 5.24 on."""

    def left(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments of attention as a layer of full attention leaves them."""
        own = {name: arguments[name]["full_attention"] for name in ("cu_seq_lens_k", "max_length_k")}
        pools = {"k_cache": self.k, "v_cache": self.v}
        return arguments | own | pools | {"cache": None, "block_table": arguments["block_table"][1]}


LAYOUTS = [Grouped, Allocating, Updated]


def layer(window: int | None = None) -> Any:
    """As much of a layer as attention asks for; a window of the configuration, not of the layer."""
    return SimpleNamespace(layer_idx=1, config=SimpleNamespace(sliding_window=window))


def decode_arguments(device: str, requests: int, layout: type = Grouped) -> tuple[Any, dict[str, Any]]:
    """A step of the first ``requests`` of four requests for layer 1, filled up to four; and its inputs."""
    longest = "max_seqlen" if layout is Grouped else "max_length"
    case = Case(batch=4, q_len=1, page_size=8, capacity=40, seqlens=(9, 40, 1, 24), causal=True, softcap=2.0)
    case = dataclasses.replace(case, sinks=True, softmax_scale=0.3)
    inputs = make_inputs(case, device=device, poison=0.0)
    _, cache, options = inputs
    live = torch.arange(4, device=device) < requests
    lengths = cache.cache_seqlens.where(live, 0)
    assert cache.block_table is not None
    columns = torch.arange(5, device=device) < (lengths[:, None] + 7) // 8
    table = cache.block_table.where(columns, -1)
    fake = layout(cache.k.clone(), cache.v.clone())
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    arguments = {
        "cache": fake,
        "write_index": [],
        "block_table": torch.stack((torch.full_like(table, -1), table)),
        "cu_seq_lens_q": torch.arange(5, dtype=torch.int32, device=device),
        "cu_seq_lens_k": {"full_attention": offsets},
        f"{longest}_q": 1,
        f"{longest}_k": {"full_attention": 1, "sliding_attention": 1},
        "scaling": options.softmax_scale,
        "softcap": options.softcap,
        "s_aux": options.sinks,
    }
    return inputs, fake.left(arguments) if isinstance(fake, Updated) else arguments


def new_keys(device: str) -> tuple[Tensor, Tensor]:
    """(1, heads_kv, requests, head_dim), as layers hand them over."""
    k, v = (torch.randn(1, 4, 2, 32, device=device).transpose(1, 2) for _ in range(2))
    return k, v


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("requests", [4, 2])
def test_a_step_appends_and_attends(requests: int, layout: type, device: str) -> None:
    """Each token goes to its page, the rest of the pool is left alone, and rows that only fill up are 0."""
    inputs, arguments = decode_arguments(device, requests, layout)
    queries, cache, _ = inputs
    k, v = new_keys(device)
    query = queries.q.permute(1, 2, 0, 3)
    out, weights = paged.attention(layer(), query, k, v, None, **arguments)
    assert weights is None
    assert out.shape == (4, 4, 32)
    assert (out[requests:] == 0).all()
    for pool, new in ((cache.k, k), (cache.v, v)):
        for b in range(requests):
            length = int(cache.cache_seqlens[b])
            page = int(cache.block_table[b, (length - 1) // 8])
            pool[page, (length - 1) % 8] = new[0, :, b]
    fake = arguments["cache"]
    written = (arguments["k_cache"], arguments["v_cache"]) if fake is None else (fake.k, fake.v)
    assert torch.equal(written[0], cache.k)
    assert torch.equal(written[1], cache.v)
    live = slice(0, requests)
    table = cache.block_table[live]
    cache = dataclasses.replace(cache, cache_seqlens=cache.cache_seqlens[live], block_table=table)
    queries = dataclasses.replace(queries, q=queries.q[live])
    assert_close_to_reference(out[live, None], None, queries, cache, inputs.options)


NONE = torch.zeros(1, dtype=torch.int32)
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"write_index": None}, "without a paged cache"),
    ({"cache": None}, "has not updated the paged cache"),
    ({"position_bias": torch.zeros(1)}, "position_bias"),
    ({"dropout": 0.1}, "dropout"),
    ({"is_causal": False}, "not causal"),
    ({"attention_mask": torch.zeros(1)}, "an attention mask"),
    ({"attention_mask": pack(Bounds(NONE, NONE))}, "an attention mask for"),
    ({"attention_mask": pack(Bounds(NONE, NONE, torch.ones(1, 4), packed=True))}, "attention mask"),
    ({"attention_mask": pack(Bounds(NONE, NONE, windowed=True))}, "a mask with a window"),
]


@pytest.mark.parametrize(("changed", "named"), REFUSED, ids=[named for _, named in REFUSED])
def test_what_is_not_honoured_is_refused(changed: dict[str, Any], named: str) -> None:
    inputs, arguments = decode_arguments("cpu", 4)
    k, v = new_keys("cpu")
    before = inputs.cache.k.clone()
    arguments = {"attention_mask": None} | arguments | changed
    with pytest.raises(Unsupported, match=named):
        paged.attention(layer(), inputs.queries.q.permute(1, 2, 0, 3), k, v, **arguments)
    assert torch.equal(inputs.cache.k, before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cache_that_forgets_more_than_the_layer_is_refused(layout: Any) -> None:
    inputs, arguments = decode_arguments("cpu", 4, layout)
    if layout is not Updated:
        arguments["cache"] = layout(inputs.cache.k, inputs.cache.v, window=8)
        arguments["cu_seq_lens_k"]["sliding_attention"] = arguments["cu_seq_lens_k"]["full_attention"]
    query = inputs.queries.q.permute(1, 2, 0, 3)
    with pytest.raises(Unsupported, match="the window of layer 1"):
        paged.attention(layer(window=8), query, *new_keys("cpu"), None, **arguments)


@pytest.mark.parametrize("windowed", [False, True])
def test_a_mask_that_repeats_the_lengths_changes_nothing(windowed: bool) -> None:
    """As models make it that know of packed sequences by their positions."""
    mask = pack(Bounds(NONE, NONE, windowed=windowed, packed=True))
    outs = []
    for given in (None, mask):
        inputs, arguments = decode_arguments("cpu", 4)
        arguments["sliding_window"] = 5
        query, (k, v) = inputs.queries.q.permute(1, 2, 0, 3), (x * 0 + 1 for x in new_keys("cpu"))
        outs.append(paged.attention(layer(), query, k, v, given, **arguments)[0])
    assert torch.equal(*outs)
