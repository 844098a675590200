"""What the rules for patch embeddings share: whether a host's convolution is one that
``vitkit.patch_embed`` stands for, at patch time and on every call."""

from __future__ import annotations

from typing import Any

import torch

from vitkit.patch.rules import Replacement, swap_class, watched


def why_not_projection(proj: Any) -> str | None:
    """The reason that a module is not a convolution of patches, None if it is."""
    exact = {torch.nn.Conv2d, torch.nn.Conv3d}
    if type(proj) not in exact:
        return f"its projection is a {type(proj).__name__}: it may compute something else"
    if proj.stride != proj.kernel_size:
        return f"its patches overlap: kernel {proj.kernel_size}, stride {proj.stride}"
    plain = proj.groups == 1 and set(proj.dilation) == {1}
    padded = isinstance(proj.padding, str) or any(proj.padding)
    if not plain or padded:
        return "its projection is grouped, dilated or padded"
    return None


def must_call_host(images: Any, proj: Any, pad: bool, *called: torch.nn.Module | None) -> bool:
    """Whether this call is the host's own affair: hooks on what would not be called, another
    projection than at patch time, images it refuses or whose rest it drops."""
    if watched(proj, *called) or why_not_projection(proj) is not None:
        return True
    if images.dim() != proj.weight.dim() or images.shape[1] != proj.in_channels:
        return True
    sizes = zip(images.shape[2:], proj.kernel_size, strict=True)
    wrong = images.dtype != proj.weight.dtype and not torch.is_autocast_enabled(images.device.type)
    return wrong or any(s < 1 if pad else s < p or s % p != 0 for s, p in sizes)


def onto(twin: type, proj: str, norm: str | None = None):
    """The plan of a rule: swap the class if the module's projection is one of patches."""

    def plan(module: Any) -> Replacement | str:
        projection = getattr(module, proj)
        reason = why_not_projection(projection)
        if reason:
            return reason
        after = None if norm is None else getattr(module, norm)
        covers = (projection,) if after is None else (projection, after)
        return Replacement("patch_embed", (swap_class(module, twin),), covers)

    return plan
