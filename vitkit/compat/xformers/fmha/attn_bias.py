"""The mask classes of ``xformers.ops.fmha.attn_bias``: same names, constructors and attributes.

Every mask is two facts: a *band* around a diagonal, and the *blocks* of queries and keys it holds
in. The table of bands goes by class name, so that xformers' own objects are understood too. Paged
masks, which belong to the key caches of language models, are not offered.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


class Band(NamedTuple):
    """Query i attends key j if ``-left <= j - i - shift <= right``; None is no limit. ``shift`` is
    0, or with ``bottom_right`` so that the last query meets the last key."""

    left: int | None = None
    right: int | None = None
    bottom_right: bool = False

    def pairs(self, queries: int, keys: int, device: Any = None) -> torch.Tensor:
        """bool [queries, keys], True = attend."""
        shift = keys - queries if self.bottom_right else 0
        i = torch.arange(queries, device=device)[:, None]
        distance = torch.arange(keys, device=device) - i - shift
        allowed = torch.ones_like(distance, dtype=torch.bool)
        if self.left is not None:
            allowed &= distance >= -self.left
        if self.right is not None:
            allowed &= distance <= self.right
        return allowed


class Block(NamedTuple):
    """Half-open ranges of queries and keys that attend each other."""

    q_start: int
    q_end: int
    k_start: int
    k_end: int


# Class name -> its band, from the object.
BANDS: dict[str, Callable[[Any], Band]] = {
    "LowerTriangularMask": lambda m: Band(right=0),
    "LowerTriangularMaskWithTensorBias": lambda m: Band(right=0),
    "LowerTriangularFromBottomRightMask": lambda m: Band(None, 0, True),
    "LowerTriangularFromBottomRightLocalAttentionMask": lambda m: Band(m._window_size - 1, 0, True),
    "LocalAttentionFromBottomRightMask": lambda m: Band(m.window_left, m.window_right, True),
    "BlockDiagonalMask": lambda m: Band(),
    "BlockDiagonalCausalMask": lambda m: Band(right=0),
    "BlockDiagonalCausalFromBottomRightMask": lambda m: Band(None, 0, True),
    "BlockDiagonalCausalLocalAttentionMask": lambda m: Band(m._window_size - 1, 0),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": (
        lambda m: Band(m._window_size - 1, 0, True)
    ),
    "BlockDiagonalPaddedKeysMask": lambda m: Band(),
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": lambda m: Band(None, 0, True),
    "BlockDiagonalLocalAttentionPaddedKeysMask": (
        lambda m: Band(m.window_left, m.window_right, True)
    ),
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": lambda m: Band(m._window_size - 1, 0, True),
    "BlockDiagonalGappyKeysMask": lambda m: Band(),
    "BlockDiagonalCausalWithOffsetGappyKeysMask": lambda m: Band(None, 0, True),
}


def band(mask: Any) -> Band:
    """Raises ValueError for a class that is not in the table."""
    name = type(mask).__name__
    if name not in BANDS:
        raise ValueError(
            "memory_efficient_attention: attn_bias must be a tensor or one of"
            f" {', '.join(BANDS)}, got {name}"
        )
    return BANDS[name](mask)


def blocks(mask: Any) -> list[Block] | None:
    """None where all queries meet all keys."""
    if not hasattr(mask, "q_seqinfo"):
        return None
    q_starts = mask.q_seqinfo.seqstart_py
    k_starts = mask.k_seqinfo.seqstart_py
    lengths = getattr(mask.k_seqinfo, "seqlen_py", None)
    found = []
    for i, (a, b) in enumerate(itertools.pairwise(q_starts)):
        end = k_starts[i + 1] if lengths is None else k_starts[i] + lengths[i]
        found.append(Block(a, b, k_starts[i], end))
    return found


class AttentionBias:
    """Base of all masks."""

    def materialize(
        self,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> torch.Tensor:
        """[..., queries, keys]: 0 where attended, -inf elsewhere."""
        queries, keys = shape[-2:]
        allowed = torch.zeros(queries, keys, dtype=torch.bool, device=device)
        for b in blocks(self) or [Block(0, queries, 0, keys)]:
            allowed[b.q_start : b.q_end, b.k_start : b.k_end] = band(self).pairs(
                b.q_end - b.q_start, b.k_end - b.k_start, device
            )
        zeros = torch.zeros(queries, keys, dtype=dtype, device=device)
        return zeros.masked_fill(~allowed, float("-inf")).expand(tuple(shape))


class LowerTriangularMask(AttentionBias):
    """Query i attends keys j <= i."""

    def add_bias(self, bias: torch.Tensor) -> LowerTriangularMaskWithTensorBias:
        return LowerTriangularMaskWithTensorBias(bias)


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    """The same, with ``bias`` added to the scores."""

    def __init__(self, bias: torch.Tensor) -> None:
        self._bias = bias

    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        return super().materialize(shape, dtype, device) + self._bias.to(device, dtype)


class LowerTriangularFromBottomRightMask(AttentionBias):
    """The last query attends all keys, the one before all but the last."""

    def make_local_attention(self, window_size: int) -> AttentionBias:
        return LowerTriangularFromBottomRightLocalAttentionMask(window_size)


@dataclass
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    """The same, at most ``window_size`` keys each."""

    _window_size: int

    def __post_init__(self) -> None:
        _positive(type(self).__name__, "window_size", self._window_size)


@dataclass
class LocalAttentionFromBottomRightMask(AttentionBias):
    """Keys from ``window_left`` before to ``window_right`` behind the diagonal."""

    window_left: int
    window_right: int

    def __post_init__(self) -> None:
        for name in ("window_left", "window_right"):
            if getattr(self, name) < 0:
                value = getattr(self, name)
                raise ValueError(f"{type(self).__name__}: {name} must be at least 0, got {value}")


def _positive(name: str, argument: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}: {argument} must be at least 1, got {value}")


# ---- sequences one after another ----


@dataclass
class _SeqLenInfo:
    """Lengths of sequences that follow each other. seqstart: int32 [S + 1]."""

    seqstart: torch.Tensor
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list[int]

    @classmethod
    def from_seqlens(cls, seqlens: Iterable[int], *, device: Any = None) -> _SeqLenInfo:
        lengths = _lengths(seqlens)
        starts = [0, *itertools.accumulate(lengths)]
        tensor = torch.tensor(starts, dtype=torch.int32, device=device)
        return cls(tensor, max(lengths, default=0), min(lengths, default=0), starts)

    def intervals(self) -> Iterable[tuple[int, int]]:
        return itertools.pairwise(self.seqstart_py)

    def to(self, device: Any) -> None:
        self.seqstart = self.seqstart.to(device)

    def split(
        self, x: torch.Tensor, batch_sizes: Sequence[int] | None = None
    ) -> list[torch.Tensor]:
        """[1, T, ...] -> one tensor per sequence, or per batch of equally long ones."""
        if x.shape[:1] != (1,) or x.shape[1] != self.seqstart_py[-1]:
            wanted = (1, self.seqstart_py[-1])
            raise ValueError(f"split: x must have shape {wanted} + (...), got {tuple(x.shape)}")
        sizes = batch_sizes or [1] * (len(self.seqstart_py) - 1)
        ends = [0, *itertools.accumulate(sizes)]
        found = []
        for size, (a, b) in zip(sizes, itertools.pairwise(ends), strict=True):
            part = x[0, self.seqstart_py[a] : self.seqstart_py[b]]
            found.append(part.unflatten(0, (size, -1)))
        return found


@dataclass
class _PaddedSeqLenInfo(_SeqLenInfo):
    """Sequences in slots of ``padding`` keys, of which the first ``seqlen`` count."""

    seqlen: torch.Tensor
    seqlen_py: Sequence[int]
    padding: int

    @classmethod
    def from_seqlens_padded(
        cls, seqlens: Sequence[int], padding: int, *, device: Any = None
    ) -> _PaddedSeqLenInfo:
        lengths = _lengths(seqlens)
        if max(lengths, default=0) > padding:
            raise ValueError(
                f"BlockDiagonalPaddedKeysMask: kv_padding must hold the longest sequence"
                f" {max(lengths)}, got {padding}"
            )
        starts = [i * padding for i in range(len(lengths) + 1)]
        return cls(
            torch.tensor(starts, dtype=torch.int32, device=device), max(lengths, default=0),
            min(lengths, default=0), starts,
            torch.tensor(lengths, dtype=torch.int32, device=device), lengths, padding,
        )  # fmt: skip

    def to(self, device: Any) -> None:
        super().to(device)
        self.seqlen = self.seqlen.to(device)


@dataclass
class _GappySeqInfo(_SeqLenInfo):
    """Sequences that begin at given keys, of which the first ``seqlen`` count."""

    seqlen: torch.Tensor
    seqlen_py: Sequence[int]

    @classmethod
    def from_seqlens_gappy(
        cls, starts: Sequence[int], seqlens: Sequence[int], *, device: Any = None
    ) -> _GappySeqInfo:
        lengths = _lengths(seqlens)
        if len(starts) != len(lengths) + 1:
            raise ValueError(
                f"BlockDiagonalGappyKeysMask: kv_seqstarts must have {len(lengths) + 1} entries,"
                f" got {len(starts)}"
            )
        return cls(
            torch.tensor(list(starts), dtype=torch.int32, device=device), max(lengths, default=0),
            min(lengths, default=0), list(starts),
            torch.tensor(lengths, dtype=torch.int32, device=device), lengths,
        )  # fmt: skip


def _lengths(seqlens: Iterable[int]) -> list[int]:
    found = [int(n) for n in seqlens]
    if min(found, default=0) < 0:
        raise ValueError(f"attn_bias: sequence lengths must be at least 0, got {found}")
    return found


@dataclass
class BlockDiagonalMask(AttentionBias):
    """Tokens of one sequence attend each other; [1, T, H, D] holds the sequences one after
    another."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _SeqLenInfo
    _batch_sizes: Sequence[int] | None = None

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqlen: Sequence[int] | None = None,
        *,
        device: Any = None,
    ) -> BlockDiagonalMask:
        """Lengths of the sequences; those of the keys are the queries' without kv_seqlen."""
        if kv_seqlen is not None and len(kv_seqlen) != len(q_seqlen):
            raise ValueError(
                f"{cls.__name__}: kv_seqlen must have {len(q_seqlen)} entries, got {len(kv_seqlen)}"
            )
        q = _SeqLenInfo.from_seqlens(q_seqlen, device=device)
        if kv_seqlen is None or list(kv_seqlen) == list(q_seqlen):
            return cls(q_seqinfo=q, k_seqinfo=q)
        return cls(q_seqinfo=q, k_seqinfo=_SeqLenInfo.from_seqlens(kv_seqlen, device=device))

    @classmethod
    def from_tensor_list(
        cls, tensors: Sequence[torch.Tensor]
    ) -> tuple[BlockDiagonalMask, torch.Tensor]:
        """[B_i, N_i, ...] -> the mask and all tokens as [1, T, ...]."""
        sizes = [t.shape[0] for t in tensors]
        lengths = [t.shape[1] for t in tensors for _ in range(t.shape[0])]
        mask = cls.from_seqlens(lengths, device=tensors[0].device if tensors else None)
        mask._batch_sizes = sizes
        joined = torch.cat([t.reshape(1, -1, *t.shape[2:]) for t in tensors], 1)
        return mask, joined

    @classmethod
    def from_tensor_lists_qkv(
        cls,
        tensors_q: Sequence[torch.Tensor],
        tensors_k: Sequence[torch.Tensor],
        tensors_v: Sequence[torch.Tensor] | None = None,
    ) -> tuple[BlockDiagonalMask, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The same for queries, keys and values of different lengths."""
        joined = [
            None if ts is None else torch.cat([t.reshape(1, -1, *t.shape[2:]) for t in ts], 1)
            for ts in (tensors_q, tensors_k, tensors_v)
        ]
        q_lengths, k_lengths = (
            [t.shape[1] for t in ts for _ in range(t.shape[0])] for ts in (tensors_q, tensors_k)
        )
        mask = cls.from_seqlens(q_lengths, k_lengths, device=tensors_q[0].device)
        mask._batch_sizes = [t.shape[0] for t in tensors_q]
        q, k, v = joined
        assert q is not None and k is not None
        return mask, q, k, v

    def split_queries(self, x: torch.Tensor) -> list[torch.Tensor]:
        return self.q_seqinfo.split(x, self._batch_sizes)

    def split_kv(self, x: torch.Tensor) -> list[torch.Tensor]:
        return self.k_seqinfo.split(x, self._batch_sizes)

    def split(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Undoes ``from_tensor_list``."""
        if self.q_seqinfo is not self.k_seqinfo:
            raise ValueError("split: queries and keys differ: use split_queries or split_kv")
        return self.q_seqinfo.split(x, self._batch_sizes)

    def to(self, device: Any) -> BlockDiagonalMask:
        self.q_seqinfo.to(device)
        self.k_seqinfo.to(device)
        return self

    def _as(self, cls: type, *extra: int) -> Any:
        return cls(self.q_seqinfo, self.k_seqinfo, self._batch_sizes, *extra)

    def make_causal(self) -> BlockDiagonalCausalMask:
        return self._as(BlockDiagonalCausalMask)

    def make_causal_from_bottomright(self) -> BlockDiagonalCausalFromBottomRightMask:
        return self._as(BlockDiagonalCausalFromBottomRightMask)

    def make_local_attention(self, window_size: int) -> BlockDiagonalMask:
        return self._as(BlockDiagonalCausalLocalAttentionMask, window_size)

    def make_local_attention_from_bottomright(self, window_size: int) -> BlockDiagonalMask:
        return self._as(BlockDiagonalCausalLocalAttentionFromBottomRightMask, window_size)


@dataclass
class BlockDiagonalCausalMask(BlockDiagonalMask):
    """Query i of a sequence attends its keys j <= i."""


@dataclass
class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """The last query of a sequence attends all its keys."""


@dataclass
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    """Causal, at most ``_window_size`` keys."""

    _window_size: int = 0

    def __post_init__(self) -> None:
        _positive(type(self).__name__, "window_size", self._window_size)


@dataclass
class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    """Causal from the bottom right, at most ``_window_size`` keys."""

    _window_size: int = 0

    def __post_init__(self) -> None:
        _positive(type(self).__name__, "window_size", self._window_size)


@dataclass
class BlockDiagonalPaddedKeysMask(AttentionBias):
    """Keys of each sequence in a slot of ``kv_padding``, of which the first ``kv_seqlen`` count."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _PaddedSeqLenInfo

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        causal_diagonal: Any = None,
        *,
        device: Any = None,
    ) -> BlockDiagonalPaddedKeysMask:
        """``causal_diagonal`` is ignored, as in xformers."""
        return cls(
            _SeqLenInfo.from_seqlens(q_seqlen, device=device),
            _PaddedSeqLenInfo.from_seqlens_padded(kv_seqlen, kv_padding, device=device),
        )


@dataclass
class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """The last query of a sequence attends all its keys."""


@dataclass
class BlockDiagonalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """Keys from ``window_left`` before to ``window_right`` behind the diagonal that ends in the
    last query and the last key."""

    window_left: int = 0
    window_right: int = 0

    @classmethod
    def from_seqlens_local(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        window_left: int,
        window_right: int,
        *,
        device: Any = None,
    ) -> BlockDiagonalLocalAttentionPaddedKeysMask:
        whole = BlockDiagonalPaddedKeysMask.from_seqlens(
            q_seqlen, kv_padding, kv_seqlen, device=device
        )
        return cls(whole.q_seqinfo, whole.k_seqinfo, window_left, window_right)


@dataclass
class BlockDiagonalCausalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """Causal from the bottom right, at most ``_window_size`` keys."""

    _window_size: int = 0

    @classmethod
    def from_seqlens_local(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        window_size: int,
        *,
        device: Any = None,
    ) -> BlockDiagonalCausalLocalAttentionPaddedKeysMask:
        _positive(cls.__name__, "window_size", window_size)
        whole = BlockDiagonalPaddedKeysMask.from_seqlens(
            q_seqlen, kv_padding, kv_seqlen, device=device
        )
        return cls(whole.q_seqinfo, whole.k_seqinfo, window_size)


@dataclass
class BlockDiagonalGappyKeysMask(AttentionBias):
    """Keys of each sequence begin at ``kv_seqstarts`` and are ``kv_seqlen`` many."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _GappySeqInfo

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqstarts: Sequence[int],
        kv_seqlen: Sequence[int],
        *,
        device: Any = None,
    ) -> BlockDiagonalGappyKeysMask:
        return cls(
            _SeqLenInfo.from_seqlens(q_seqlen, device=device),
            _GappySeqInfo.from_seqlens_gappy(kv_seqstarts, kv_seqlen, device=device),
        )


@dataclass
class BlockDiagonalCausalWithOffsetGappyKeysMask(BlockDiagonalGappyKeysMask):
    """The last query of a sequence attends all its keys."""
