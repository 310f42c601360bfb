"""Every refusal names the argument, what it got and what would do, and comes before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import flash_decoding as fd
from flash_decoding import InvalidInput, Unsupported
from flash_decoding.validate import tensors
from tests.refusals import (
    APPEND_REFUSALS,
    ATTENTION_REFUSALS,
    MERGE_REFUSALS,
    RAGGED_REFUSALS,
    ROTARY,
    Arguments,
    Refusal,
    append_arguments,
    assert_refused,
    attention_arguments,
    floats,
    ints,
    merge_arguments,
    paged,
    ragged_arguments,
)


def names(refusals: list[Refusal]) -> list[str]:
    return [refusal[0] for refusal in refusals]


@pytest.mark.parametrize("refusal", ATTENTION_REFUSALS, ids=names(ATTENTION_REFUSALS))
def test_attention_refuses(refusal: Refusal) -> None:
    assert_refused(fd.decode_attention, attention_arguments(), refusal)


@pytest.mark.parametrize("refusal", RAGGED_REFUSALS, ids=names(RAGGED_REFUSALS))
def test_ragged_attention_refuses(refusal: Refusal) -> None:
    assert_refused(fd.decode_attention_varlen, ragged_arguments(), refusal)


@pytest.mark.parametrize("refusal", APPEND_REFUSALS, ids=names(APPEND_REFUSALS))
def test_append_refuses_and_writes_nothing(refusal: Refusal) -> None:
    good = append_arguments()
    assert_refused(fd.append_kv, good, refusal)
    assert good["k_cache"].count_nonzero() == 0
    assert good["v_cache"].count_nonzero() == 0


@pytest.mark.parametrize("refusal", MERGE_REFUSALS, ids=names(MERGE_REFUSALS))
def test_merge_refuses(refusal: Refusal) -> None:
    assert_refused(fd.merge_attention, merge_arguments(), refusal)


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        (fd.decode_attention, attention_arguments()),
        (fd.decode_attention, attention_arguments() | paged()),
        (fd.decode_attention_varlen, ragged_arguments()),
        (fd.append_kv, append_arguments()),
        (fd.append_kv, append_arguments() | paged() | ROTARY | {"q": floats(2, 1, 4, 16)}),
        (fd.merge_attention, merge_arguments()),
    ],
)
def test_what_the_refusals_start_from_is_a_good_call(call: Callable[..., Any], arguments: Arguments) -> None:
    result = call(**arguments)
    assert result is None or isinstance(result, (Tensor, tuple))


@pytest.mark.parametrize(
    ("call", "arguments", "wants_grad"),
    [
        (fd.decode_attention, attention_arguments(), "q"),
        (fd.decode_attention, attention_arguments(), "v_cache"),
        (fd.decode_attention, attention_arguments() | {"sinks": floats(4)}, "sinks"),
        (fd.append_kv, append_arguments(), "k"),
        (fd.append_kv, append_arguments(), "k_cache"),
        (fd.append_kv, append_arguments() | ROTARY, "rotary_sin"),
        (fd.merge_attention, merge_arguments(), "lses"),
    ],
)
def test_backward_is_refused_by_name(call: Callable[..., Any], arguments: Arguments, wants_grad: str) -> None:
    arguments = arguments | {wants_grad: arguments[wants_grad].clone().requires_grad_()}
    with pytest.raises(Unsupported, match=rf"backward through {wants_grad}\n  - forward only: detach"):
        call(**arguments)
    with torch.no_grad():
        result = call(**arguments)
    assert not isinstance(result, Tensor) or not result.requires_grad


def test_a_device_that_nothing_runs_on_is_refused_by_name() -> None:
    with FakeTensorMode(), pytest.raises(Unsupported, match=r"q on device mps.*\n.*cuda.*cpu"):
        tensors.floats("q", torch.empty(2, 1, 4, 16, device="mps"))


def test_float64_is_for_the_cpu() -> None:
    q = torch.empty(2, 1, 4, 16, dtype=torch.float64)
    tensors.floats("q", q)
    with pytest.raises(InvalidInput, match=r"q: got torch\.float64; wanted float16, bfloat16 or float32"):
        tensors.floats("q", q.to("meta"))


def test_strides_of_single_elements_do_not_matter() -> None:
    """PyTorch gives dimensions of size 1 any stride it likes; nobody walks along them."""
    table = ints(0, 1, 0, 1).view(2, 2).T[:, :1]
    assert table.stride() == (1, 2)
    pool = {"k_cache": floats(2, 8, 2, 16), "v_cache": floats(2, 8, 2, 16), "block_table": table}
    out = fd.decode_attention(**(attention_arguments() | pool))
    assert isinstance(out, Tensor)


@pytest.mark.parametrize(
    ("call", "arguments", "shape"),
    [
        (fd.decode_attention, attention_arguments(), (2, 1, 4, 16)),
        (fd.decode_attention, attention_arguments() | paged() | {"cache_leftpad": ints(1, 1)}, (2, 1, 4, 16)),
        (fd.decode_attention_varlen, ragged_arguments(), (3, 4, 16)),
        (fd.append_kv, append_arguments() | ROTARY | {"q": floats(2, 3, 4, 16)}, (2, 3, 4, 16)),
    ],
)
def test_no_contents_are_read(
    call: Callable[..., Tensor], arguments: Arguments, shape: tuple[int, ...]
) -> None:
    """Fake tensors have shapes and no contents: whoever reads one of their values gets an error."""
    with FakeTensorMode() as mode:
        fakes: Arguments = {
            name: mode.from_tensor(x) if isinstance(x, Tensor) else x for name, x in arguments.items()
        }
        assert tuple(call(**fakes).shape) == shape
