"""The end of a residual branch: ``x + gate * y`` in one pass."""

from __future__ import annotations

import torch

from vitkit.nn.functional import _backend, _on_torch
from vitkit.ops import gated_residual as _op


def gated_residual(
    module: torch.nn.Module,
    x: torch.Tensor,  # [B, N, E]
    y: torch.Tensor,
    gate: torch.Tensor,  # [B, E], [B, N, E] or [E]
) -> torch.Tensor:
    """``vitkit.gated_residual`` on the backend of ``module``."""
    if _on_torch(_op.NAME, module, x):
        return x + (gate[:, None] if gate.dim() == 2 else gate) * y
    return _op.gated_residual(x, y, gate, backend=_backend(module))


class LayerScale(torch.nn.Module):
    """``x + gamma * y``: the parameters of timm's LayerScale, and the addition after it.

    Args:
        dim: width of the tokens.
        init: value that gamma starts with.

    Example:
        >>> import torch, vitkit.nn
        >>> x, y = torch.randn(2, 2, 17, 64)
        >>> vitkit.nn.LayerScale(64)(x, y).shape
        torch.Size([2, 17, 64])
    """

    def __init__(self, dim: int, init: float = 1e-5) -> None:
        super().__init__()
        self.gamma = torch.nn.Parameter(torch.full((dim,), init))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return gated_residual(self, x, y, self.gamma)
