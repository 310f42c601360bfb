"""Programmatic dependent launch: a kernel starts while the one before it ends, and waits where it has to.

A launch costs microseconds, as much as the reduction itself. Launched this way, programs are placed as soon
as those of the kernel before have all signalled (or ended) and there is room. Each kernel here waits for the
one before to be complete before it touches memory that could be another kernel's, and signals only after it:
so whoever comes next may take for granted all that came before its predecessor.

Hopper and later only; elsewhere plans say ``overlap=False`` and nothing of this is compiled. The instructions
are written out because Triton 3.4 has names for them that do not compile.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def wait_for_the_kernel_before() -> None:
    """Return when the kernel before is complete and what it wrote can be read."""
    tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def wait_knowing(a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor) -> None:
    """Wait as above, with four numbers computed by then, none of them negative.

    The wait looks at them, so it comes after what they are computed from. Left to itself the assembler puts
    that off until they are needed, and that is when nothing else is left to do.
    """
    tl.inline_asm_elementwise(
        """{
            .reg .pred %any;
            .reg .b64 %all;
            or.b64 %all, $1, $2;
            or.b64 %all, %all, $3;
            or.b64 %all, %all, $4;
            setp.ne.s64 %any, %all, -1;
            @%any griddepcontrol.wait;
            mov.b32 $0, 0;
        }""",
        "=r,l,l,l,l",
        [tl.cast(a, tl.int64), tl.cast(b, tl.int64), tl.cast(c, tl.int64), tl.cast(d, tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def let_the_next_kernel_start() -> None:
    """Signal: the next kernel's programs may be placed."""
    tl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def wait_in_first_program(ENABLED: tl.constexpr) -> None:
    """For programs that have nothing to do: one waits all the same, or this kernel could be complete before
    the one before it, and whoever comes next would take that for complete, too.
    """
    if ENABLED:
        if tl.program_id(0) == 0:
            wait_for_the_kernel_before()


def launch_options(enabled: bool) -> dict[str, bool]:
    """What to ask of Triton's launcher; backends that know no such launch know no such option either."""
    return {"launch_pdl": True} if enabled else {}
