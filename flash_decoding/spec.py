"""Vocabulary of the library: the records that travel between the floors.

Legend of names and shapes (used everywhere, in code, docs and errors)

===============  =====================================================================================
batch            sequences in the call
q_len            query tokens of a sequence (1 in plain decoding); ``max_q_len`` where it is ragged
heads_q          query heads
heads_kv         key/value heads; ``group = heads_q // heads_kv`` query heads share one
head_dim         elements of a query or key vector; ``head_dim_v`` of a value vector
slot             position of a token in its cache, from 0
capacity         slots that a sequence can have: ``max_pages * page_size`` in a paged cache
page_size        tokens in a page; 0 stands for a contiguous cache
rows             ``q_len * group``: the query rows that share one pass over a key/value head
tile             ``block_m`` rows by ``block_n`` keys: what one step of a kernel multiplies
num_splits       programs that share the keys of one (sequence, key/value head, row tile)
===============  =====================================================================================

Tensors

===================  =================================================================================
q                    (batch, q_len, heads_q, head_dim), or (total_q, heads_q, head_dim) when ragged
k_cache, v_cache     contiguous: (cache_batch, capacity, heads_kv, head_dim or head_dim_v)
                     paged: (pages, page_size, heads_kv, head_dim or head_dim_v)
block_table          (batch, max_pages) int32: page of each ``page_size`` slots
cache_seqlens        (batch,) int32: slots in use; the last query token attends from the last slot
cache_batch_idx      (batch,) int32: row of the contiguous cache (or of block_table) a sequence uses
cache_leftpad        (batch,) int32: first slot in use; slots before it do not exist for the sequence
key_mask             (batch, columns) bool: slots that are False, or lie beyond its columns, do not exist
cu_seqlens_q         (batch + 1,) int32: where each sequence's queries start in a ragged q
out                  like q, with head_dim_v as last dimension
lse                  fp32, natural logarithm: (batch, heads_q, q_len), or (heads_q, total_q) when ragged
===================  =================================================================================
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

UNBOUNDED = -1
"""Window size that stands for "as far as there are keys", as in flash-attn."""

Kind = Literal["flash_attention", "flash_decoding"]


@dataclass(frozen=True, eq=False)
class Options:
    """What a call asks of the scores and the mask, beyond plain softmax attention.

    With ``slot`` the key's position and ``position = seqlen - q_len + i`` that of query token ``i``::

        score = softmax_scale * <q, k>
        score = softcap * tanh(score / softcap)                      if softcap > 0
        score = score - alibi_slopes[head] * |position - slot|       if alibi_slopes is given
        visible = position - window_left <= slot <= position + window_right

    A sink is one more key per head that everybody sees: it adds ``exp(sinks[head])`` to the denominator
    and nothing to the numerator. It is part of the LSE, so a row that sees only its sink has output 0 and
    LSE ``sinks[head]``.

    Causal attention is ``window_right == 0``. :meth:`make` is the one place that says so.
    """

    softmax_scale: float
    window_left: int = UNBOUNDED
    window_right: int = UNBOUNDED
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    """(heads_q,) or (batch, heads_q) fp32."""
    sinks: Tensor | None = None
    """(heads_q,) fp32, bf16 or fp16."""

    @classmethod
    def make(
        cls,
        *,
        head_dim: int,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (UNBOUNDED, UNBOUNDED),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Options:
        """Build the record from the arguments of the public functions (causal means ``window_right = 0``)."""
        left, right = window_size
        return cls(
            softmax_scale=head_dim**-0.5 if softmax_scale is None else softmax_scale,
            window_left=max(left, UNBOUNDED),
            window_right=0 if causal else max(right, UNBOUNDED),
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
        )

    @property
    def is_plain(self) -> bool:
        """True where only scale and causality are asked for: what every attention library does."""
        has_extras = self.alibi_slopes is not None or self.sinks is not None
        has_window = self.window_left != UNBOUNDED or self.window_right not in (UNBOUNDED, 0)
        return self.softcap == 0.0 and not has_window and not has_extras


@dataclass(frozen=True, eq=False)
class Queries:
    """The query tokens of a call: a dense batch, or a ragged one packed along the first dimension."""

    q: Tensor
    cu_seqlens_q: Tensor | None = None
    max_q_len: int = 0
    """Longest q_len of a ragged batch (an upper bound will do); of a dense one it follows from q."""

    @property
    def is_ragged(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def batch(self) -> int:
        return self.q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    @property
    def q_len(self) -> int:
        """q_len of a dense batch, the longest of a ragged one."""
        return self.q.shape[1] if self.cu_seqlens_q is None else self.max_q_len

    @property
    def heads(self) -> int:
        return self.q.shape[-2]


@dataclass(frozen=True, eq=False)
class KVCache:
    """Where the keys and values of a call lie, and how many of them live.

    Sequence ``b`` owns slots ``cache_leftpad[b] <= slot < length``, where ``length`` is
    ``cache_seqlens[b] + new_tokens`` limited to the capacity. Packed ("varlen") keys need no layout of their
    own: they are one shared row, seen through a batch stride of 0, with ``cu_seqlens_k[:-1]`` as left
    padding and ``cu_seqlens_k[1:]`` as lengths.

    ``key_mask`` is for padding with holes. It takes slots away and moves none: lengths, and the positions
    that follow from them, stay what they are. Pages of hidden slots below the length are looked up like
    others, and their contents are not used.
    """

    k: Tensor
    v: Tensor
    cache_seqlens: Tensor
    block_table: Tensor | None = None
    cache_batch_idx: Tensor | None = None
    cache_leftpad: Tensor | None = None
    key_mask: Tensor | None = None
    """Slot s exists for sequence b of the call only if ``s < columns`` and ``key_mask[b, s]``."""
    new_tokens: int = 0
    """Tokens that the same step appended behind ``cache_seqlens``."""
    max_kv_len: int = 0
    """Upper bound of the keys of one sequence, where the caller knows better than the capacity (0: no)."""
    dense: bool = False
    """``cache_seqlens`` is known to hold the capacity for every sequence, so nobody has to read it."""

    @property
    def page_size(self) -> int:
        return 0 if self.block_table is None else self.k.shape[1]

    @property
    def capacity(self) -> int:
        return self.k.shape[1] if self.block_table is None else self.block_table.shape[1] * self.k.shape[1]

    @property
    def heads(self) -> int:
        return self.k.shape[2]


@dataclass(frozen=True, eq=False)
class Rotary:
    """Rotary position embedding of the first ``rotary_dim`` elements of queries and new keys.

    Token ``i`` of the new keys is rotated by its slot ``cache_seqlens + i``; query token ``i`` too if
    ``advance_q``, else every query token by ``cache_seqlens`` (flash-attn's rule without a causal mask).
    """

    cos: Tensor
    """(positions, rotary_dim // 2), the dtype of q."""
    sin: Tensor
    interleaved: bool = False
    """True rotates neighbours (2i, 2i+1), as GPT-J; False halves (i, i + rotary_dim // 2), as NeoX."""
    advance_q: bool = True

    @property
    def rotary_dim(self) -> int:
        return 2 * self.cos.shape[1]


@dataclass(frozen=True, eq=False)
class NewTokens:
    """Keys and values on their way into a cache, with the queries that are rotated alongside."""

    k: Tensor
    """(batch, new_len, heads_kv, head_dim)."""
    v: Tensor
    rotary: Rotary | None = None
    q: Tensor | None = None
    q_rotated: Tensor | None = None
    """Receives the rotated q; given exactly when rotary and q are."""


@dataclass(frozen=True)
class Problem:
    """A call in plain numbers: all that the planner needs, and nothing that changes while tokens arrive."""

    batch: int
    q_len: int
    heads_q: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    kv_len: int
    """Most keys that a sequence can have (its capacity); live lengths are known on the device alone."""
    element_bytes: int
    page_size: int = 0
    window_left: int = UNBOUNDED
    window_right: int = UNBOUNDED
    plain: bool = True
    """No option beyond scale and causality (:attr:`Options.is_plain`)."""
    dense: bool = False
    """Every sequence is known to fill the cache: no lengths, pages, padding or ragged queries."""
    return_lse: bool = True
    ragged: bool = False
    """Sequences have different q_len; ``q_len`` is the longest."""
    masked: bool = False  # a key mask takes slots away
    aligned: bool = True
    """Every key and every value begins at a multiple of 16 bytes, as Triton can tell by their strides."""

    @property
    def group(self) -> int:
        return self.heads_q // self.heads_kv

    @property
    def rows(self) -> int:
        return self.q_len * self.group

    @property
    def visible_len(self) -> int:
        """Most keys that the query tokens of one sequence can see together, windows taken into account."""
        if self.window_left == UNBOUNDED:
            return self.kv_len
        return min(self.kv_len, self.window_left + self.q_len + max(self.window_right, 0))

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that have to be read once."""
        per_token = (self.head_dim + self.head_dim_v) * self.heads_kv * self.element_bytes
        return self.batch * self.visible_len * per_token


def padded(columns: int) -> int:
    """Columns of a vector as the matrix units take them: a power of two, 16 at least."""
    return max(16, 1 << (columns - 1).bit_length())


@dataclass(frozen=True)
class Tile:
    """Shape of one step of the attention kernel, and how Triton is to build it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    in_flight: int = 0  # stages loaded at once, at most, by warps with roles; 0: all


@dataclass(frozen=True)
class Plan:
    """What will run: decided from a :class:`Problem` and a ``Hardware``, and from nothing else."""

    kind: Kind
    variant: str  # name of the row of ``plan.variants`` that runs it
    tile: Tile
    num_splits: int
    split_tokens: int
    """Keys per split, at most, when fixed (batch-invariant mode); 0 where live keys are shared evenly."""
    reasons: tuple[str, ...] = dataclasses.field(default=(), compare=False)  # why, one decision a line
    overlap: bool = False
    """Kernels start while the one before them ends (programmatic dependent launch)."""
    balanced: bool = False
    """``num_splits`` programs share the live keys of all sequences evenly, not those of each."""
    roles: bool = False  # some warps only load, the others only multiply
    programs: int = 0
    """Programs that take one part after another, where ``roles``; 0: as many as there are parts."""
    leaf_tokens: int = 0
    """Keys of a leaf, of which fixed splits are made (fewer in sequences of one split); 0: none."""
    by_leaf: bool = False  # ``num_splits`` counts leaves: each of them has a program, not each fixed split
    small_split_tokens: int = 0  # keys per fixed split, at most, in a sequence of up to ``small_splits``
    small_splits: int = 0  # 0: a fixed split has as many keys in every sequence
    runs: int = 0
    """Where > 0, so many programs of each key/value head and row tile share fixed splits of all sequences."""
