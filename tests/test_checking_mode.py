"""Checking mode looks at the values of lengths, rows and pages; nothing else in the library ever does."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import flash_decoding as fd
from flash_decoding import InvalidInput, settings
from flash_decoding.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from tests.refusals import (
    Arguments,
    append_arguments,
    attention_arguments,
    floats,
    ints,
    paged,
    ragged_arguments,
)


@pytest.fixture
def checking() -> Iterator[None]:
    with settings.checking():
        yield


def table(*rows: tuple[int, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def refusal(call: Any, arguments: Arguments) -> tuple[str, str]:
    with pytest.raises(InvalidInput) as caught:
        call(**arguments)
    return caught.value.argument, str(caught.value)


@pytest.mark.parametrize(
    ("changes", "argument", "text"),
    [
        ({"cache_seqlens": ints(3, 9)}, "cache_seqlens", "got 9 for sequence 1; wanted 0 to 8"),
        ({"cache_seqlens": ints(-1, 3)}, "cache_seqlens", "got -1 for sequence 0; wanted 0 to 8"),
        ({"cache_leftpad": ints(4, 0)}, "cache_leftpad", "got 4 for sequence 0; wanted 0 to 3"),
        ({"cache_leftpad": ints(0, -2)}, "cache_leftpad", "got -2 for sequence 1; wanted 0 to 8"),
        ({"cache_batch_idx": ints(0, 2)}, "cache_batch_idx", "got 2 for sequence 1; wanted 0 to 1"),
        ({"cache_batch_idx": ints(-1, 0)}, "cache_batch_idx", "got -1 for sequence 0; wanted 0 to 1"),
        (paged() | {"block_table": table((0, 9), (6, 2))}, "block_table", "page 6 at [1, 0]; wanted 0 to 5"),
        (
            paged() | {"block_table": table((0, 9), (5, -1))},
            "block_table",
            "page -1 at [1, 1]; wanted 0 to 5",
        ),
    ],
)
@pytest.mark.usefixtures("checking")
def test_attention_checks_values(changes: Arguments, argument: str, text: str) -> None:
    name, message = refusal(fd.decode_attention, attention_arguments() | changes)
    assert name == argument
    assert text in message


@pytest.mark.usefixtures("checking")
def test_only_pages_in_use_are_checked() -> None:
    """3 slots use one page of 4; a left padding of 4 leaves the first page of sequence 1 unused."""
    unused = {"block_table": table((0, 99), (-7, 5)), "cache_leftpad": ints(0, 4)}
    out = fd.decode_attention(**(attention_arguments() | paged() | unused))
    assert isinstance(out, Tensor)


@pytest.mark.parametrize(
    ("offsets", "text"),
    [
        (ints(1, 2, 3), "got 1 ... 3; wanted 0 ... 3"),
        (ints(0, 1, 2), "got 0 ... 2; wanted 0 ... 3"),
        (ints(0, 3, 3), "got length 3 of sequence 0; wanted 0 to 2"),
        (ints(0, 4, 3), "got length 4 of sequence 0; wanted 0 to 2"),
    ],
)
@pytest.mark.usefixtures("checking")
def test_offsets_of_packed_tensors_are_checked(offsets: Tensor, text: str) -> None:
    name, message = refusal(fd.decode_attention_varlen, ragged_arguments() | {"cu_seqlens_q": offsets})
    assert name == "cu_seqlens_q"
    assert text in message
    good = {"q": floats(3, 4, 16), "cu_seqlens_q": ints(0, 1, 3), "max_seqlen_q": 2, "max_seqlen_k": 2}
    keys = {"k": floats(3, 2, 16), "v": floats(3, 2, 16), "cu_seqlens_k": offsets}
    name, message = refusal(flash_attn_varlen_func, good | keys)
    assert name == "cu_seqlens_k"
    assert text in message


@pytest.mark.usefixtures("checking")
def test_pages_of_packed_sequences_are_checked() -> None:
    pages = floats(6, 4, 2, 16)
    keys: Arguments = {"k": pages, "v": pages, "block_table": table((1, 2), (9, 9))}
    call: Arguments = {
        "q": floats(2, 4, 16),
        "cu_seqlens_q": ints(0, 1, 2),
        "max_seqlen_q": 1,
        "max_seqlen_k": 8,
    }
    name, message = refusal(flash_attn_varlen_func, keys | call | {"cu_seqlens_k": ints(0, 8, 9)})
    assert name == "block_table"
    assert "page 9 at [1, 0]; wanted 0 to 5" in message
    out = flash_attn_varlen_func(**(keys | call), cu_seqlens_k=ints(0, 8, 8))
    assert isinstance(out, Tensor)


@pytest.mark.parametrize(
    ("changes", "argument", "text"),
    [
        ({"cache_seqlens": ints(3, 7)}, "cache_seqlens", "got 7 for sequence 1; wanted 0 to 6"),
        ({"cache_batch_idx": ints(5, 0)}, "cache_batch_idx", "got 5 for sequence 0; wanted 0 to 1"),
        (paged() | {"block_table": table((0, 1), (2, 8))}, "block_table", "page 8 at [1, 1]; wanted 0 to 5"),
    ],
)
@pytest.mark.usefixtures("checking")
def test_append_checks_where_it_writes_and_writes_nothing(
    changes: Arguments, argument: str, text: str
) -> None:
    arguments = append_arguments() | changes
    name, message = refusal(fd.append_kv, arguments)
    assert name == argument
    assert text in message
    assert arguments["k_cache"].count_nonzero() == 0


@pytest.mark.usefixtures("checking")
def test_append_does_not_look_at_pages_that_it_leaves_alone() -> None:
    """Tokens 4 and 5 of sequence 0, 6 and 7 of sequence 1 go to the second page of each."""
    arguments = append_arguments() | paged()
    result = fd.append_kv(
        **(arguments | {"block_table": table((99, 1), (-5, 2)), "cache_seqlens": ints(4, 6)})
    )
    assert result is None
    assert arguments["k_cache"][1, :2].count_nonzero() == 2 * 2 * 16
    assert arguments["k_cache"][2, 2:].count_nonzero() == 2 * 2 * 16


@pytest.mark.usefixtures("checking")
def test_kvcache_checks_before_it_appends() -> None:
    caches = append_arguments() | {"q": floats(2, 1, 4, 16), "cache_seqlens": ints(7, 0)}
    name, message = refusal(flash_attn_with_kvcache, caches)
    assert name == "cache_seqlens"
    assert "got 7 for sequence 0; wanted 0 to 6 (8 slots, 2 for new tokens)" in message
    assert caches["k_cache"].count_nonzero() == 0


def test_nothing_is_checked_by_value_outside_checking_mode() -> None:
    """Too long a length is then limited to the capacity, on the device."""
    full, beyond = (
        fd.decode_attention(**(attention_arguments() | {"cache_seqlens": ints(8, length)}))
        for length in (8, 9)
    )
    assert isinstance(full, Tensor)
    assert isinstance(beyond, Tensor)
    assert torch.equal(full, beyond)


@pytest.mark.usefixtures("checking")
def test_nothing_is_checked_by_value_while_tracing() -> None:
    wrong = attention_arguments() | {"cache_seqlens": ints(3, 9)}
    compiled = torch.compile(fd.decode_attention, fullgraph=True, backend="eager")
    traced = compiled(**wrong)
    with FakeTensorMode() as mode:
        fakes: Arguments = {name: mode.from_tensor(x) for name, x in wrong.items()}
        faked = fd.decode_attention(**fakes)
    for out in (traced, faked):
        assert isinstance(out, Tensor)
        assert out.shape == (2, 1, 4, 16)


def test_checking_ends_with_its_block() -> None:
    assert not settings.is_checking()
    with settings.checking():
        assert settings.is_checking()
        with settings.checking(False):
            assert not settings.is_checking()
        assert settings.is_checking()
    assert not settings.is_checking()


@pytest.mark.parametrize(("value", "expected"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_the_environment_sets_checking_mode(
    monkeypatch: pytest.MonkeyPatch, value: str | None, expected: bool
) -> None:
    with monkeypatch.context() as environment:
        environment.delenv(settings.CHECK_VARIABLE, raising=False)
        if value is not None:
            environment.setenv(settings.CHECK_VARIABLE, value)
        importlib.reload(settings)
        assert settings.is_checking() is expected
    importlib.reload(settings)


def test_the_environment_is_not_guessed_at(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as environment:
        environment.setenv(settings.CHECK_VARIABLE, "yes")
        with pytest.raises(InvalidInput, match=r"FLASH_DECODING_CHECK: got 'yes'; wanted 1 \(on\) or 0"):
            importlib.reload(settings)
    importlib.reload(settings)
    assert not settings.is_checking()
