"""Products in half precision on a CPU that has no instructions for them: computed in float32.

Without AVX-512 torch multiplies bfloat16 and float16 element by element, ten times slower than
float32 and more; convolutions a hundred times. These modules convert their operands, let torch
multiply in float32 and round once, which is also the smaller error. It costs the memory of the
operands in float32 while a call lasts.
"""

from __future__ import annotations

import platform
from functools import cache

import torch
import torch.nn.functional as F

from vitkit import _library

# Rows below which converting the weight takes longer than multiplying with it as it is.
FEW_ROWS = 4


@_library._constant_when_traced
def products_are_slow(dtype: torch.dtype, device_type: str) -> bool:
    """Whether torch has no quick product of ``dtype`` on this machine's CPU."""
    return device_type == "cpu" and dtype in _slow_on_this_cpu()


@cache
def _slow_on_this_cpu() -> frozenset[torch.dtype]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return frozenset()
    quick = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return frozenset(dtype for dtype, supported in quick.items() if not supported)


def _widens(module: torch.nn.Module, x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        products_are_slow(x.dtype, x.device.type)
        and weight.dtype == x.dtype
        and getattr(module, "vitkit_backend", "auto") != "reference"
        and not torch.is_autocast_enabled("cpu")
    )


def linear(
    module: torch.nn.Module,
    x: torch.Tensor,  # [*, K]
    weight: torch.Tensor,  # [E, K]
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """``F.linear`` on the backend of ``module``."""
    if x.numel() < FEW_ROWS * x.shape[-1] or not _widens(module, x, weight):
        return F.linear(x, weight, bias)
    wide = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return wide.to(x.dtype)


class Linear(torch.nn.Linear):
    """``torch.nn.Linear``, y = x W^T + b over the last dimension of x [*, K], W [E, K]; in bfloat16
    and float16 where torch has no instructions for them (see the module) in float32, rounded once.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(self, input, self.weight, self.bias)


class _Convolution(torch.nn.modules.conv._ConvNd):
    def _conv_forward(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        forward = super()._conv_forward  # type: ignore[misc]
        if not _widens(self, input, weight):
            return forward(input, weight, bias)
        wide = forward(input.float(), weight.float(), None if bias is None else bias.float())
        return wide.to(input.dtype)


class Conv1d(_Convolution, torch.nn.Conv1d):
    """``torch.nn.Conv1d``, in half precision as :class:`Linear`."""


class Conv2d(_Convolution, torch.nn.Conv2d):
    """``torch.nn.Conv2d``, in half precision as :class:`Linear`."""


class Conv3d(_Convolution, torch.nn.Conv3d):
    """``torch.nn.Conv3d``, in half precision as :class:`Linear`."""
