"""Products with weights: linear layers on a kernel of vitkit's own where that is the faster one,
half precision in float32 on a CPU that has no instructions for it.

``vitkit::linear_fwd`` computes activation(x W^T + b) in one pass, in float32 from operands of any
of the three dtypes, rounded once. It packs less than a megabyte of the weight at a time and keeps
it in cache while all rows go by; bias and activation are applied before a sum goes to memory. It
runs where it was measured to be faster than torch's product: on x86 CPUs whose widest vectors are
AVX2's, without gradients, from :data:`FEW_ROWS` rows on.

Without AVX-512 torch multiplies bfloat16 and float16 element by element, ten times slower than
float32 and more; convolutions (:mod:`vitkit.nn.convolution`) a hundred times. Where no kernel takes
over, these modules convert
their operands, let torch multiply in float32 and round once, which is also the smaller error. It
costs the memory of the operands in float32 while a call lasts.
"""

from __future__ import annotations

import math
import platform
from functools import cache

import torch
import torch.nn.functional as F

from vitkit import _library, backends
from vitkit._checks import NATIVE_FLOATING

# Rows below which packing or converting the weight takes longer than it saves.
FEW_ROWS = 4


# ---- operator ----


def _fwd_fake(x, weight, bias, gelu, tanh):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fwd_flops(x_shape, weight_shape, *args, **kwargs) -> int:
    """The product alone."""
    return 2 * math.prod(x_shape) * weight_shape[0]


_library.define(
    "linear_fwd",
    "(Tensor x, Tensor weight, Tensor? bias, bool gelu, bool tanh) -> Tensor",
    fake=_fwd_fake,
    triton=None,
    flops=_fwd_flops,
)


@_library._constant_when_traced
def has_kernel(dtype: torch.dtype, device_type: str) -> bool:
    """Whether vitkit's kernel is the quickest product of ``dtype`` there."""
    return device_type == "cpu" and dtype in NATIVE_FLOATING and _is_quick_on_this_cpu()


@cache
def _is_quick_on_this_cpu() -> bool:
    return _library.native_kernel_error("linear", "cpu") is None and _library.cpu_isa() == "avx2"


def _is_elsewhere(module: torch.nn.Module) -> bool:
    """Whether its backend is not the CPU's."""
    return bool({getattr(module, "vitkit_backend", "auto"), backends.DEFAULT} - {"auto", "cpu"})


def takes_kernel(
    module: torch.nn.Module, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> bool:
    """Whether a kernel for products can, and should, compute this one: by dtype, device, backend
    and all else but its sizes and gradients."""
    if not has_kernel(x.dtype, x.device.type) or _is_elsewhere(module):
        return False
    given = (x, weight) if bias is None else (x, weight, bias)
    if not torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():
            return False
        # What a subclass or another layout means by a product is its own affair.
        if any(
            type(t) not in (torch.Tensor, torch.nn.Parameter) or t.layout is not torch.strided
            for t in given
        ):
            return False
    return (
        all(t.dtype == x.dtype and t.device == x.device for t in given)
        and not _library.in_forward_mode()
        and not torch.is_autocast_enabled("cpu")
    )


def _suits(
    module: torch.nn.Module, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> bool:
    return (
        x.numel() >= FEW_ROWS * x.shape[-1] > 0
        and not _library.differentiated(x, weight, bias)
        and takes_kernel(module, x, weight, bias)
    )


# ---- half precision by torch's float32 ----


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


def widens(module: torch.nn.Module, x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether torch should multiply these in float32."""
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
    if _suits(module, x, weight, bias):
        return _call(x, weight, bias)
    if x.numel() < FEW_ROWS * x.shape[-1] or not widens(module, x, weight):
        return F.linear(x, weight, bias)
    wide = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return wide.to(x.dtype)


def _call(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gelu: bool = False,
    tanh: bool = False,
) -> torch.Tensor:
    _library.register_flops()
    return torch.ops.vitkit.linear_fwd(x.contiguous(), weight.contiguous(), bias, gelu, tanh)


def linear_gelu(
    layer: torch.nn.Module, act: torch.nn.Module, x: torch.Tensor, approximate: str = "none"
) -> torch.Tensor:
    """``act(layer(x))`` of a linear layer and a GELU, in one pass where the kernel computes it and
    nobody watches the two."""
    y = None if watched(act) or _is_elsewhere(act) else try_linear_gelu(layer, x, approximate)
    return act(layer(x)) if y is None else y


def try_linear_gelu(
    layer: torch.nn.Module, x: torch.Tensor, approximate: str = "none"
) -> torch.Tensor | None:
    """``F.gelu(layer(x))`` in one pass, None where the kernel does not compute it."""
    if type(layer) is not Linear or watched(layer):
        return None
    if not _suits(layer, x, layer.weight, layer.bias):
        return None
    return _call(x, layer.weight, layer.bias, True, approximate == "tanh")


def watched(*modules: torch.nn.Module | None) -> bool:
    """Whether somebody has hooks on a module or replaced its forward. Its parent must then call it,
    and not compute it along with something else."""
    return any(
        bool(
            m._forward_hooks
            or m._forward_pre_hooks
            or m._backward_hooks
            or m._backward_pre_hooks
            or "forward" in m.__dict__
        )
        for m in modules
        if m is not None
    )


class Linear(torch.nn.Linear):
    """``torch.nn.Linear``, y = x W^T + b over the last dimension of x [*, K], W [E, K], on vitkit's
    kernel where that is the faster one (see the module); in bfloat16 and float16 where torch has no
    instructions for them in float32, rounded once.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(self, input, self.weight, self.bias)
