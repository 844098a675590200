"""Convolutions: those of 3 x 3 on a kernel of vitkit's own where that is the faster one, half
precision in float32 on a CPU that has no instructions for it.

``vitkit::conv3x3_fwd`` computes conv2d(x, W, b) with stride 1 and padding 1 by Winograd's minimal
filtering F(2 x 2, 3 x 3) (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks",
2015), in float32 from operands of any of the three dtypes, rounded once: 4 multiplications for an
element of the result where the sum as it is written takes 9. Its transforms add, subtract and
halve; the error measured is below that of torch's convolution. NCHW and channels_last images are
read and written as they lie, W as well.

Every tile of 2 x 2 results is computed from the 4 x 4 of x around it. So a NaN or infinity in x
makes NaN of all four, one pixel further than its window reaches; and rounding is relative to the
largest of the 4 x 4, where a sum as it is written has 3 x 3.

The gradient of x is such a convolution too, of the weights turned; those of W and b are torch's.

It runs where it was measured to be faster than torch's: on x86 CPUs whose widest vectors are
AVX2's, from :data:`LEAST_CHANNELS` channels to as many on, for images of at least 2 x 2.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from vitkit import _library
from vitkit.nn import products
from vitkit.ops.group_norm_silu import _channels_last

# Channels of x and of the result below which the transforms cost more than the products save.
LEAST_CHANNELS = 16


# ---- operator ----


def _fwd_fake(x, weight, bias):
    n, _, height, width = x.shape
    sizes = (n, weight.shape[0], height, width)
    if _channels_last(x):
        return x.new_empty((n, height, width, sizes[1])).movedim(-1, 1)
    return x.new_empty(sizes)


def _fwd_flops(x_shape, weight_shape, *args, **kwargs) -> int:
    """Of the sum as it is written, as torch counts convolutions; the kernel multiplies 4 / 9 as
    much."""
    return 18 * math.prod(x_shape) * weight_shape[0]


_library.define(
    "conv3x3_fwd",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    fake=_fwd_fake,
    triton=None,
    flops=_fwd_flops,
    any_strides=True,
)


def is_3x3(module: torch.nn.Conv2d) -> bool:
    """Whether the kernel computes such a convolution: 3 x 3, stride 1, padding 1 with zeros, of all
    channels, at least :data:`LEAST_CHANNELS` of them."""
    return (
        module.kernel_size == (3, 3)
        and module.stride == (1, 1)
        and module.padding in ((1, 1), "same")
        and module.dilation == (1, 1)
        and module.groups == 1
        and module.padding_mode == "zeros"
        and min(module.in_channels, module.out_channels) >= LEAST_CHANNELS
    )


def has_kernel(module: torch.nn.Module) -> bool:
    """Whether vitkit's kernel is the quickest for this convolution where it is."""
    return (
        isinstance(module, torch.nn.Conv2d)
        and is_3x3(module)
        and products.has_kernel(module.weight.dtype, module.weight.device.type)
    )


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias):
        return torch.ops.vitkit.conv3x3_fwd(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)
        ctx.columns = None if bias is None else [len(weight)]

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled():
            # A gradient of the bias, of which only the shape matters.
            bias = weight.new_zeros(ctx.columns, requires_grad=True) if needed[2] else None
            return tuple(
                _library.differentiable_backward(
                    lambda x, w, b: (F.conv2d(x, w, b, padding=1),), (x, weight, bias), (grad,),
                    needed,
                )
            )  # fmt: skip
        dx = dweight = dbias = None
        if needed[0]:
            turned = weight.flip(2, 3).transpose(0, 1)
            dx = torch.ops.vitkit.conv3x3_fwd(grad, turned, None)
        if needed[1] or needed[2]:
            slow = products.products_are_slow(x.dtype, x.device.type)
            tensors = [t.float() if slow else t for t in (grad, x, weight)]
            once = [1, 1]
            _, dweight, dbias = torch.ops.aten.convolution_backward(
                *tensors, ctx.columns, once, once, once, False, [0, 0], 1, [False, *needed[1:]]
            )
            dweight, dbias = (t if t is None else t.to(x.dtype) for t in (dweight, dbias))
        return dx, dweight, dbias


# ---- modules ----


class _Convolution(torch.nn.modules.conv._ConvNd):
    def _conv_forward(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        forward = super()._conv_forward  # type: ignore[misc]
        if not products.widens(self, input, weight):
            return forward(input, weight, bias)
        wide = forward(input.float(), weight.float(), None if bias is None else bias.float())
        return wide.to(input.dtype)


class Conv1d(_Convolution, torch.nn.Conv1d):
    """``torch.nn.Conv1d``; in bfloat16 and float16 where torch has no instructions for them in
    float32, rounded once."""


class Conv2d(_Convolution, torch.nn.Conv2d):
    """``torch.nn.Conv2d``; 3 x 3 on vitkit's kernel where that is the faster one (see the module),
    half precision as :class:`Conv1d`."""

    def _conv_forward(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if (
            is_3x3(self)
            and input.dim() == 4
            and input.shape[1] == weight.shape[1]
            and min(input.shape[2:]) >= 2
            and products.takes_kernel(self, input, weight, bias)
        ):
            _library.register_flops()
            if _library.differentiated(input, weight, bias):
                return _library.apply(_Conv3x3, input, weight, bias)
            return torch.ops.vitkit.conv3x3_fwd(input, weight, bias)
        return super()._conv_forward(input, weight, bias)


class Conv3d(_Convolution, torch.nn.Conv3d):
    """``torch.nn.Conv3d``, in half precision as :class:`Conv1d`."""
