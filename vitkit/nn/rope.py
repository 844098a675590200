"""Rotary positions of the patches of an image."""

from __future__ import annotations

import math

import torch

from vitkit.nn.functional import _backend, _on_torch
from vitkit.ops import rope_2d as _rope


def rotate(
    module: torch.nn.Module,
    q: torch.Tensor,  # [B, N, H, D]
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``vitkit.rope_2d`` on the backend of ``module``."""
    backend = "reference" if _on_torch(_rope.NAME, module, q) else _backend(module)
    turned = _rope.rope_2d(q, k, cos, sin, layout=layout, backend=backend)
    assert isinstance(turned, tuple)
    return turned


class RotaryEmbedding2d(torch.nn.Module):
    """Axial rotary positions as DINOv3 has them: a quarter of the frequencies' D for rows, a
    quarter for columns, coordinates of patch centres in [-1, 1]. Has no parameters.

    Args:
        head_dim: a multiple of 4.
        theta: base of the frequencies.
        layout: which elements are a pair, see ``vitkit.rope_2d``.

    Example:
        >>> import torch, vitkit.nn
        >>> q, k = torch.randn(2, 1, 1 + 6, 4, 32)  # a class token and 2 x 3 patches
        >>> q, k = vitkit.nn.RotaryEmbedding2d(32)(q, k, 2, 3)
        >>> q.shape
        torch.Size([1, 7, 4, 32])
    """

    inv_freq: torch.Tensor

    def __init__(self, head_dim: int, theta: float = 100.0, layout: str = "half") -> None:
        super().__init__()
        if head_dim < 4 or head_dim % 4:
            raise ValueError(f"RotaryEmbedding2d: head_dim must be a multiple of 4, got {head_dim}")
        self.layout = layout
        exponents = torch.arange(0, 1, 4 / head_dim, dtype=torch.float32)
        self.register_buffer("inv_freq", 1 / theta**exponents, persistent=False)

    def tables(self, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) of the patches of a grid, row by row: [height * width, head_dim / 2]."""
        y, x = (
            (torch.arange(n, device=self.inv_freq.device, dtype=torch.float32) + 0.5) / n * 2 - 1
            for n in (height, width)
        )
        places = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1)
        angles = (2 * math.pi * places[:, :, None] * self.inv_freq.float()).flatten(1)
        return angles.cos(), angles.sin()

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, height: int, width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k [B, N, H, D] turned, whose last height * width tokens are the patches."""
        return rotate(self, q, k, *self.tables(height, width), self.layout)
