"""swiglu, geglu and gelu for GPUs: y = value * activation(gate), or the activation alone.

Both are rows at a distance of their own, so that the halves of a packed tensor are read, and their
gradients written, where they lie. Bound by memory: a program is a tile wide enough for 16-byte
loads of every thread; nothing is staged, reduced or tuned.
"""

from __future__ import annotations

import torch

import triton
import triton.language as tl

from ._primitives import AotSpec, Device, Launch, cdiv, next_power_of_2, run, sigmoid

# Elements of a program's tile: 8 a thread of 4 warps, one 16-byte load of bfloat16. Rows shorter
# than a tile share one.
TILE = 1024
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
CUBIC = tl.constexpr(0.044715)
SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY_AT_0 = tl.constexpr(0.3989422804014327)
LOG2E_HALF = tl.constexpr(0.7213475204444817)


@triton.jit
def _weight(z, ACTIVATION: tl.constexpr):
    """activation(z) / z."""
    if ACTIVATION == "silu":
        w = sigmoid(z)
    elif ACTIVATION == "gelu":
        w = 0.5 + 0.5 * tl.erf(z * SQRT_HALF)
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        # 0.5 (1 + tanh(u)) = sigmoid(2 u)
        w = sigmoid(z * (2.0 * SQRT_2_OVER_PI) * (1.0 + z * z * CUBIC))
    return w


@triton.jit
def _slope(z, w, ACTIVATION: tl.constexpr):
    """d activation(z) / dz, w being activation(z) / z. 1 - w would lose digits of sigmoid(-z)."""
    if ACTIVATION == "silu":
        slope = w * (1.0 + z * sigmoid(-z))
    elif ACTIVATION == "gelu":
        slope = w + z * DENSITY_AT_0 * tl.exp2(z * z * -LOG2E_HALF)
    else:
        u = z * (2.0 * SQRT_2_OVER_PI) * (1.0 + z * z * CUBIC)
        inner = (1.0 + z * z * (3.0 * CUBIC)) * (2.0 * SQRT_2_OVER_PI)
        slope = w + z * w * sigmoid(-u) * inner
    return slope


@triton.jit
def _place(rows, columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """(rows, columns, mask) of this program's tile."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    return r[:, None], c[None, :], (r < rows)[:, None] & (c < columns)[None, :]


@triton.jit
def gated_activation_fwd_kernel(
    value_ptr, gate_ptr, y_ptr, rows, columns, value_stride, gate_stride, y_stride,
    ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    r, c, mask = _place(rows, columns, BLOCK_R, BLOCK_C)
    z = tl.load(gate_ptr + r * gate_stride + c, mask, 0.0).to(tl.float32)
    y = z * _weight(z, ACTIVATION)
    if value_ptr is not None:
        y *= tl.load(value_ptr + r * value_stride + c, mask, 0.0).to(tl.float32)
    tl.store(y_ptr + r * y_stride + c, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def gated_activation_bwd_kernel(
    grad_ptr, value_ptr, gate_ptr, dvalue_ptr, dgate_ptr, rows, columns,
    grad_stride, value_stride, gate_stride, dvalue_stride, dgate_stride,
    ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    r, c, mask = _place(rows, columns, BLOCK_R, BLOCK_C)
    z = tl.load(gate_ptr + r * gate_stride + c, mask, 0.0).to(tl.float32)
    grad = tl.load(grad_ptr + r * grad_stride + c, mask, 0.0).to(tl.float32)
    w = _weight(z, ACTIVATION)
    dgate = grad * _slope(z, w, ACTIVATION)
    if value_ptr is not None:
        dgate *= tl.load(value_ptr + r * value_stride + c, mask, 0.0).to(tl.float32)
        dvalue = (grad * z * w).to(dvalue_ptr.dtype.element_ty)
        tl.store(dvalue_ptr + r * dvalue_stride + c, dvalue, mask)
    tl.store(dgate_ptr + r * dgate_stride + c, dgate.to(dgate_ptr.dtype.element_ty), mask)


# ---- launchers ----


def _halves(
    x: torch.Tensor, gate: torch.Tensor | None, gate_last: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(value, gate): views of a packed x, or the tensors themselves."""
    if gate is not None:
        return x, gate
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return (first, second) if gate_last else (second, first)


def _stride(t: torch.Tensor) -> int:
    """Elements from one row to the next, leading dimensions being one run of rows."""
    return next((t.stride(d) for d in range(t.dim() - 2, -1, -1) if t.shape[d] != 1), 0)


def _launch(kernel, tensors, like: torch.Tensor, activation: str) -> list[Launch]:
    """``tensors`` may hold None; ``like`` is any one of them."""
    if like.numel() == 0:
        return []
    columns = like.shape[-1]
    rows = like.numel() // columns
    block_c = min(TILE, next_power_of_2(columns))
    block_r = TILE // block_c
    grid = (cdiv(rows, block_r), cdiv(columns, block_c))
    strides = [0 if t is None else _stride(t) for t in tensors]
    constants = {"ACTIVATION": activation, "BLOCK_R": block_r, "BLOCK_C": block_c}
    return [Launch(kernel, grid, (*tensors, rows, columns, *strides), constants)]


def plan_forward(x, gate, gate_last, activation):
    """Output and launches of :func:`forward`."""
    value, z = _halves(x, gate, gate_last)
    y = x.new_empty(value.shape)
    return y, _launch(gated_activation_fwd_kernel, (value, z, y), y, activation)


def plan_backward(grad, x, gate, gate_last, activation):
    """Gradients and launches of :func:`backward`."""
    value, z = _halves(x, gate, gate_last)
    dx = x.new_empty(x.shape)
    dgate = x.new_empty(0) if gate is None else x.new_empty(gate.shape)
    to = _halves(dx, None if gate is None else dgate, gate_last)
    tensors = (grad, value, z, *to)
    return dx, dgate, _launch(gated_activation_bwd_kernel, tensors, grad, activation)


def forward(
    x: torch.Tensor, gate: torch.Tensor | None, gate_last: bool, activation: str
) -> torch.Tensor:
    """value * activation(gate) of two tensors of rows, or of the halves of one."""
    y, launches = plan_forward(x, gate, gate_last, activation)
    run(launches, x)
    return y


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor | None,
    gate_last: bool,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx, dgate), dgate empty for a packed x, whose gradient is packed."""
    dx, dgate, launches = plan_backward(grad, x, gate, gate_last, activation)
    run(launches, x)
    return dx, dgate


def _flat(x: torch.Tensor) -> torch.Tensor:
    """All elements in the order of memory, x being dense."""
    return x.as_strided((x.numel(),), (1,))


def plan_forward_alone(x, activation):
    y = torch.empty_like(x)
    z, out = _flat(x), _flat(y)
    return y, _launch(gated_activation_fwd_kernel, (None, z, out), out, activation)


def plan_backward_alone(grad, x, activation):
    dx = torch.empty_like(x)
    tensors = (_flat(grad), None, _flat(x), None, _flat(dx))
    return dx, _launch(gated_activation_bwd_kernel, tensors, _flat(x), activation)


def forward_alone(x: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(x) for dense x."""
    y, launches = plan_forward_alone(x, activation)
    run(launches, x)
    return y


def backward_alone(grad: torch.Tensor, x: torch.Tensor, activation: str) -> torch.Tensor:
    """grad * activation'(x) for grad and x of one dense layout."""
    dx, launches = plan_backward_alone(grad, x, activation)
    run(launches, x)
    return dx


def aot_specs() -> list[AotSpec]:
    """A packed projection, two projections, and the activation of a ViT's MLP."""

    def packed(device: Device) -> list[Launch]:
        x = torch.empty(8, 257, 8192, dtype=torch.bfloat16, device="meta")
        y, launches = plan_forward(x, None, False, "silu")
        return launches + plan_backward(y, x, None, False, "silu")[2]

    def separate(device: Device) -> list[Launch]:
        x = torch.empty(2, 4096, 1280, dtype=torch.float16, device="meta")
        y, launches = plan_forward(x, x, True, "gelu")
        return launches + plan_backward(y, x, x, True, "gelu")[2]

    def alone(device: Device) -> list[Launch]:
        x = torch.empty(8, 197, 3072, dtype=torch.bfloat16, device="meta")
        found = []
        for activation in ("gelu", "gelu_tanh"):
            found += plan_forward_alone(x, activation)[1]
            found += plan_backward_alone(x, x, activation)[1]
        return found

    return [
        AotSpec("uni2_swiglu", packed),
        AotSpec("sd_geglu", separate),
        AotSpec("vit_b_gelu", alone),
    ]
