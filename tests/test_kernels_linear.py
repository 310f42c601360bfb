"""The linear kernel, interpreted on a CPU or compiled on a GPU, and how its rows are shared out."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from flash_decoding.decoder import linear as decoder_linear
from flash_decoding.plan import Hardware
from flash_decoding.plan.hardware import PRESETS
from flash_decoding.plan.linear import MAX_STEP, MAX_TOKENS, choose_linear_tile, even_step, smem_bytes
from flash_decoding.projection import Activation, LinearTile, Norm, Projection

TILE = LinearTile(12, 16, 64, 4, 2)


@dataclass(frozen=True)
class Layer:
    """A projection to draw."""

    rows: tuple[int, ...]
    columns: int
    tokens: int = 1
    norm: bool = False
    offset: float = 0.0
    bias: bool = False
    gated: Activation | None = None
    residual: bool = False
    tile: LinearTile = TILE

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}x{self.tokens}"


LAYERS = (
    Layer((40, 24, 16), 128, norm=True),
    Layer((33, 7, 5), 100, tokens=3, norm=True, bias=True),
    Layer((40, 40), 96, tokens=5, norm=True, offset=1.0, gated="silu"),
    Layer((48, 48), 64, tokens=16, gated="gelu_tanh", bias=True),
    Layer((40,), 130, tokens=2, residual=True),
    Layer((5,), 8, tokens=16, norm=True, residual=True),
    Layer((100,), 200, tokens=7, bias=True, tile=LinearTile(32, 32, 128, 4, 3)),
    Layer((1, 1, 1), 64, norm=True),
)


def make(layer: Layer, device: torch.device, dtype: torch.dtype) -> tuple[Projection, Tensor, Tensor | None]:
    """Weights, input and residual of a layer, the same on every device."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    weights = tuple(randn(rows, layer.columns) * layer.columns**-0.5 for rows in layer.rows)
    biases = tuple(randn(rows) for rows in layer.rows) if layer.bias else ()
    norm = Norm(randn(layer.columns), 1e-5, layer.offset) if layer.norm else None
    projection = Projection(weights, biases, norm, layer.gated)
    x = randn(layer.tokens, layer.columns)
    return projection, x, randn(layer.tokens, projection.rows) if layer.residual else None


def exact(projection: Projection, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """The formula of ``Projection`` in float64; and how large the terms are that it adds up."""
    x = x.double()
    norm = projection.norm
    if norm is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)
        x = x * (norm.weight.double() + norm.offset)
    weights = [weight.double() for weight in projection.weights]
    none = torch.zeros((), dtype=x.dtype, device=x.device)
    biases = [bias.double() for bias in projection.biases if bias is not None] or [none] * len(weights)
    parts = [x @ w.T + b for w, b in zip(weights, biases, strict=True)]
    sizes = [x.abs() @ w.abs().T + b.abs() for w, b in zip(weights, biases, strict=True)]
    if projection.gated is None:
        y, size = torch.cat(parts, -1), torch.cat(sizes, -1)
    else:
        gate = (
            functional.silu(parts[0])
            if projection.gated == "silu"
            else functional.gelu(parts[0], approximate="tanh")
        )
        # both activations have slopes of at most 1.13, so an error of the gate grows by no more
        y, size = gate * parts[1], 1.13 * sizes[0] * parts[1].abs() + gate.abs() * sizes[1]
    return (y, size) if residual is None else (y + residual.double(), size + residual.double().abs())


def assert_close(got: Tensor, projection: Projection, x: Tensor, residual: Tensor | None) -> None:
    """Within what rounding allows: of the normalised input, of the sums in fp32, and of the result.

    The input is rounded to its dtype once after the norm, each sum of n fp32 products in any order errs by
    sqrt(n) roundings of its terms, and the result is rounded once.
    """
    y, size = exact(projection, x, residual)
    eps, eps32 = torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps
    sums = 4 * math.sqrt(projection.columns) * eps32
    bound = (eps + sums) * size + eps * y.abs() + torch.finfo(x.dtype).tiny
    assert got.shape == y.shape
    assert bool(((got.double() - y).abs() <= bound).all())


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_the_kernel_computes_the_formula(layer: Layer, device: torch.device) -> None:
    from flash_decoding.kernels import linear

    projection, x, residual = make(layer, device, torch.float16)
    out = torch.full((layer.tokens, projection.rows), float("nan"), dtype=x.dtype, device=device)
    overlaps = device.type == "cuda" and Hardware.of(device).overlaps_launches
    linear.launch(x, projection, layer.tile, residual=residual, out=out, overlaps=overlaps)
    assert_close(out, projection, x, residual)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_step_applies_the_formula(layer: Layer, dtype: torch.dtype, device: torch.device) -> None:
    """Whatever carries it out: the kernel for a few tokens of 16 bits on a GPU, PyTorch for all else."""
    projection, x, residual = make(layer, device, dtype)
    out = decoder_linear.apply(projection, x, residual)
    if dtype == torch.float32 or device.type == "cuda":
        assert_close(out, projection, x, residual)
    else:
        # PyTorch rounds after every operator: norm, product, bias, activation, gate and residual
        y, size = exact(projection, x, residual)
        assert bool(((out.double() - y).abs() <= 6 * torch.finfo(dtype).eps * (size + y.abs())).all())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 4, 16, 17, 40])
@pytest.mark.parametrize(
    "layer",
    [
        Layer((4096, 1024, 1024), 4096, norm=True, bias=True),
        Layer((4096,), 14336, residual=True),
        Layer((3072, 3072), 1024, norm=True, gated="silu"),
        Layer((151936,), 1024, norm=True),
    ],
    ids=str,
)
def test_layers_of_models(layer: Layer, tokens: int, dtype: torch.dtype) -> None:
    """With the tile that the table gives for this GPU; more tokens than ride along go through PyTorch."""
    projection, x, residual = make(dataclasses.replace(layer, tokens=tokens), torch.device("cuda"), dtype)
    out = decoder_linear.apply(projection, x, residual)
    if tokens <= MAX_TOKENS:
        assert_close(out, projection, x, residual)
    else:
        y, size = exact(projection, x, residual)
        assert bool(((out.double() - y).abs() <= 6 * torch.finfo(dtype).eps * (size + y.abs())).all())


@pytest.mark.gpu
def test_the_residual_may_be_the_output(device: torch.device) -> None:
    from flash_decoding.kernels import linear

    projection, x, residual = make(Layer((64,), 64, tokens=4, residual=True), device, torch.float16)
    assert residual is not None
    out = residual.clone()
    linear.launch(x, projection, TILE, residual=out, out=out, overlaps=False)
    assert_close(out, projection, x, residual)


@given(
    rows=st.lists(st.integers(1, 40000), min_size=1, max_size=3),
    waves=st.integers(1, 4),
    sm_count=st.integers(4, 304),
)
def test_steps_cover_all_rows_with_no_program_to_spare(rows: list[int], waves: int, sm_count: int) -> None:
    programs = max(sm_count * waves, len(rows))
    step = even_step(rows, programs)
    assert sum(-(-height // step) for height in rows) <= programs
    assert step == 1 or sum(-(-height // (step - 1)) for height in rows) > programs


@given(
    rows=st.lists(st.integers(1, 160000), min_size=1, max_size=3),
    gated=st.booleans(),
    hardware=st.sampled_from(PRESETS),
)
def test_tiles_hold_their_rows_and_fit_the_gpu(rows: list[int], gated: bool, hardware: Hardware) -> None:
    tile = choose_linear_tile(tuple(rows[:1] if gated else rows), hardware, gated=gated)
    assert 0 < tile.step <= tile.block_n <= MAX_STEP
    assert smem_bytes(tile.block_n, tile.block_k, tile.num_stages, gated=gated) <= hardware.smem_bytes


def test_large_activations_do_not_overflow_in_half_precision(device: torch.device) -> None:
    """Residual streams have outliers; times the norm's weight they can leave the range of fp16."""
    projection, x, _ = make(Layer((40,), 128, tokens=2, norm=True), device, torch.float16)
    assert projection.norm is not None
    projection = dataclasses.replace(projection, norm=dataclasses.replace(projection.norm, offset=20.0))
    x[:, 3] = 30000.0
    out = decoder_linear.apply(projection, x)
    assert bool(out.isfinite().all())


def test_reasons_against_the_kernel() -> None:
    few, many = torch.zeros(1, 8), torch.zeros(MAX_TOKENS + 1, 8)
    assert [reason.split()[0] for reason in decoder_linear.why_not(few)] == ["the", "the"]
    assert "more than 16 tokens" in decoder_linear.why_not(many)[-1]
