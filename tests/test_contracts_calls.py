"""The contracts of DESIGN.md one by one, through what callers use: C6 to C10, on calls."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import flash_decoding as fd
from flash_decoding.flash_attn import flash_attn_with_kvcache
from flash_decoding.invariant import SPLIT_TOKENS
from flash_decoding.plan import Hardware, make_plan, roles
from flash_decoding.plan.tiles import TILES
from flash_decoding.plan.variants import VARIANTS
from flash_decoding.spec import Problem
from tests.contract_tools import changed, contents, on_every_device, only, same_bits, step, writable
from tests.helpers import Case, assert_close_to_reference, make_inputs
from tests.refusals import Arguments, append_arguments, floats
from tests.source_tree import functions, modules
from tests.test_api import attend
from tests.test_on_gpu import kernels_compiled

OPS = torch.ops.flash_decoding


@pytest.mark.parametrize("name", ["attend", "combine", "fold", "append"])
def test_c06_what_grows_is_not_compiled_in(name: str) -> None:
    """Integers that a kernel takes while it runs must not choose how it is compiled; floats never do."""
    (source,) = (m for m in modules("flash_decoding/kernels") if m.name == f"flash_decoding.kernels.{name}")
    (kernel,) = (f for f in functions(source) if f.node.name == f"{name}_kernel")
    numbers = {a.arg for a in kernel.parameters if a.arg.islower() and "_ptr" not in a.arg}
    numbers = {number for number in numbers if not number.endswith("strides")} - {"scale", "softcap"}
    lists = importlib.import_module(source.name)
    assert "do_not_specialize=[*SIZES, " in ast.unparse(kernel.node.decorator_list[0])
    assert numbers <= {*lists.SIZES, *getattr(lists, "STRIDES", ())}


def test_c06_warps_with_roles_specialise_on_no_more_than_the_portable_kernel() -> None:
    (kernel, same) = (
        next(f for m in modules("flash_decoding/kernels") for f in functions(m) if f.node.name == name)
        for name in ("attend_roles_kernel", "attend_kernel")
    )
    taken, same_taken = ({a.arg for a in f.parameters if a.arg.islower()} for f in (kernel, same))
    assert taken - {"batch"} <= same_taken
    lists = "[*attend.SIZES, *attend.STRIDES, *attend.TABLES, 'batch']"
    assert lists in ast.unparse(kernel.node.decorator_list[0])


@pytest.mark.gpu
def test_c06_a_decode_loop_compiles_once() -> None:
    case = Case(dtype=torch.float16, capacity=130, seqlens=(0, 0), heads_q=8)
    inputs = make_inputs(case, device="cuda", poison=0.0)
    step(inputs, case)
    compiled = kernels_compiled()
    for _ in range(130):
        inputs.cache.cache_seqlens.add_(1)
        step(inputs, case)
    assert kernels_compiled() == compiled


def test_c07_schemas_declare_what_is_written() -> None:
    for name, written in (
        ("attention", []),
        ("merge_attention", []),
        ("append_kv", ["k_cache", "v_cache", "q_rotated"]),
    ):
        arguments = getattr(OPS, name).default._schema.arguments
        assert [a.name for a in arguments if a.alias_info and a.alias_info.is_write] == written


@on_every_device
@pytest.mark.parametrize("page_size", [0, 8])
def test_c07_only_an_append_writes_and_only_to_caches(page_size: int, device: str) -> None:
    case = Case(
        page_size=page_size, seqlens=(3, 29), leftpad=(1, 0), batch_idx=True, sinks=True, alibi="batch"
    )
    inputs = make_inputs(case, device=device, poison=0.0)
    given = {n: x for part in inputs for n, x in vars(part).items() if isinstance(x, Tensor)}
    angles = torch.randn(64, 4, device=device)
    new_k, new_v = torch.randn(2, 2, 3, 2, 32, device=device)
    tables: Arguments = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    given |= {"new_k": new_k, "new_v": new_v} | tables
    before = contents(given)
    out, lse = attend(inputs, case)
    fd.merge_attention(out[None], lse[None])
    assert changed(given, before) == set()
    q_rotated = fd.append_kv(new_k, new_v, **writable(inputs.cache), **tables, q=inputs.queries.q)
    assert isinstance(q_rotated, Tensor)
    assert changed(given, before) == {"k", "v"}


@on_every_device
@pytest.mark.parametrize("num_splits", [0, 1, 5])
def test_c08_the_same_call_gives_the_same_bits(num_splits: int, device: str) -> None:
    case = Case(batch=3, capacity=700, seqlens=(700, 3, 411), heads_q=8, dtype=torch.float16)
    inputs = make_inputs(case, device=device)
    first = attend(inputs, case, num_splits=num_splits)
    assert all(same_bits(attend(inputs, case, num_splits=num_splits), first) for _ in range(3))


INVARIANT = Case(batch=3, capacity=1300, seqlens=(1230, 3, 1201), heads_q=8, dtype=torch.float16)


@on_every_device
@pytest.mark.parametrize("page_size", [0, 16])
def test_c08_batch_invariant_bits_do_not_depend_on_the_neighbours(page_size: int, device: str) -> None:
    case = dataclasses.replace(INVARIANT, page_size=page_size)
    assert case.lengths[2] > SPLIT_TOKENS
    inputs = make_inputs(case, device=device)
    out, lse = attend(inputs, case, batch_invariant=True)
    assert_close_to_reference(out, lse, *inputs)
    for b in range(3):
        alone = attend(only(inputs, b), case, batch_invariant=True)
        assert same_bits(alone, (out[b : b + 1], lse[b : b + 1]))


@pytest.mark.gpu
def test_c08_batch_invariant_bits_are_those_of_a_cuda_graph() -> None:
    inputs = make_inputs(INVARIANT, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attend(inputs, INVARIANT, batch_invariant=True)
    graph.replay()
    alone = attend(only(inputs, 2), INVARIANT, batch_invariant=True)
    assert same_bits(alone, (out[2:], lse[2:]))


REFUSED: list[tuple[str, Any]] = [
    ("cache_seqlens", 7),
    ("v", floats(2, 1, 2, 16)),
    ("softmax_scale", math.nan),
    ("window_size", (-2, 0)),
    ("num_splits", -1),
    ("alibi_slopes", floats(3)),
]


@on_every_device
@pytest.mark.parametrize(("argument", "value"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_c09_what_is_refused_has_written_nothing(argument: str, value: Any, device: str) -> None:
    """An append and an attention in one call: the append is fine, and yet does not happen."""
    good = append_arguments() | {"q": floats(2, 1, 4, 16)}
    call: Arguments = {
        n: x.to(device) if isinstance(x, Tensor) else x for n, x in (good | {argument: value}).items()
    }
    with pytest.raises(fd.InvalidInput) as caught:
        flash_attn_with_kvcache(**call)
    error = caught.value
    assert error.argument == argument
    assert str(error) == f"{argument}: got {error.got}; wanted {error.wanted}"
    assert call["k_cache"].count_nonzero() + call["v_cache"].count_nonzero() == 0


def test_c09_unsupported_gives_the_reasons_of_every_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    old = dataclasses.replace(Hardware.named("A100"), name="old", capability=(7, 0))
    monkeypatch.setattr(Hardware, "of", lambda device: old)
    with pytest.raises(fd.Unsupported, match=r"compute capability \(7, 0\) is below 8\.0") as caught:
        attend(make_inputs(Case()), Case())
    assert [reason.partition(": ")[0] for reason in caught.value.reasons] == [v.name for v in VARIANTS]
    assert all(reason in str(caught.value) for reason in caught.value.reasons)


def test_c09_nothing_is_ignored() -> None:
    for call in (
        fd.decode_attention,
        fd.decode_attention_varlen,
        fd.append_kv,
        fd.merge_attention,
        fd.warmup,
    ):
        kinds = {parameter.kind for parameter in inspect.signature(call).parameters.values()}
        assert not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    with pytest.raises(TypeError, match="dropout"):
        flash_attn_with_kvcache(**append_arguments(), q=floats(2, 1, 4, 16), dropout=0.0)  # type: ignore[call-arg]  # on purpose


def test_c10_tiles_come_from_the_table() -> None:
    tuners = {"autotune", "Autotuner", "do_bench", "heuristics"}
    for module in modules("flash_decoding"):
        names = {getattr(node, "attr", getattr(node, "id", "")) for node in ast.walk(module.tree)}
        assert module.unit == "bench" or not names & tuners, module
    shipped = {row.tile for row in TILES}
    for q_len, head_dim, batch in ((1, 64, 1), (1, 128, 64), (3, 128, 2), (8, 256, 1), (512, 128, 4)):
        call = Problem(batch, q_len, 32, 8, head_dim, head_dim, 4096, 2)
        assert make_plan(call, Hardware.named("H200")).tile in shipped | set(roles.all_tiles(call))


@pytest.mark.gpu
def test_c10_nothing_compiles_after_the_warmup() -> None:
    case = Case(dtype=torch.bfloat16, heads_q=12, head_dim=64, page_size=16, capacity=400, seqlens=(5, 350))
    fd.warmup(heads_q=12, heads_kv=2, head_dim=64, page_sizes=(16,), device="cuda")
    compiled = kernels_compiled()
    inputs = make_inputs(case, device="cuda")
    fd.append_kv(
        *(torch.zeros(2, 1, 2, 64, dtype=torch.bfloat16, device="cuda") for _ in "kv"),
        **writable(inputs.cache),
    )
    for num_splits in (0, 1, 3):
        attend(inputs, case, num_splits=num_splits)
    assert kernels_compiled() == compiled
