"""Activations of MLPs, plain and gated, and the modules around them in their hosts' parameter
layouts."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vitkit.nn.functional import _backend, _on_torch
from vitkit.nn.products import Linear, linear_gelu, try_linear_gelu
from vitkit.ops import geglu as _geglu
from vitkit.ops import gelu as _gelu
from vitkit.ops import swiglu as _swiglu


def gelu(module: torch.nn.Module, x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """``vitkit.gelu`` on the backend of ``module``."""
    if _on_torch(_gelu.NAME, module, x):
        return F.gelu(x, approximate=approximate)
    return _gelu.gelu(x, approximate=approximate, backend=_backend(module))


def project_gelu(module: torch.nn.Module, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``F.gelu(layer(x))`` of a linear layer, on the backend of ``module``: in one pass where there
    is a kernel for both."""
    y = try_linear_gelu(layer, x)
    return gelu(module, layer(x)) if y is None else y


def swiglu(
    module: torch.nn.Module,
    x: torch.Tensor,
    gate: torch.Tensor | None = None,
    *,
    gate_last: bool = False,
) -> torch.Tensor:
    """``vitkit.swiglu`` on the backend of ``module``."""
    if _on_torch(_swiglu.NAME, module, x):
        value, gate = _halves(x, gate, gate_last)
        return value * F.silu(gate)
    return _swiglu.swiglu(x, gate, gate_last=gate_last, backend=_backend(module))


def geglu(
    module: torch.nn.Module,
    x: torch.Tensor,
    gate: torch.Tensor | None = None,
    *,
    gate_last: bool = True,
    approximate: str = "none",
) -> torch.Tensor:
    """``vitkit.geglu`` on the backend of ``module``."""
    if _on_torch(_geglu.NAME, module, x):
        value, gate = _halves(x, gate, gate_last)
        return value * F.gelu(gate, approximate=approximate)
    return _geglu.geglu(
        x, gate, gate_last=gate_last, approximate=approximate, backend=_backend(module)
    )


def _halves(
    x: torch.Tensor, gate: torch.Tensor | None, gate_last: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if gate is not None:
        return x, gate
    first, second = x.chunk(2, -1)
    return (first, second) if gate_last else (second, first)


class GELU(torch.nn.GELU):
    """``torch.nn.GELU`` on vitkit's kernels.

    Example:
        >>> import torch, vitkit.nn
        >>> vitkit.nn.GELU(approximate="tanh")(torch.randn(2, 17, 64)).shape
        torch.Size([2, 17, 64])
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return gelu(self, input, self.approximate)


class SwiGLU(torch.nn.Module):
    """Gated MLP with two projections: the parameters of timm's SwiGLU.

    Args:
        dim: width of the tokens.
        hidden: width between the projections.
        bias: whether the three projections have a bias.
        norm_layer: ``norm_layer(hidden)`` before the last projection, none if None.

    Example:
        >>> import torch, vitkit.nn
        >>> vitkit.nn.SwiGLU(64, 172)(torch.randn(2, 17, 64)).shape
        torch.Size([2, 17, 64])
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        bias: bool = True,
        norm_layer: type[torch.nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.fc1_g = Linear(dim, hidden, bias=bias)
        self.fc1_x = Linear(dim, hidden, bias=bias)
        self.norm = norm_layer(hidden) if norm_layer is not None else torch.nn.Identity()
        self.fc2 = Linear(hidden, dim, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.norm(swiglu(self, self.fc1_x(x), self.fc1_g(x))))


class SwiGLUPacked(torch.nn.Module):
    """Gated MLP with one projection for gate and value: the parameters of timm's GluMlp and
    SwiGLUPacked.

    Args:
        dim: width of the tokens.
        hidden: width of the first projection, twice that of the second's input.
        bias: whether the projections have a bias.
        gate_last: the second half of the first projection is the gate.

    Example:
        >>> import torch, vitkit.nn
        >>> vitkit.nn.SwiGLUPacked(64, 344)(torch.randn(2, 17, 64)).shape
        torch.Size([2, 17, 64])
    """

    def __init__(
        self, dim: int, hidden: int, *, bias: bool = True, gate_last: bool = False
    ) -> None:
        super().__init__()
        if hidden % 2:
            raise ValueError(f"SwiGLUPacked: hidden must be even, got {hidden}")
        self.gate_last = gate_last
        self.fc1 = Linear(dim, hidden, bias=bias)
        self.fc2 = Linear(hidden // 2, dim, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(swiglu(self, self.fc1(x), gate_last=self.gate_last))


class GEGLU(torch.nn.Module):
    """Projection to value and gate, then value * gelu(gate): the parameters of diffusers' GEGLU.

    Args:
        dim_in: width of the tokens.
        dim_out: width of the result.
        bias: whether the projection has a bias.

    Example:
        >>> import torch, vitkit.nn
        >>> vitkit.nn.GEGLU(64, 256)(torch.randn(2, 17, 64)).shape
        torch.Size([2, 17, 256])
    """

    def __init__(self, dim_in: int, dim_out: int, bias: bool = True) -> None:
        super().__init__()
        self.proj = Linear(dim_in, 2 * dim_out, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return geglu(self, self.proj(x))


class Mlp(torch.nn.Module):
    """Two projections with a GELU between: the parameters of timm's Mlp.

    Args:
        dim: width of the tokens.
        hidden: width between the projections.
        approximate: of the GELU, ``"none"`` or ``"tanh"``.
        bias: whether the projections have a bias.

    Example:
        >>> import torch, vitkit.nn
        >>> vitkit.nn.Mlp(64, 256)(torch.randn(2, 17, 64)).shape
        torch.Size([2, 17, 64])
    """

    def __init__(
        self, dim: int, hidden: int, *, approximate: str = "none", bias: bool = True
    ) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden, bias=bias)
        self.act = GELU(approximate=approximate)
        self.fc2 = Linear(hidden, dim, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(linear_gelu(self.fc1, self.act, x, self.act.approximate))
