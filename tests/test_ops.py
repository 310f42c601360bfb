"""The operators' contracts: what fakes promise, what is written to, what may alias, what compiles."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flash_decoding import ops
from flash_decoding.spec import NewTokens, Rotary
from tests.helpers import Case, Inputs, assert_close_to_reference, make_inputs

OPS = torch.ops.flash_decoding
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

ATTENTION_CASES = [
    Case(name="plain", seqlens=(3, 64)),
    Case(name="several_tokens", q_len=3, causal=True, layout="bhsd", sinks=True, head_dim_v=16),
    Case(
        name="paged",
        page_size=16,
        seqlens=(0, 50),
        leftpad=(0, 7),
        batch_idx=True,
        alibi="batch",
        key_mask="holes",
    ),
    Case(name="ragged", q_lens=(4, 0, 1), batch=3, causal=True, window=(9, 0), softcap=10.0, layout="padded"),
    Case(name="packed", q_lens=(4, 1), packed=True, seqlens=(7, 30), dtype=torch.bfloat16),
]
MERGE_SHAPES = [(1, 2, 1, 4, 16), (3, 2, 5, 4, 24)]


def attention_arguments(inputs: Inputs, *, return_lse: bool) -> tuple[Any, ...]:
    """The arguments of ``torch.ops.flash_decoding.attention`` in the schema's order."""
    queries, cache, options = inputs
    tensors = (
        *(queries.q, cache.k, cache.v, cache.cache_seqlens),
        *(cache.block_table, cache.cache_batch_idx, cache.cache_leftpad, cache.key_mask),
        *(queries.cu_seqlens_q, options.alibi_slopes, options.sinks),
    )
    sizes = (queries.max_q_len, cache.max_kv_len, cache.new_tokens, cache.dense)
    scores = (options.softmax_scale, options.window_left, options.window_right, options.softcap)
    return (*tensors, *sizes, *scores, 0, False, return_lse)


def append_arguments(device: str, *, page_size: int = 0, rotary: bool = False) -> tuple[Any, ...]:
    """The arguments of ``torch.ops.flash_decoding.append_kv`` in the schema's order."""
    case = Case(page_size=page_size, capacity=16, seqlens=(3, 14), new_tokens=2, batch_idx=True)
    queries, cache, _ = make_inputs(case, device=device, poison=0.0)
    k, v = (torch.randn(2, 2, 2, 32, device=device) for _ in range(2))
    angles = torch.randn(16, 8, device=device)
    rotation = (queries.q, torch.empty_like(queries.q), angles.cos(), angles.sin())
    tables = rotation if rotary else (None, None, None, None)
    index = (cache.cache_seqlens, cache.block_table, cache.cache_batch_idx)
    return (k, v, cache.k, cache.v, *index, *tables, False, True)


def merge_arguments(shape: tuple[int, ...], device: str) -> tuple[Tensor, Tensor]:
    splits, batch, q_len, heads, _ = shape
    return torch.randn(shape, device=device), torch.randn(splits, batch, heads, q_len, device=device)


def facts(x: Tensor) -> tuple[Any, ...]:
    """What compiled code relies on; nobody walks along a dimension of size 1, so its stride is left out."""
    strides = [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    return x.shape, x.dtype, strides, x.device, x.storage_offset()


def assert_fake_is_true(op: Any, arguments: tuple[Any, ...]) -> None:
    """The fake promises the shape, dtype and stride of what comes out, which is memory of its own."""
    real = op(*arguments)
    with FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments))
    given = {x.untyped_storage().data_ptr() for x in arguments if isinstance(x, Tensor)}
    for real_output, fake_output in zip(real, fake, strict=True):
        assert facts(real_output) == facts(fake_output)
        assert real_output.numel() == 0 or real_output.untyped_storage().data_ptr() not in given


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_the_fake_of_attention_is_true(case: Case, return_lse: bool, device: str) -> None:
    inputs = make_inputs(case, device=device)
    arguments = attention_arguments(inputs, return_lse=return_lse)
    assert_fake_is_true(OPS.attention.default, arguments)
    lse = OPS.attention.default(*arguments)[1]
    assert (lse.numel() > 0) is return_lse


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", MERGE_SHAPES)
def test_the_fake_of_merge_is_true(shape: tuple[int, ...], device: str) -> None:
    assert_fake_is_true(OPS.merge_attention.default, merge_arguments(shape, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_opcheck_attention(case: Case, device: str) -> None:
    inputs = make_inputs(case, device=device, poison=0.0)
    report = torch.library.opcheck(OPS.attention.default, attention_arguments(inputs, return_lse=True))
    assert set(report.values()) == {"SUCCESS"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("page_size", [0, 4])
def test_opcheck_append(page_size: int, rotary: bool, device: str) -> None:
    arguments = append_arguments(device, page_size=page_size, rotary=rotary)
    report = torch.library.opcheck(OPS.append_kv.default, arguments)
    assert set(report.values()) == {"SUCCESS"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", MERGE_SHAPES)
def test_opcheck_merge(shape: tuple[int, ...], device: str) -> None:
    report = torch.library.opcheck(OPS.merge_attention.default, merge_arguments(shape, device))
    assert set(report.values()) == {"SUCCESS"}


def test_schemas_declare_what_is_written() -> None:
    written = {
        name: [a.name for a in getattr(OPS, name).default._schema.arguments if a.alias_info is not None]
        for name in ("attention", "append_kv", "merge_attention")
    }
    assert written == {
        "attention": [],
        "append_kv": ["k_cache", "v_cache", "q_rotated"],
        "merge_attention": [],
    }


def test_autograd_notices_the_mutation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward pass that saved the cache before the append must not go on with the new contents.

    Kernels write behind PyTorch's back, so the operator has to tell; here nothing is written at all.
    """
    from flash_decoding import execute

    monkeypatch.setattr(execute, "append_kv", lambda new, cache, **_: None)
    arguments = append_arguments("cpu", rotary=True)
    weight = torch.ones((), requires_grad=True)
    losses = [(weight * arguments[place]).sum() for place in (2, 3, 8)]  # k_cache, v_cache, q_rotated
    OPS.append_kv.default(*arguments)
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    with torch.inference_mode():
        OPS.append_kv.default(*append_arguments("cpu", rotary=True))


def test_the_records_reach_the_operator_and_come_out_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every field of every record goes through the schema and arrives where it left."""
    from flash_decoding import execute

    seen: dict[str, Any] = {}

    def attention(*records: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        seen["attention"] = (records, keywords)
        return torch.empty(0), torch.empty(0)

    def append_kv(*records: Any, **_: Any) -> None:
        seen["append"] = records

    monkeypatch.setattr(execute, "attention", attention)
    monkeypatch.setattr(execute, "append_kv", append_kv)
    case = Case(
        page_size=8,
        q_lens=(2, 3),
        leftpad=(1, 0),
        key_mask="holes",
        batch_idx=True,
        new_tokens=2,
        window=(5, 4),
        softcap=3.0,
        alibi="heads",
        sinks=True,
    )
    queries, cache, options = make_inputs(case)
    cache = dataclasses.replace(cache, max_kv_len=60, dense=True)
    ops.attention(queries, cache, options, num_splits=5, batch_invariant=True, return_lse=True)
    records, keywords = seen["attention"]
    assert keywords == {"num_splits": 5, "batch_invariant": True, "return_lse": True, "kind": None}
    for sent, arrived in zip((queries, cache, options), records, strict=True):
        assert_same_record(sent, arrived)
    k, v = torch.randn(2, 2, 2, 32), torch.randn(2, 2, 2, 32)
    rotary = Rotary(torch.randn(64, 4), torch.randn(64, 4), interleaved=True, advance_q=False)
    q = torch.randn(2, 1, 4, 32)
    new = NewTokens(k, v, rotary, q, torch.empty_like(q))
    cache = dataclasses.replace(cache, max_kv_len=0, dense=False, cache_leftpad=None, key_mask=None)
    ops.append_kv(new, cache)
    for sent, arrived in zip((new, cache), seen["append"], strict=True):
        assert_same_record(sent, arrived)


def assert_same_record(sent: Any, arrived: Any) -> None:
    assert type(sent) is type(arrived)
    for field in dataclasses.fields(sent):
        before, after = getattr(sent, field.name), getattr(arrived, field.name)
        if dataclasses.is_dataclass(before):
            assert_same_record(before, after)
        elif isinstance(before, Tensor):
            assert before.data_ptr() == after.data_ptr(), field.name
            assert before.stride() == after.stride(), field.name
        else:
            assert before == after, field.name


@pytest.mark.gpu
def test_operators_run_on_the_gpu_of_their_tensors() -> None:
    """Also where that is not the current one (a machine with a single GPU sees the plain way only)."""
    current, last = torch.cuda.current_device(), torch.cuda.device_count() - 1
    inputs = make_inputs(ATTENTION_CASES[0], device=f"cuda:{last}")
    out, lse = OPS.attention.default(*attention_arguments(inputs, return_lse=True))
    assert torch.cuda.current_device() == current
    assert_close_to_reference(out, lse, *inputs)
