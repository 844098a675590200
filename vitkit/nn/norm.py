"""Normalisation modules: ``torch.nn.GroupNorm`` and ``torch.nn.LayerNorm`` with their neighbours in
the same pass."""

from __future__ import annotations

import torch

from vitkit.nn.functional import group_norm_silu, layer_norm


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


class LayerNorm(torch.nn.LayerNorm):
    """``torch.nn.LayerNorm`` on vitkit's kernels, where it normalises over the last dimension.

    Example:
        >>> import torch, vitkit.nn
        >>> vitkit.nn.LayerNorm(16)(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if len(self.normalized_shape) != 1 or input.shape[-1:] != self.normalized_shape:
            return super().forward(input)  # over several dimensions, or an error that torch reports
        return layer_norm(self, input)


class AdaLayerNorm(torch.nn.LayerNorm):
    """LayerNorm and the modulation after it: ``LN(x) * (1 + scale) + shift``.

    ``forward(x, shift=None, scale=None)`` computes what ``vitkit.layer_norm_modulate`` does. Has no
    parameters unless ``elementwise_affine`` is asked for, as in DiT.

    Example:
        >>> import torch, vitkit.nn
        >>> norm = vitkit.nn.AdaLayerNorm(16)
        >>> shift, scale = torch.randn(2, 32).chunk(2, dim=1)
        >>> norm(torch.randn(2, 5, 16), shift, scale).shape
        torch.Size([2, 5, 16])
    """

    def __init__(self, dim: int, eps: float = 1e-6, elementwise_affine: bool = False) -> None:
        super().__init__(dim, eps=eps, elementwise_affine=elementwise_affine)

    def forward(
        self,
        input: torch.Tensor,
        shift: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return layer_norm(self, input, shift=shift, scale=scale)
