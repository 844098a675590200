"""Group normalisation modules: ``torch.nn.GroupNorm`` with its neighbours in the same pass."""

from __future__ import annotations

import torch

from vitkit.ops.group_norm_silu import group_norm_silu as _op


def group_norm_silu(
    norm: torch.nn.GroupNorm,
    x: torch.Tensor,
    *,
    activation: str | None = "silu",
    add: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
) -> torch.Tensor:
    """``vitkit.group_norm_silu`` with the parameters of a ``torch.nn.GroupNorm``."""
    return _op(
        x,
        norm.num_groups,
        norm.weight,
        norm.bias,
        norm.eps,
        activation=activation,
        add=add,
        scale=scale,
        shift=shift,
        backend=getattr(norm, "vitkit_backend", "auto"),
    )


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
    """

    def forward(
        self,
        input: torch.Tensor,
        add: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return group_norm_silu(self, input, add=add, scale=scale, shift=shift)
