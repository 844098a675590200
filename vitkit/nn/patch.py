"""Patch embedding in timm's parameter layout: ``proj``, a convolution, and ``norm``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from vitkit.nn.convolution import Conv2d, Conv3d
from vitkit.nn.functional import patch_embed


class PatchEmbed(torch.nn.Module):
    """Tokens [B, N, embed_dim] of images or videos, with what stands around them in the same pass:
    the parameters of timm's PatchEmbed.

    Args:
        patch_size: of an axis, or (height, width), or (frames, height, width) for videos.
        in_chans: channels of an image.
        embed_dim: width of the tokens.
        bias: whether the projection has one.
        norm: LayerNorm over embed_dim after the projection.
        norm_eps: of that LayerNorm.
        mean, std: of the channels of uint8 images, for pixels divided by 255.
        pad: see ``vitkit.patch_embed``.

    Example:
        >>> import torch, vitkit.nn
        >>> embed = vitkit.nn.PatchEmbed(4, embed_dim=96, norm=True)
        >>> embed(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 64, 96])
    """

    def __init__(
        self,
        patch_size: int | Sequence[int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        *,
        bias: bool = True,
        norm: bool = False,
        norm_eps: float = 1e-6,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        pad: bool = False,
    ) -> None:
        super().__init__()
        sizes = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
        if len(sizes) not in (2, 3) or min(sizes) < 1 or math.prod(sizes) < 1:
            raise ValueError(
                f"PatchEmbed: patch_size must be 1 to 3 positive sizes, got {patch_size!r}"
            )
        convolution = Conv2d if len(sizes) == 2 else Conv3d
        self.proj = convolution(in_chans, embed_dim, sizes, sizes, bias=bias)  # type: ignore[arg-type]
        self.norm = torch.nn.LayerNorm(embed_dim, eps=norm_eps) if norm else torch.nn.Identity()
        self.mean, self.std, self.pad = mean, std, pad

    def forward(
        self,
        images: torch.Tensor,
        pos_embed: torch.Tensor | None = None,
        prefix_tokens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """images [B, C, (T,) H, W], pos_embed [N, E] or [P + N, E], prefix_tokens [P, E] ->
        [B, P + N, E]"""
        return patch_embed(
            self,
            images,
            self.proj,
            self.norm if isinstance(self.norm, torch.nn.LayerNorm) else None,
            mean=self.mean,
            std=self.std,
            pos_embed=pos_embed,
            prefix_tokens=prefix_tokens,
            pad=self.pad,
        )
