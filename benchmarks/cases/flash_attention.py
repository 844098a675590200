"""Shapes of flash_attention: [B, N, H, D] as views of one qkv projection, as ViTs produce them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

import vitkit

from ..harness import MAX_AUTOTUNE, Case, Outputs, Provider, compiled, half_on_cpu, in_float32

OP = "flash_attention"

# (model, B, Nq, Nk, H, D, bias, targets of fp32 and bf16 forward and forward+backward, sets)
SHAPES: list[
    tuple[str, int, int, int, int, int, str, tuple[float | None, ...], tuple[str, ...]]
] = [
    ("ViT-B/16", 8, 197, 197, 12, 64, "none", (1.5, 2.0, 1.3, 1.3), ("smoke", "fast", "full")),
    ("SigLIP so400m", 8, 256, 256, 16, 72, "none", (1.4, 1.5, 1.3, 1.3), ("fast", "full")),
    (
        "ViT-B/16 512px",
        2,
        1024,
        1024,
        12,
        64,
        "none",
        (1.15, 1.25, 1.3, 1.3),
        ("fast forward", "full"),
    ),
    ("ViT-B/16 1024px", 1, 4096, 4096, 12, 64, "none", (1.1, 1.25, 1.3, 1.3), ("full",)),
    ("BEiT-B/16", 8, 197, 197, 12, 64, "heads", (None, 2.0, None, 2.0), ("fast", "full")),
    ("ViT-L/16 384px", 4, 577, 577, 16, 64, "none", (None,) * 4, ("full",)),
    ("ViT-B/32", 16, 50, 50, 12, 64, "none", (None,) * 4, ("full",)),
    ("SD1.5 cross attention", 2, 4096, 77, 8, 40, "none", (None,) * 4, ("fast forward", "full")),
    # Vision shapes of xformers' own benchmark.
    ("ViT-H/14", 16, 197, 197, 16, 80, "none", (None,) * 4, ("full",)),
    ("ViT-g/14", 16, 197, 197, 16, 88, "none", (None,) * 4, ("full",)),
    ("SD 512px self attention", 1, 4096, 4096, 16, 40, "none", (None,) * 4, ("full",)),
    ("SD 1024px self attention", 1, 16384, 16384, 4, 40, "none", (None,) * 4, ("full",)),
]  # fmt: skip
CURVE = "tokens, 2 heads of 64"
CURVE_SIZES = (256, 1024, 4096, 8192, 16384)
# Scores of so many elements do not fit into memory in float64: the truth is computed in slices.
EXACT_SCORES = 1 << 27
EXACT_QUERIES = 512


def _bias_shape(kind: str, b: int, nq: int, nk: int, h: int) -> tuple[int, ...] | None:
    shapes = {"none": None, "heads": (1, h, nq, nk), "batch": (b, h, nq, nk), "keys": (b, 1, 1, nk)}
    if kind not in shapes:
        raise ValueError(f"bench: bias must be one of {sorted(shapes)}, got {kind!r}")
    return shapes[kind]


def sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def eager(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    return (scores.softmax(-1) @ v).transpose(1, 2)


def _exact(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``eager``, a slice of the queries at a time where the scores are many."""
    if q.shape[0] * q.shape[1] * q.shape[2] * k.shape[1] <= EXACT_SCORES or bias is not None:
        return eager(q, k, v, bias)
    rows = [
        checkpoint(eager, part, k, v, None, use_reentrant=False)
        for part in q.split(EXACT_QUERIES, 1)
    ]
    return torch.cat(rows, 1)


def _flex(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    score = None
    if bias is not None:
        dense = bias.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])

        def score(s, b, h, i, j):
            return s + dense[b, h, i, j]

    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return flex_attention(q, k, v, score_mod=score).transpose(1, 2)


def _sdpa_with(backend: SDPBackend) -> Callable[..., torch.Tensor]:
    def call(*tensors: Any) -> torch.Tensor:
        with sdpa_kernel(backend):
            return sdpa(*tensors)

    return call


def _rivals(device: str, dtype: torch.dtype) -> dict[str, Callable[..., torch.Tensor]]:
    rivals: dict[str, Callable[..., torch.Tensor]] = {
        "eager": eager,
        **compiled(eager),
        "sdpa": sdpa,
        f"FlexAttention {MAX_AUTOTUNE}": torch.compile(_flex, mode=f"{MAX_AUTOTUNE}-no-cudagraphs"),
    }
    if half_on_cpu(dtype, device):
        rivals["sdpa in float32"] = in_float32(sdpa, dtype)
    backends = ["MATH", "FLASH_ATTENTION"]
    if device == "cuda":
        backends += ["EFFICIENT_ATTENTION", "CUDNN_ATTENTION"]
        rivals |= _optional_gpu_rivals()
    for name in backends:
        rivals[f"sdpa {name.lower()}"] = _sdpa_with(getattr(SDPBackend, name))
    return rivals


def _optional_gpu_rivals() -> dict[str, Callable[..., torch.Tensor]]:
    """flash-attn and xformers where they are installed and load."""
    found: dict[str, Callable[..., torch.Tensor]] = {}
    try:
        from flash_attn import flash_attn_func

        found["flash-attn"] = lambda q, k, v, bias: flash_attn_func(q, k, v)
    except (ImportError, OSError):
        pass
    try:
        from xformers.ops import memory_efficient_attention

        def xformers(q, k, v, bias):
            shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
            return memory_efficient_attention(
                q, k, v, attn_bias=None if bias is None else bias.expand(shape)
            )

        found["xformers"] = xformers
    except (ImportError, OSError):
        pass
    return found


def make_case(
    name: str,
    b: int,
    nq: int,
    nk: int,
    h: int,
    d: int,
    bias: str,
    dtype: torch.dtype,
    backward: bool,
    device: str,
    target: float | None = None,
    sets: tuple[str, ...] = ("full",),
    backend: str = "auto",
    curve: str = "",
) -> Case:
    """One case; tensors are made when it is measured."""

    def make() -> tuple[list[Provider], Callable[[], Outputs]]:
        torch.manual_seed(0)
        if nq == nk:
            q, k, v = torch.randn(b, nq, 3, h, d, device=device).to(dtype).unbind(2)
        else:
            q = torch.randn(b, nq, h, d, device=device).to(dtype)
            k, v = torch.randn(b, nk, 2, h, d, device=device).to(dtype).unbind(2)
        shape = _bias_shape(bias, b, nq, nk, h)
        term = None if shape is None else torch.randn(shape, device=device).to(dtype)
        grad = torch.randn(b, nq, h, d, device=device).to(dtype)

        def bind(
            function: Callable[..., torch.Tensor], double: bool = False
        ) -> Callable[[], Outputs]:
            given = [t.double() if double and t is not None else t for t in (q, k, v, term)]
            if not backward:
                return lambda: [function(*given)]
            leaves = [t.detach().requires_grad_() if t is not None else None for t in given]
            wanted = [t for t in leaves if t is not None]
            cotangent = grad.double() if double else grad

            def call() -> Outputs:
                out = function(*leaves)
                return [out.detach(), *torch.autograd.grad(out, wanted, cotangent)]

            return call

        def ours(q, k, v, bias):
            return vitkit.flash_attention(q, k, v, bias=bias, backend=backend)

        providers = [Provider("vitkit", bind(ours), ours=True)]
        providers += [Provider(n, bind(f)) for n, f in _rivals(device, dtype).items()]
        return providers, bind(_exact, double=True)

    element = dtype.itemsize
    tensors = b * h * d * (2 * nq + 2 * nk) * element
    shape = _bias_shape(bias, b, nq, nk, h)
    if shape is not None:
        tensors += torch.Size(shape).numel() * element
    flops = 4.0 * b * h * nq * nk * d
    return Case(
        OP,
        name,
        "forward+backward" if backward else "forward",
        dtype,
        "BNHD",
        f"{b}x{nq}x{h}x{d}"
        + (f" kv {nk}" if nk != nq else "")
        + (f" bias {bias}" if shape else ""),
        make,
        flops * (3.5 if backward else 1),
        tensors * (2.5 if backward else 1),
        nk * d * (b if backward else 1),
        target,
        sets,
        curve,
        nq if curve else 0,
    )


def cases(device: str) -> list[Case]:
    from . import score_bias  # which takes its rivals from here

    found = score_bias.cases(device)
    for name, b, nq, nk, h, d, bias, targets, sets in SHAPES:
        for backward in (False, True):
            for dtype in (torch.float32, torch.bfloat16):
                index = 2 * backward + (dtype == torch.bfloat16)
                found.append(
                    make_case(
                        name, b, nq, nk, h, d, bias, dtype, backward, device, targets[index], sets
                    )
                )
    for n in CURVE_SIZES:
        name = f"{n:,} tokens"
        for dtype in (torch.float32, torch.bfloat16):
            found.append(
                make_case(
                    name, 1, n, n, 2, 64, "none", dtype, False, device, sets=("scaling",),
                    curve=CURVE,
                )
            )  # fmt: skip
    return found
