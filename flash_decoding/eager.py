"""Whether a call is a matter between its caller and the current GPU alone.

PyTorch's dispatcher brings to a call who else has a part in it: compilers that trace it, modes, transforms,
subclasses of tensors, profilers. That takes as many microseconds as all else that the host does. Where nobody
else has a part, an operator may as well be a function.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from flash_decoding import settings

_TENSORS = frozenset({Tensor, torch.nn.Parameter, type(None)})

_PLACING, _COUNTING = (
    torch._C.DispatchKeySet(key).raw_repr()
    for key in (torch._C.DispatchKey.BackendSelect, torch._C.DispatchKey.ADInplaceOrView)
)
_EVERYDAY = frozenset({0, _PLACING, _COUNTING, _PLACING | _COUNTING})
"""What the dispatcher does for every thread: place new tensors, count versions (not in inference mode)."""

# Looked up once: every call asks.
_included = torch._C._dispatch_tls_local_include_set
_torch_functions = torch._C._len_torch_function_stack
_is_profiled = torch._C._autograd._profiler_enabled


def is_alone(tensors: tuple[Any, ...]) -> bool:
    """True where nothing but this library and the current GPU takes part in a call.

    Args:
        tensors: the call's, None for those that it lacks; the first one says where it runs. Whatever else a
            caller passes is no such call.
    """
    return (
        not torch.compiler.is_compiling()  # first: a compiler that traces this sees nothing of the rest
        and tensors[0] is not None
        and are_plain(map(type, tensors))
        and is_unwatched(tensors[0])
    )


def are_plain(types: Iterable[type]) -> bool:
    """True of tensors, of none, and of nothing else that a caller may pass."""
    return _TENSORS.issuperset(types)


def is_unwatched(first: Tensor) -> bool:
    """True where a call with plain tensors, this one first, is alone; not to be asked by a compiler.

    Modes, transforms, tracers and profilers are to see operators.
    """
    return (
        is_on_current_gpu(first)
        and not settings.is_checking()
        and _included().raw_repr() in _EVERYDAY
        and not _torch_functions()
        and not _is_profiled()
    )


def is_on_current_gpu(x: Tensor) -> bool:
    """True where Triton launches on the device of ``x`` as things are."""
    # PyTorch's own question under torch.cuda.current_device, which first sees to it that there is a context.
    return x.is_cuda and x.get_device() == torch._C._cuda_getDevice()
