"""Measure tiles of the linear kernel on this machine's GPU, beside cuBLAS: the record that its rows name.

    python -m tools.tune_linear RECORD.json [SHAPE...]

Weights are rotated past the L2 in CUDA graphs, as in a model, whose layers never meet their weights there.
Nothing is changed: the rows of ``decoder.linear`` are written by hand.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flash_decoding.bench.capture import make_ready
from flash_decoding.bench.environment import describe
from flash_decoding.bench.timing import Burst, Call, Effort, measure
from flash_decoding.decoder.linear import with_pytorch
from flash_decoding.kernels import linear
from flash_decoding.plan import Hardware
from flash_decoding.plan.linear import even_step
from flash_decoding.projection import Activation, LinearTile, Norm, Projection
from flash_decoding.spec import padded

DEVICE = torch.device("cuda")

COMPILERS = 14
"""Processes that compile side by side before anything is timed."""

TOKENS = (1, 16)

COMPILED = ("34B qkv", "34B gate_up", "34B down")
"""Shapes that torch.compile is measured on, too: it takes its time."""

AHEAD = (512, 2048)
"""Bytes of each row to ask for before waiting."""


@dataclass(frozen=True)
class Shape:
    """A layer of a model: rows of each weight, columns, and what goes with it."""

    rows: tuple[int, ...]
    columns: int
    norm: bool = False
    gated: Activation | None = None

    @property
    def bytes(self) -> int:
        """Bytes of the weights."""
        return 2 * sum(self.rows) * self.columns


SHAPES = {
    "34B qkv": Shape((8192, 1024, 1024), 8192, norm=True),
    "34B out": Shape((8192,), 8192),
    "34B gate_up": Shape((22016, 22016), 8192, norm=True, gated="silu"),
    "34B down": Shape((8192,), 22016),
    "34B head": Shape((32000,), 8192, norm=True),
    "8B qkv": Shape((4096, 1024, 1024), 4096, norm=True),
    "8B out": Shape((4096,), 4096),
    "8B gate_up": Shape((14336, 14336), 4096, norm=True, gated="silu"),
    "8B down": Shape((4096,), 14336),
    "8B head": Shape((128256,), 4096, norm=True),
}


def candidates(shape: Shape) -> Iterable[LinearTile]:
    """Rows per program that fill whole waves, with tiles whose pipeline fits the shared memory."""
    heights = shape.rows[:1] if shape.gated else shape.rows
    width = 2 if shape.gated else 1
    sm_count = Hardware.of(DEVICE).sm_count
    steps = {even_step(heights, sm_count * waves) for waves in (1, 2, 3, 4, 6)} | {32, 64}
    for step, block_k, warps, stages, ahead in itertools.product(
        sorted(steps), (64, 128, 256), (4, 8), (3, 4, 6), AHEAD
    ):
        block_n = padded(step)
        stage = 2 * block_k * (width * block_n + 16)
        in_flight = 2 * block_k * width * step * (stages - 1)
        odd = (warps == 8) != (block_n * width >= 128) or block_n > 128 or in_flight < 30_000
        if stage * stages < 220_000 and not odd:
            yield LinearTile(step, block_n, block_k, warps, stages, ahead)


def projection(shape: Shape) -> Projection:
    """Random weights of a layer."""

    def randn(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=torch.bfloat16, device=DEVICE).div_(sizes[-1] ** 0.5)

    weights = torch.split(randn(sum(shape.rows), shape.columns), list(shape.rows))
    norm = Norm(1 + randn(shape.columns), 1e-5) if shape.norm else None
    return Projection(weights, norm=norm, gated=shape.gated)


def ours(layer: Projection, x: Tensor, tile: LinearTile) -> Call:
    """The kernel over this layer, with the residual where a model has one."""
    out = x.new_zeros(x.shape[0], layer.rows)
    residual = out if layer.norm is None else None

    def run() -> Tensor:
        linear.launch(x, layer, tile, residual=residual, out=out, overlaps=True)
        return out

    return run


def cublas(layer: Projection, x: Tensor) -> Call:
    """The product alone, all weights as one."""
    first = layer.weights[0]
    rows = sum(weight.shape[0] for weight in layer.weights)
    merged = first.as_strided((rows, first.shape[1]), first.stride())
    return lambda: functional.linear(x, merged)


def compiled(layer: Projection, x: Tensor) -> Call:
    """All of it as ``torch.compile`` chooses, one graph for each layer's weights."""

    def run(x: Tensor, weights: tuple[Tensor, ...], factors: Tensor | None) -> Tensor:
        norm = None if factors is None or layer.norm is None else Norm(factors, layer.norm.eps)
        return with_pytorch(Projection(weights, norm=norm, gated=layer.gated), x, None)

    fast = torch.compile(run, mode="max-autotune-no-cudagraphs", dynamic=False)
    factors = None if layer.norm is None else layer.norm.weight
    result: Call = lambda: fast(x, layer.weights, factors)  # noqa: E731 - one call, as of all contenders
    return result


def tune(name: str, tokens: int) -> dict[str, Any]:
    """Times of all candidates for one layer and number of tokens, the fastest first."""
    shape = SHAPES[name]
    layers = [projection(shape) for _ in range(max(2, -(-200_000_000 // shape.bytes)))]
    x = torch.randn(tokens, shape.columns, dtype=torch.bfloat16, device=DEVICE)
    made = {str(dataclasses.astuple(t)): [ours(layer, x, t) for layer in layers] for t in candidates(shape)}
    made["cuBLAS"] = [cublas(layer, x) for layer in layers]
    if name in COMPILED:
        torch.compiler.reset()
        made["torch.compile"] = [compiled(layer, x) for layer in layers]
    bursts: dict[str, Burst] = {label: make_ready(calls, DEVICE).burst for label, calls in made.items()}
    timings = measure(bursts, Effort(budget_s=0.01, min_samples=5, max_samples=20, warmups=1))
    ranked = sorted(timings, key=lambda label: timings[label].median_s)
    return {
        "shape": name,
        "tokens": tokens,
        "weight_bytes": shape.bytes,
        "tiles": [{"tile": label, "median_us": timings[label].median_s * 1e6} for label in ranked],
    }


def compile_share(name: str, share: int) -> None:
    """Run every fourth candidate once, which leaves its kernels in Triton's cache."""
    layer = projection(SHAPES[name])
    x = torch.randn(1, layer.columns, dtype=torch.bfloat16, device=DEVICE)
    for tile in list(candidates(SHAPES[name]))[share::4]:
        ours(layer, x, tile)()
    torch.cuda.synchronize()


def main(record: str, *shapes: str) -> None:
    """Tune and write the record after every shape, so that an interrupted run keeps what it has."""
    names = shapes or tuple(SHAPES)
    with ProcessPoolExecutor(COMPILERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_share, *zip(*itertools.product(names, range(4)), strict=True)))
    content: dict[str, Any] = {
        "environment": describe(DEVICE),
        "hardware": Hardware.of(DEVICE).name,
        "shapes": [],
    }
    for name, tokens in itertools.product(names, TOKENS):
        found = tune(name, tokens)
        content["shapes"].append(found)
        speeds = [f"{t['tile']} {t['median_us']:.1f}us" for t in found["tiles"][:5]]
        others = {t["tile"]: t["median_us"] for t in found["tiles"] if not t["tile"].startswith("(")}
        rate = found["weight_bytes"] / found["tiles"][0]["median_us"] / 1e6
        sys.stdout.write(f"{name:<12} x{tokens:<3} {rate:.2f} TB/s  {others}  {', '.join(speeds)}\n")
        sys.stdout.flush()
        Path(record).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
