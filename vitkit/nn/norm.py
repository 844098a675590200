"""Group normalisation modules: ``torch.nn.GroupNorm`` with its neighbours in the same pass."""

from __future__ import annotations

import torch

from vitkit.nn.functional import group_norm_silu


class GroupNorm(torch.nn.GroupNorm):
    """``torch.nn.GroupNorm`` on vitkit's kernels.

    Example:
        >>> import torch, vitkit.nn
        >>> vitkit.nn.GroupNorm(4, 16)(torch.randn(2, 16, 8, 8)).shape
        torch.Size([2, 16, 8, 8])
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return group_norm_silu(self, input, activation=None)


class GroupNormSiLU(torch.nn.GroupNorm):
    """GroupNorm and the SiLU after it, with the optional addition before and modulation between.

    ``forward(x, add=None, scale=None, shift=None)`` computes what ``vitkit.group_norm_silu`` does.

    Example:
        >>> import torch, vitkit.nn
        >>> block = vitkit.nn.GroupNormSiLU(4, 16)
        >>> block(torch.randn(2, 16, 8, 8), add=torch.randn(2, 16)).shape
        torch.Size([2, 16, 8, 8])
    """

    def forward(
        self,
        input: torch.Tensor,
        add: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return group_norm_silu(self, input, add=add, scale=scale, shift=shift)
