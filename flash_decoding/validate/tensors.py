"""What one tensor has to be: rank, dtype, device, strides. No contents are read."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_decoding.errors import InvalidInput, Unsupported

MAX_HEAD_DIM = 256

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

SINK_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Sinks are weights of a model, one load a head: they are converted where they are used."""


def leading(name: str, x: Tensor, shape: str, rank: int) -> None:
    """Check the tensor that all others of a call are compared with."""
    view(name, x, shape, rank)
    floats(name, x)
    no_grad(name, x)
    head_dim(name, x.shape[-1])
    if 0 in x.shape:
        raise InvalidInput(name, shape_of(x), f"{shape} without a zero")


def like(name: str, x: Tensor, like_name: str, other: Tensor) -> None:
    """Check 4-dimensional keys, values or queries against the dtype and the device of another tensor."""
    view(name, x, "(batch, rows or pages; tokens; heads; elements)", 4)
    if x.dtype != other.dtype:
        raise InvalidInput(name, x.dtype, f"{other.dtype}, the dtype of {like_name}")
    same_device(name, x, other.device)
    no_grad(name, x)


def view(name: str, x: Tensor, shape: str, rank: int) -> None:
    """Check that ``x`` is a tensor of this rank whose last dimension is contiguous."""
    if not isinstance(x, Tensor):
        raise InvalidInput(name, type(x).__name__, f"a tensor {shape}")
    if x.ndim != rank:
        raise InvalidInput(name, f"{x.ndim} dimensions, {shape_of(x)}", f"{rank} dimensions, {shape}")
    if x.stride()[-1] != 1 and x.shape[-1] > 1:
        raise InvalidInput(name, f"strides {x.stride()}", "a contiguous last dimension (stride 1)")


def floats(name: str, x: Tensor) -> None:
    """Check for a dtype and a device that something here computes with."""
    dtype = x.dtype
    if dtype not in _DTYPES and not (dtype == torch.float64 and x.is_cpu):
        raise InvalidInput(name, dtype, "float16, bfloat16 or float32 (float64 too on a CPU)")
    if not (x.is_cuda or x.is_cpu or x.is_meta):
        raise Unsupported(f"{name} on device {x.device}", ("kernels are for cuda, PyTorch code for cpu",))


def no_grad(name: str, x: Tensor) -> None:
    """Refuse a tensor that a backward pass would have to reach."""
    if x.requires_grad and torch.is_grad_enabled():
        why = "forward only: detach the tensor, or call under torch.no_grad()"
        raise Unsupported(f"backward through {name}", (why,))


def head_dim(name: str, size: int) -> None:
    """Check the elements of a head."""
    if not 0 < size <= MAX_HEAD_DIM or size % 8 != 0:
        raise InvalidInput(name, f"head_dim {size}", f"a multiple of 8 from 8 to {MAX_HEAD_DIM}")


def same_device(name: str, x: Tensor, device: torch.device) -> None:
    """Check that ``x`` lies with the other tensors of the call."""
    if x.device != device:
        raise InvalidInput(name, f"device {x.device}", f"device {device}, as the other tensors")


def index(name: str, x: Tensor, shape: str, rank: int, device: torch.device) -> None:
    """Check a tensor of int32 lengths, rows or page numbers."""
    view(name, x, shape, rank)
    if x.dtype != torch.int32:
        raise InvalidInput(name, x.dtype, "torch.int32")
    same_device(name, x, device)


def per_sequence(name: str, x: Tensor, batch: int, device: torch.device) -> None:
    """Check one int32 per sequence."""
    index(name, x, "(batch,)", 1, device)
    if x.shape[0] != batch:
        raise InvalidInput(name, shape_of(x), f"({batch},), one entry per sequence")


def mask(name: str, x: Tensor, batch: int, device: torch.device) -> None:
    """Check one bool per sequence and slot."""
    view(name, x, "(batch, columns)", 2)
    if x.dtype != torch.bool:
        raise InvalidInput(name, x.dtype, "torch.bool: True where the slot exists")
    if x.shape[0] != batch:
        raise InvalidInput(name, shape_of(x), f"({batch}, columns), one row per sequence of the call")
    same_device(name, x, device)


def per_head(
    name: str,
    x: Tensor,
    shapes: tuple[tuple[int, ...], ...],
    device: torch.device,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
) -> None:
    """Check one number per head, or per sequence and head."""
    wanted = " or ".join(str(shape) for shape in shapes)
    if not isinstance(x, Tensor):
        raise InvalidInput(name, type(x).__name__, f"a float32 tensor {wanted}")
    if x.dtype not in dtypes:
        raise InvalidInput(name, x.dtype, " or ".join(str(dtype) for dtype in dtypes))
    if tuple(x.shape) not in shapes:
        raise InvalidInput(name, shape_of(x), wanted)
    view(name, x, wanted, x.ndim)
    same_device(name, x, device)
    no_grad(name, x)


def shape_of(x: Tensor) -> str:
    """The shape as a caller writes it."""
    return str(tuple(x.shape))
