"""Structured biases of ``flash_attention``: scores get a [B, H, Nq, Nk] term that exists only in
compact form.

The kernels compute the term, and reduce its gradient, from the compact tensors; ``dense`` is what
they stand for, and what the reference adds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vitkit._checks import (
    check_floating,
    check_same_device,
    check_same_dtype,
    check_shape,
)


@dataclass(frozen=True, eq=False)
class DecomposedBias:
    """``rel_h[b, h, i, j // Kw] + rel_w[b, h, i, j % Kw]``: relative positions on a grid of keys,
    one table per axis.

    Keys are the Kh x Kw cells of the grid, row by row. This is the decomposed relative position
    embedding of MViTv2 (Li et al. 2022), ViTDet and Segment Anything, after its tables have met
    the queries: ``rel_h[b, h, i]`` is ``q[b, i, h]`` times the rows of the height table that lie
    around query i.

    Args:
        rel_h: [B, H, Nq, Kh], floating. Views of any strides are read in place as long as the last
            dimension is dense (broadcast one with ``expand``). Has a gradient.
        rel_w: [B, H, Nq, Kw], dtype and device of rel_h; Kh * Kw is the number of keys.

    Raises:
        TypeError, ValueError: an argument breaks a rule above.

    Example:
        >>> import torch, vitkit
        >>> q, k, v = torch.randn(1, 12, 3, 2, 64).unbind(2)
        >>> bias = vitkit.DecomposedBias(torch.randn(1, 2, 12, 3), torch.randn(1, 2, 12, 4))
        >>> vitkit.flash_attention(q, k, v, bias=bias).shape
        torch.Size([1, 12, 2, 64])
    """

    rel_h: torch.Tensor
    rel_w: torch.Tensor

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_floating(name, "rel_h", self.rel_h)
        check_floating(name, "rel_w", self.rel_w)
        check_same_device(name, "rel_w", self.rel_w, self.rel_h, "rel_h")
        check_same_dtype(name, "rel_w", self.rel_w, self.rel_h, "rel_h")
        if self.rel_h.dim() != 4:
            raise ValueError(
                f"{name}: rel_h must have shape [B, H, Nq, Kh], got {tuple(self.rel_h.shape)}"
            )
        if self.rel_w.dim() != 4 or self.rel_w.shape[:3] != self.rel_h.shape[:3]:
            expected = (*self.rel_h.shape[:3], "Kw")
            raise ValueError(
                f"{name}: rel_w must have shape ({', '.join(map(str, expected))}) like rel_h,"
                f" got {tuple(self.rel_w.shape)}"
            )

    def check(self, op: str, q: torch.Tensor, keys: int) -> None:
        """Raises unless the bias belongs to queries q [B, Nq, H, D] and ``keys`` keys."""
        check_same_device(op, "bias.rel_h", self.rel_h, q, "q")
        batch, queries, heads, _ = q.shape
        height, width = self.rel_h.shape[3], self.rel_w.shape[3]
        shape = (batch, heads, queries, height)
        check_shape(op, "bias.rel_h", self.rel_h, shape, "[B, H, Nq, Kh]")
        if height * width != keys:
            raise ValueError(
                f"{op}: bias.rel_h and bias.rel_w must have Kh * Kw = {keys} keys,"
                f" got {height} * {width}"
            )

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.rel_h, self.rel_w

    def operands(self) -> tuple[torch.Tensor, ...]:
        """``tensors`` as the kernels read them."""
        return tuple(_dense_rows(_narrow(t)) for t in self.tensors())

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The term as a tensor [B, H, Nq, Kh * Kw], computed in ``dtype`` (that of rel_h if
        None)."""
        dtype = dtype or self.rel_h.dtype
        term = self.rel_h.to(dtype)[..., :, None] + self.rel_w.to(dtype)[..., None, :]
        return term.flatten(-2)


@dataclass(frozen=True, eq=False)
class DistanceBias:
    """``-slopes[h] * |coords_q[b, i] - coords_k[b, j]|``: ALiBi (Press et al. 2022) with the
    Euclidean distance of two points of the plane, as in the slide encoder TITAN (Ding et al. 2024).

    A token without a place, such as a class token, has NaN coordinates: its distance to every
    token is 0.

    Args:
        slopes: [H], floating. Has a gradient.
        coords_q: [B, Nq, 2], or [1, Nq, 2] for one set of coordinates, floating. Constants: no
            gradient. NaN or finite; the distance is computed in float32 (float64 where q is
            float64).
        coords_k: [B, Nk, 2] or [1, Nk, 2], dtype and device of coords_q.

    Raises:
        TypeError, ValueError: an argument breaks a rule above.

    Example:
        >>> import torch, vitkit
        >>> q, k, v = torch.randn(1, 100, 3, 2, 64).unbind(2)
        >>> coords = torch.cartesian_prod(torch.arange(10.), torch.arange(10.))[None]
        >>> bias = vitkit.DistanceBias(torch.tensor([0.5, 0.25]), coords, coords)
        >>> vitkit.flash_attention(q, k, v, bias=bias).shape
        torch.Size([1, 100, 2, 64])
    """

    slopes: torch.Tensor
    coords_q: torch.Tensor
    coords_k: torch.Tensor

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_floating(name, "slopes", self.slopes)
        if self.slopes.dim() != 1:
            raise ValueError(f"{name}: slopes must have shape [H], got {tuple(self.slopes.shape)}")
        for arg, coords in (("coords_q", self.coords_q), ("coords_k", self.coords_k)):
            check_floating(name, arg, coords)
            check_same_device(name, arg, coords, self.slopes, "slopes")
            if coords.dim() != 3 or coords.shape[-1] != 2:
                raise ValueError(
                    f"{name}: {arg} must have shape [B, N, 2] or [1, N, 2],"
                    f" got {tuple(coords.shape)}"
                )
        check_same_dtype(name, "coords_k", self.coords_k, self.coords_q, "coords_q")

    def check(self, op: str, q: torch.Tensor, keys: int) -> None:
        """Raises unless the bias belongs to queries q [B, Nq, H, D] and ``keys`` keys."""
        check_same_device(op, "bias.slopes", self.slopes, q, "q")
        batch, queries, heads, _ = q.shape
        check_shape(op, "bias.slopes", self.slopes, (heads,), "[H]")
        for arg, coords, tokens in (
            ("bias.coords_q", self.coords_q, queries),
            ("bias.coords_k", self.coords_k, keys),
        ):
            if coords.shape[0] != 1:
                check_shape(op, arg, coords, (batch, tokens, 2), "[B, N, 2]")
            else:
                check_shape(op, arg, coords, (1, tokens, 2), "[1, N, 2]")

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.slopes, self.coords_q, self.coords_k

    def operands(self) -> tuple[torch.Tensor, ...]:
        """``tensors`` as the kernels read them: few numbers, float32 whatever the type of q."""
        return self.slopes.float(), self.coords_q.detach().float(), self.coords_k.detach().float()

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The term as a tensor [B or 1, H, Nq, Nk], computed in ``dtype`` (that of coords_q if
        None)."""
        dtype = dtype or self.coords_q.dtype
        q, k = (coords.detach().to(dtype) for coords in (self.coords_q, self.coords_k))
        squared = (q[:, :, None] - k[:, None]).square().sum(-1)
        distance = torch.where(squared.isnan(), 0, squared).sqrt()
        return -self.slopes.to(dtype)[:, None, None] * distance[:, None]


ScoreBias = DecomposedBias | DistanceBias
SCORE_BIASES = (DecomposedBias, DistanceBias)


def _narrow(t: torch.Tensor) -> torch.Tensor:
    """Kernels compute in float32: what is wider is rounded here, as the reference does."""
    return t.float() if t.dtype == torch.float64 else t


def _dense_rows(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()
