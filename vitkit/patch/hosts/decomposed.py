"""What the rules for ViTDet's attention of several hosts share: positions relative to the query,
one table per axis, that become a term of the scores only inside the kernel."""

from __future__ import annotations

import torch

from vitkit import nn


def decomposed_bias(
    q: torch.Tensor,  # [B, H * W, heads, D], not scaled
    rows: torch.Tensor,  # [H, H, D], the hosts' get_rel_pos of the height
    columns: torch.Tensor,  # [W, W, D]
) -> nn.DecomposedBias:
    """The bias of a map's tokens among themselves."""
    grid = q.unflatten(1, (rows.shape[0], columns.shape[0]))
    rel_h = torch.einsum("byxhc,ykc->bhyxk", grid, rows)
    rel_w = torch.einsum("byxhc,xkc->bhyxk", grid, columns)
    return nn.DecomposedBias(rel_h.flatten(2, 3), rel_w.flatten(2, 3))
