"""x + gate * y for GPUs, in tiles of rows and columns.

Tensors are seen as [segments, rows, width]; a segment is what shares one row of gates, a sample or
all. The gradient walks the rows of one part of a segment and keeps the sum of a gate in a register;
parts are added in order afterwards. No atomics; the number of parts depends on the shape alone.
"""

from __future__ import annotations

import torch

import triton
import triton.language as tl

from ._primitives import AotSpec, Device, Launch, cdiv, next_power_of_2, row_stride, run

# Columns of a tile: 128 are 256 bytes of bfloat16, two lines, and no row is much shorter. Rows:
# 4096 elements in 4 warps, 32 a thread, so that loads of three tensors hide each other's latency.
ROWS, COLUMNS, WARPS = 32, 128, 4
# Rows of a part of the gradient, and parts of a segment at most.
PART_ROWS, MAX_PARTS = 128, 512


@triton.jit
def gated_residual_fwd_kernel(
    x_ptr, y_ptr, gate_ptr, out_ptr, gate_stride, rows, blocks,
    E: tl.constexpr, TOKEN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program: a tile of one segment."""
    segment = (tl.program_id(0) // blocks).to(tl.int64)
    r = (tl.program_id(0) % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_e = e < E
    mask = (r < rows)[:, None] & mask_e[None, :]
    row = segment * rows + r
    offs = row[:, None] * E + e[None, :]
    x = tl.load(x_ptr + offs, mask, 0.0).to(tl.float32)
    y = tl.load(y_ptr + offs, mask, 0.0).to(tl.float32)
    if TOKEN:
        gate = tl.load(gate_ptr + row[:, None] * gate_stride + e[None, :], mask, 0.0)
    else:
        gate = tl.load(gate_ptr + segment * gate_stride + e, mask_e, 0.0)[None, :]
    out = x + gate.to(tl.float32) * y
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def gated_residual_bwd_kernel(
    grad_ptr, y_ptr, gate_ptr, dy_ptr, dgate_ptr, gate_stride, rows, part_rows, parts,
    E: tl.constexpr, TOKEN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program: columns of a part of one segment. dgate per token, or the sums of the part."""
    part, segment = tl.program_id(0) % parts, (tl.program_id(0) // parts).to(tl.int64)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_e = e < E
    total = tl.zeros((BLOCK_E,), tl.float32)
    end = tl.minimum((part + 1) * part_rows, rows)
    for at in tl.range(part * part_rows, end, BLOCK_R):
        r = at + tl.arange(0, BLOCK_R)
        mask = (r < end)[:, None] & mask_e[None, :]
        row = segment * rows + r
        offs = row[:, None] * E + e[None, :]
        grad = tl.load(grad_ptr + offs, mask, 0.0).to(tl.float32)
        y = tl.load(y_ptr + offs, mask, 0.0).to(tl.float32)
        if TOKEN:
            gate = tl.load(gate_ptr + row[:, None] * gate_stride + e[None, :], mask, 0.0)
            dgate = (grad * y).to(dgate_ptr.dtype.element_ty)
            tl.store(dgate_ptr + offs, dgate, mask)
        else:
            gate = tl.load(gate_ptr + segment * gate_stride + e, mask_e, 0.0)[None, :]
            total += tl.sum(grad * y, 0)
        dy = gate.to(tl.float32) * grad
        tl.store(dy_ptr + offs, dy.to(dy_ptr.dtype.element_ty), mask)
    if not TOKEN:
        tl.store(dgate_ptr + (segment * parts + part) * E + e, total, mask_e)


# ---- launchers ----


class _Call:
    """Sizes and tile of one call."""

    def __init__(self, x: torch.Tensor, gate: torch.Tensor):
        self.token = gate.dim() == x.dim()
        self.width = x.shape[-1]
        self.segments = x.shape[0] if gate.dim() == 2 and not self.token else 1
        self.rows = x.numel() // self.width // self.segments
        self.stride = row_stride(gate)
        self.columns = min(COLUMNS, next_power_of_2(self.width))
        tile = {"BLOCK_R": ROWS, "BLOCK_E": self.columns}
        self.constants = {"E": self.width, "TOKEN": self.token, **tile}

    def grid(self, of_segment: int) -> tuple[int, int]:
        return self.segments * of_segment, cdiv(self.width, self.columns)


def plan_forward(x, y, gate):
    """Output and launches of :func:`forward`."""
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out, []
    call = _Call(x, gate)
    blocks = cdiv(call.rows, ROWS)
    args = (x, y, gate, out, call.stride, call.rows, blocks)
    return out, [Launch(gated_residual_fwd_kernel, call.grid(blocks), args, call.constants, WARPS)]


def forward(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x + gate * y; x and y [*, E] contiguous."""
    out, launches = plan_forward(x, y, gate)
    run(launches, x)
    return out


def plan_backward(grad, y, gate):
    """dy; dgate per token, or the sums of parts [segments, parts, E]; launches."""
    call = _Call(y, gate)
    part_rows = max(PART_ROWS, cdiv(call.rows, MAX_PARTS))
    parts = cdiv(call.rows, part_rows)
    dy = torch.empty_like(y)
    if call.token:
        dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    else:
        shape = (call.segments, parts, call.width)
        dgate = torch.empty(shape, dtype=torch.float32, device=gate.device)
    args = (grad, y, gate, dy, dgate, call.stride, call.rows, part_rows, parts)
    launch = Launch(gated_residual_bwd_kernel, call.grid(parts), args, call.constants, WARPS)
    return dy, dgate, [launch]


def backward(
    grad: torch.Tensor, y: torch.Tensor, gate: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dy, dgate)"""
    if y.numel() == 0:
        return torch.empty_like(y), torch.zeros_like(gate)
    dy, dgate, launches = plan_backward(grad, y, gate)
    run(launches, y)
    if gate.dim() != y.dim():
        dgate = dgate.sum(1).view(gate.shape)
    return dy, dgate.to(gate.dtype)


def aot_specs() -> list[AotSpec]:
    """Calls worth compiling without a GPU: gates per sample and per token."""
    specs = []
    shapes = {"dit_xl_gate": ((8, 256, 1152), (8, 1152)), "wan_token_gate": ((1, 1024, 1536),) * 2}
    for name, (shape, of_gate) in shapes.items():
        x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        gate = torch.empty(of_gate, dtype=torch.bfloat16, device="meta")

        def launches(device: Device, x=x, gate=gate) -> list[Launch]:
            return plan_forward(x, x, gate)[1] + plan_backward(x, x, gate)[2]

        specs.append(AotSpec(name, launches))
    return specs
