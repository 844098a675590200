"""Shapes of dilated_attention: Prov-GigaPath's slide encoder, q, k, v as views of one projection.

The rivals gather each branch and attend with SDPA, whose kernels return the log-sum-exp that the
mixture needs; zero slots are attended as the op attends them. Where a call takes long, how long is
said before the first one, and all providers' numbers are compared on a sample of the tokens.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import vitkit

from ..harness import Case, Outputs, Provider, compiled, half_on_cpu, in_float32
from ..timing import synchronize

OP = "dilated_attention"
LENGTHS = (1024, 5792, 32768, 185363, 1048576)
RATIOS = (1, 2, 4, 8, 16)
HEADS, HEAD_DIM = 16, 48

# (N, mode, targets of fp32 and bf16, sets)
SHAPES: list[tuple[int, str, tuple[float | None, ...], tuple[str, ...]]] = [
    (1000, "forward", (None, None), ("smoke", "fast", "full")),
    (1000, "forward+backward", (None, None), ("smoke", "fast", "full")),
    (10000, "forward", (1.2, 1.4), ("fast float32", "full")),
    (10000, "forward+backward", (None, None), ("full",)),
    (50000, "forward", (None, None), ("full",)),
]
CURVE = "tokens, 1 head of 48, Prov-GigaPath's branches"
CURVE_SIZES = (1000, 4000, 16000, 64000, 250000, 1000000)
SAMPLED_FLOPS = 2e11  # float64 of all tokens would take long and much memory
LONG_FLOPS = 1e12  # a call of ten seconds on a small machine
SAMPLED_TOKENS = 64
SMALLER_RUN = 8192  # tokens
CALLS = 14  # of all providers together when a call takes long


class Branch(NamedTuple):
    length: int
    ratio: int
    segments: int
    slots: int
    group: int  # heads of one phase


def _branches(n: int, heads: int) -> list[Branch]:
    found = []
    for wanted, ratio in zip(LENGTHS, RATIOS, strict=True):
        w = min(wanted, n)
        found.append(Branch(w, ratio, -(-n // w), -(-w // ratio), -(-heads // ratio)))
    return found


def forward_flops(batch: int, n: int, heads: int, head_dim: int) -> float:
    """Products of real queries and real keys."""
    pairs = 0.0
    for b in _branches(n, heads):
        for s in range(b.segments):
            pairs += (min(b.length, n - s * b.length) / b.ratio) ** 2
    return 4.0 * batch * heads * head_dim * pairs


# ---- the same semantics in PyTorch ----


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """SDPA of [B, H, N, D] with its log-sum-exp."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[:2]
    out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
    return out, lse[..., : q.shape[2]]


def _segments(x: torch.Tensor, b: Branch) -> torch.Tensor:
    """[B, N, H, D] -> [B, segments, slots * ratio, H, D], zeros behind tokens and segments."""
    batch, n, heads, d = x.shape
    if b.segments * b.length > n:
        x = F.pad(x, (0, 0, 0, 0, 0, b.segments * b.length - n))
    x = x.reshape(batch, b.segments, b.length, heads, d)
    return F.pad(x, (0, 0, 0, 0, 0, b.slots * b.ratio - b.length)) if b.length % b.ratio else x


def _diagonal(x: torch.Tensor, b: Branch) -> torch.Tensor:
    """View of [B, segments, slots * ratio, H, ...] in which each head has its own phase:
    [B, segments, slots, group, ..., phases]."""
    phases = x.unflatten(2, (b.slots, b.ratio)).unflatten(4, (-1, b.group))
    return torch.diagonal(phases[:, :, :, : phases.shape[4]], 0, 3, 4)


def _unsegmented(x: torch.Tensor, b: Branch, n: int) -> torch.Tensor:
    return x[:, :, : b.length].flatten(1, 2)[:, :n]


def gathered(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One gather and one SDPA per branch, spread out again and mixed."""
    batch, n, heads, d = q.shape
    outs, lses = [], []
    for b in _branches(n, heads):
        thin = [_diagonal(_segments(x, b), b).permute(0, 1, 5, 3, 2, 4) for x in (q, k, v)]
        shape = thin[0].shape  # [B, segments, phases, group, slots, D]
        o, z = _attend(*(x.reshape(batch * b.segments, heads, b.slots, d) for x in thin))
        out = q.new_zeros(batch, b.segments, b.slots * b.ratio, heads, d)
        _diagonal(out, b).copy_(o.view(shape).permute(0, 1, 4, 3, 5, 2))
        lse = z.new_full((batch, b.segments, b.slots * b.ratio, heads), -math.inf)
        _diagonal(lse, b).copy_(z.detach().view(shape[:-1]).permute(0, 1, 4, 3, 2))
        outs.append(_unsegmented(out, b, n))
        lses.append(_unsegmented(lse, b, n))
    return _mix(outs, lses)


def _viewed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One SDPA per branch and phase, on strided views where nothing needs to be padded."""
    n, heads = q.shape[1:3]
    outs, lses = [], []
    for b in _branches(n, heads):
        padded = [_segments(x, b) for x in (q, k, v)]
        out = torch.zeros_like(padded[0])
        lse = q.new_full(out.shape[:-1], -math.inf, dtype=torch.float32)
        for phase in range(-(-heads // b.group)):
            at = (..., slice(phase, None, b.ratio), slice(phase * b.group, (phase + 1) * b.group))
            thin = [x[(*at, slice(None))].flatten(0, 1).transpose(1, 2) for x in padded]
            o, z = _attend(*thin)
            out[(*at, slice(None))] = o.transpose(1, 2).unflatten(0, out.shape[:2])
            lse[at] = z.detach().transpose(1, 2).unflatten(0, out.shape[:2])
        outs.append(_unsegmented(out, b, n))
        lses.append(_unsegmented(lse, b, n))
    return _mix(outs, lses)


def _mix(outs: list[torch.Tensor], lses: list[torch.Tensor]) -> torch.Tensor:
    weights = torch.stack(lses).softmax(0)  # every token is in the first branch
    total = torch.zeros_like(outs[0])
    for out, weight in zip(outs, weights, strict=True):
        total = total + out * weight[..., None].to(out.dtype)
    return total


# ---- float64 ----


def _exact_head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, zeros: int) -> tuple[Any, ...]:
    """One head of one segment, [queries, D], with so many zero slots."""
    scores = q @ k.T * q.shape[-1] ** -0.5
    top = scores.detach().amax(-1, keepdim=True).clamp(min=0.0 if zeros else -math.inf)
    p = (scores - top).exp()
    total = p.sum(-1, keepdim=True) + zeros * (-top).exp()
    return p @ v / total, (top + total.log())[:, 0].detach()


def _exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Head by head; gradients compute the probabilities again."""
    batch, n, heads, _ = q.shape
    outs, lses = [], []
    for b in _branches(n, heads):
        out = torch.zeros_like(q)
        lse = q.new_full(q.shape[:3], -math.inf)
        for h in range(heads):
            for start in range(0, n, b.length):
                end = min(start + b.length, n)
                at = slice(start + h // b.group, end, b.ratio)
                for i in range(batch):
                    rows = [x[i, at, h] for x in (q, k, v)]
                    zeros = b.slots - rows[0].shape[0]
                    o, z = checkpoint(_exact_head, *rows, zeros, use_reentrant=False)
                    out[i, at, h] = o
                    lse[i, at, h] = z
        outs.append(out)
        lses.append(lse)
    return _mix(outs, lses)


def _exact_tokens(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """The rows of some tokens, in float64."""
    n, heads = q.shape[1:3]
    rows = q.new_zeros(q.shape[0], len(tokens), heads, q.shape[3], dtype=torch.float64)
    for i in range(q.shape[0]):
        for at, token in enumerate(tokens.tolist()):
            for h in range(heads):
                found = []
                for b in _branches(n, heads):
                    start = token // b.length * b.length
                    phase = h // b.group
                    if (token - start) % b.ratio != phase:
                        continue
                    keys = slice(start + phase, min(start + b.length, n), b.ratio)
                    ks, vs = k[i, keys, h].double(), v[i, keys, h].double()
                    zeros = b.slots - len(ks)
                    found.append(_exact_head(q[i, token : token + 1, h].double(), ks, vs, zeros))
                weights = torch.stack([z for _, z in found]).softmax(0)
                rows[i, at, h] = sum(o[0] * a for (o, _), a in zip(found, weights, strict=True))
    return rows


# ---- cases ----


def _announce(name: str, call: Callable[..., Any], make: Callable[[int], Any], flops: float,
              of: Callable[[int], float], device: str) -> None:  # fmt: skip
    """Says how long the case will take, from the rate of a smaller one."""
    inputs = make(SMALLER_RUN)
    call(*inputs)
    start = time.perf_counter()
    call(*inputs)
    synchronize(device)
    rate = of(SMALLER_RUN) / (time.perf_counter() - start)
    seconds = flops / rate
    print(
        f"{name}: {flops / 1e12:.2f} TFLOP a call, at the {rate / 1e9:.0f} GFLOP/s measured with"
        f" {SMALLER_RUN} tokens about {seconds:.0f} s; about {CALLS} calls of all providers,"
        f" {CALLS * seconds / 60:.0f} minutes if the rivals were as fast",
        file=sys.stderr, flush=True,
    )  # fmt: skip


def _with_progress(name: str, call: Callable[[], Outputs], device: str) -> Callable[[], Outputs]:
    def told() -> Outputs:
        start = time.perf_counter()
        outputs = call()
        synchronize(device)
        seconds = time.perf_counter() - start
        print(f"  {name}: a call in {seconds:.1f} s", file=sys.stderr, flush=True)
        return outputs

    return told


def make_case(
    name: str,
    b: int,
    n: int,
    h: int,
    d: int,
    dtype: torch.dtype,
    backward: bool,
    device: str,
    target: float | None = None,
    sets: tuple[str, ...] = ("full",),
    backend: str = "auto",
    curve: str = "",
) -> Case:
    """One case; tensors are made when it is measured."""
    flops = forward_flops(b, n, h, d) * (3.5 if backward else 1)
    long = flops > LONG_FLOPS
    sampled = long or (flops > SAMPLED_FLOPS and not backward)
    if long and backward:
        raise SystemExit("vitkit bench: --backward must go with fewer tokens: gradients of a"
                         " sample of tokens depend on all of them")  # fmt: skip

    def projections(tokens: int) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        return torch.randn(b, tokens, 3, h, d, device=device).to(dtype).unbind(2)

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return vitkit.dilated_attention(
            q, k, v, segment_lengths=LENGTHS, dilation_ratios=RATIOS, backend=backend
        )

    def make() -> tuple[list[Provider], Callable[[], Outputs]]:
        rivals: dict[str, Callable[..., torch.Tensor]] = {"eager": gathered, "views": _viewed}
        if not long:
            rivals |= compiled(gathered)
            if half_on_cpu(dtype, device):
                rivals["torch.compile in float32"] = torch.compile(in_float32(gathered, dtype))
        if long:
            _announce(name, ours, projections, flops, lambda t: forward_flops(b, t, h, d), device)
        q, k, v = projections(n)
        sample = torch.randperm(n, device=device)[:SAMPLED_TOKENS].sort().values
        grad = torch.randn(b, n, h, d, device=device).to(dtype) if backward else None

        def bind(function: Callable[..., torch.Tensor], name: str) -> Callable[[], Outputs]:
            if sampled:
                call = lambda: [function(q, k, v)[:, sample]]  # noqa: E731
                return _with_progress(name, call, device) if long else call
            if grad is None:
                return lambda: [function(q, k, v)]
            return lambda: _gradients(function, [q, k, v], grad)

        def exact() -> Outputs:
            if sampled:
                return [_exact_tokens(q, k, v, sample)]
            double = [t.double() for t in (q, k, v)]
            return [_exact(*double)] if grad is None else _gradients(_exact, double, grad.double())

        providers = [Provider("vitkit", bind(ours, "vitkit"), ours=True)]
        return providers + [Provider(r, bind(f, r)) for r, f in rivals.items()], exact

    slots = sum(branch.slots for branch in _branches(n, h))
    return Case(
        OP,
        name,
        "forward+backward" if backward else "forward",
        dtype,
        "BNHD",
        f"{b}x{n}x{h}x{d}" + (f", error on {SAMPLED_TOKENS} sampled tokens" if sampled else ""),
        make,
        flops,
        4.0 * b * n * h * d * dtype.itemsize * (2.5 if backward else 1),
        slots * d,
        target,
        sets,
        curve,
        n if curve else 0,
    )


def _gradients(
    function: Callable[..., torch.Tensor], tensors: list[torch.Tensor], grad: torch.Tensor
) -> Outputs:
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def cases(device: str) -> list[Case]:
    dtypes = (torch.float32, torch.bfloat16)
    models = [
        make_case(
            f"GigaPath {n:,} tiles", 1, n, HEADS, HEAD_DIM, dtype, mode != "forward", device,
            target, sets,
        )
        for n, mode, targets, sets in SHAPES
        for dtype, target in zip(dtypes, targets, strict=True)
    ]  # fmt: skip
    points = [
        make_case(
            f"{n:,} tokens", 1, n, 1, HEAD_DIM, dtype, False, device, sets=("scaling",),
            curve=CURVE,
        )
        for n in CURVE_SIZES
        for dtype in dtypes
    ]  # fmt: skip
    return models + points
