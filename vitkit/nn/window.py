"""Swin's window attention on the map: the parameters of timm's WindowAttention, without its
windows."""

from __future__ import annotations

import math
from typing import Any

import torch

from vitkit.nn.attention import _head_dim
from vitkit.nn.products import Linear, linear
from vitkit.ops import window_attention as _op

Pair = tuple[int, int]


def _pair(size: int | Pair) -> Pair:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def attend_windows(
    module: torch.nn.Module,
    qkv: torch.Tensor,  # [B, H, W, 3 * heads * D]
    num_heads: int,
    window_size: Pair,
    shift_size: Pair,
    **options: Any,
) -> torch.Tensor:
    """``vitkit.window_attention`` on the backend of ``module``: [B, H, W, heads * D]."""
    return _op.window_attention(
        qkv.unflatten(-1, (3, num_heads, -1)),
        window_size=window_size,
        shift_size=shift_size,
        backend=getattr(module, "vitkit_backend", "auto"),
        **options,
    )


def is_ragged(x: torch.Tensor, window_size: Pair) -> bool:
    """Whether the windows do not divide the map [B, H, W, C]."""
    return bool(x.shape[1] % window_size[0] or x.shape[2] % window_size[1])


class WindowAttention(torch.nn.Module):
    """Multi-head self-attention within shifted windows: the parameters of timm's WindowAttention of
    Swin V1, which a state_dict of torchvision's ShiftedWindowAttention has too.

    It takes the map [B, H, W, C] and not its windows. Where the window does not divide the map, the
    missing tokens are zeros before the projection, as in the hosts.

    Args:
        dim: width of the tokens.
        num_heads: divides dim.
        window_size, shift_size: in tokens, for both axes or (height, width).
        qkv_bias: whether the ``qkv`` projection has a bias.
        padding: see ``vitkit.window_attention``.
        proj_drop: dropout probability of the output.

    Example:
        >>> import torch, vitkit.nn
        >>> m = vitkit.nn.WindowAttention(96, num_heads=3, window_size=7, shift_size=3)
        >>> m(torch.randn(2, 14, 14, 96)).shape
        torch.Size([2, 14, 14, 96])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Pair = 7,
        shift_size: int | Pair = 0,
        *,
        qkv_bias: bool = True,
        padding: str = "pad_then_roll",
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        _head_dim("WindowAttention", dim, num_heads)
        self.window_size, self.shift_size = _pair(window_size), _pair(shift_size)
        self.padding = padding
        rows = math.prod(2 * w - 1 for w in self.window_size)
        self.relative_position_bias_table = torch.nn.Parameter(torch.empty(rows, num_heads))
        torch.nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        self.proj_drop = torch.nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return window_self_attention(self, self, x, self.window_size, self.shift_size, self.padding)


def window_self_attention(
    module: torch.nn.Module,
    m: Any,  # anything with the attributes of WindowAttention
    x: torch.Tensor,  # [B, H, W, C]
    window_size: Pair,
    shift_size: Pair,
    padding: str,
) -> torch.Tensor:
    """The forward of :class:`WindowAttention` on the backend of ``module``."""
    # What a host's padding of x becomes: the projection of zeros, whatever the projection is.
    pad = m.qkv(x.new_zeros(1, x.shape[-1])) if is_ragged(x, window_size) else None
    out = attend_windows(
        module,
        m.qkv(x),
        m.num_heads,
        window_size,
        shift_size,
        bias_table=m.relative_position_bias_table,
        pad_value=None if pad is None else pad.view(3, m.num_heads, -1),
        padding=padding,
    )
    return m.proj_drop(m.proj(out))


class WindowAttentionV2(torch.nn.Module):
    """Cosine attention within shifted windows, its position bias computed by an MLP: the parameters
    of timm's WindowAttention of Swin V2.

    Args:
        dim, num_heads, window_size, shift_size, qkv_bias, padding, proj_drop: as
            :class:`WindowAttention`; with ``qkv_bias`` queries and values have a bias, keys none.
        pretrained_window_size: the window whose positions the MLP was trained on, 0 for this one.

    Example:
        >>> import torch, vitkit.nn
        >>> m = vitkit.nn.WindowAttentionV2(96, num_heads=3, window_size=8, shift_size=4)
        >>> m(torch.randn(2, 16, 16, 96)).shape
        torch.Size([2, 16, 16, 96])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Pair = 8,
        shift_size: int | Pair = 0,
        *,
        qkv_bias: bool = True,
        padding: str = "pad_then_roll",
        proj_drop: float = 0.0,
        pretrained_window_size: int | Pair = 0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        _head_dim("WindowAttentionV2", dim, num_heads)
        self.window_size, self.shift_size = _pair(window_size), _pair(shift_size)
        self.padding = padding
        self.logit_scale = torch.nn.Parameter(torch.full((num_heads, 1, 1), math.log(10)))
        self.cpb_mlp = torch.nn.Sequential(
            Linear(2, 512),
            torch.nn.ReLU(inplace=True),
            Linear(512, num_heads, bias=False),
        )
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.q_bias = torch.nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = torch.nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.proj = Linear(dim, dim)
        self.proj_drop = torch.nn.Dropout(proj_drop)
        trained = _pair(pretrained_window_size)
        coords = relative_coords(self.window_size, trained if trained[0] > 0 else self.window_size)
        self.register_buffer("relative_coords_table", coords[None], persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.q_bias is None or self.v_bias is None:
            bias = None
        else:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        return cosine_window_self_attention(
            self, self, x, bias, self.window_size, self.shift_size, self.padding
        )


def relative_coords(window_size: Pair, trained: Pair) -> torch.Tensor:
    """[2 wh - 1, 2 ww - 1, 2]: sign(u) log2(1 + |u|) / 3 of u = 8 * offset / (trained - 1), what
    Swin V2's MLP takes."""
    axes = (
        torch.arange(1.0 - w, float(w)) / max(t - 1, 1)
        for w, t in zip(window_size, trained, strict=True)
    )
    coords = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1) * 8
    return coords.sign() * torch.log2(coords.abs() + 1) / 3


def swin_v2_table(m: Any) -> torch.Tensor:
    """[(2 wh - 1) (2 ww - 1), heads]: the bias of every relative position, from ``m.cpb_mlp``."""
    return 16 * torch.sigmoid(m.cpb_mlp(m.relative_coords_table).view(-1, m.num_heads))


def cosine_window_self_attention(
    module: torch.nn.Module,
    m: Any,  # anything with the attributes of WindowAttentionV2 but for the biases
    x: torch.Tensor,  # [B, H, W, C]
    bias: torch.Tensor | None,  # of the qkv projection
    window_size: Pair,
    shift_size: Pair,
    padding: str,
) -> torch.Tensor:
    """The forward of :class:`WindowAttentionV2` on the backend of ``module``."""
    out = attend_windows(
        module,
        linear(m, x, m.qkv.weight, bias),
        m.num_heads,
        window_size,
        shift_size,
        bias_table=swin_v2_table(m),
        logit_scale=m.logit_scale.flatten(),
        pad_value=None if bias is None else bias.view(3, m.num_heads, -1),
        padding=padding,
    )
    return m.proj_drop(m.proj(out))
