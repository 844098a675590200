"""Blocks of Swin Transformers: everything between the qkv Linear and the proj Linear, and the roll
and partition before them.

The rivals do what timm's blocks do, in its order: roll and partition x, [the qkv Linear,]
attention in windows with the gathered bias and the mask, reverse, roll back [, the proj Linear].
They therefore roll and partition C channels, not the 3 C of qkv: they are handed x and, as the
Linear would leave it, qkv in windows. vitkit is handed qkv on the map. Two kinds of rows:

    plain      bias gathered and mask added in each call, as in training: "eager" is timm's path,
               "sdpa" timm's with its switch for SDPA, and torch.compile of both
    cached     bias and mask added up once, which inference could do and no library does, with
               -inf in place of -100: exp(-100) is a denormal number, slow in every product
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import vitkit

from ..harness import Case, Outputs, Provider, compiled, half_on_cpu, in_float32

OP = "window_attention"
MASK = -100.0


class Shape(NamedTuple):
    name: str
    batch: int
    height: int
    width: int
    heads: int
    head_dim: int
    window: int
    shift: int
    cosine: bool
    targets: tuple[float | None, ...]  # fp32 and bf16, forward; the same, forward+backward
    sets: tuple[str, ...]
    cached: bool = False
    curve: str = ""

    @property
    def places(self) -> int:
        return self.window**2

    @property
    def padded(self) -> tuple[int, int]:
        w = self.window
        return -(-self.height // w) * w, -(-self.width // w) * w


_NO = (None,) * 4
SHAPES = [
    Shape("Swin-T stage 1", 4, 56, 56, 3, 32, 7, 3, False, (3.5, 6.0, None, None),
          ("smoke", "fast", "full")),
    Shape("Swin-T stage 1 cached", 4, 56, 56, 3, 32, 7, 3, False, (2.2, 4.4, None, None),
          ("fast", "full"), True),
    Shape("Swin-B 384px stage 1", 1, 96, 96, 4, 32, 12, 6, False, (2.0,) * 4, ("fast", "full")),
    Shape("Swin-B 384px stage 3", 4, 24, 24, 16, 32, 12, 6, False, _NO, ("full",)),
    Shape("SwinV2-B w16 stage 1", 1, 64, 64, 4, 32, 16, 8, True, (2.0,) * 4, ("fast", "full")),
    Shape("SwinV2-B w24 stage 1", 1, 96, 96, 4, 32, 24, 12, True, _NO, ("full",)),
    Shape("Swin-T stage 3", 8, 14, 14, 12, 32, 7, 0, False, _NO, ("full",)),
    Shape("Swin-T detection", 1, 200, 304, 3, 32, 7, 3, False, _NO, ("full",)),
    *(
        Shape(f"{side}x{side} map", 1, side, side, 3, 32, 7, 3, False, _NO, ("scaling",),
              curve="places of the map, 3 heads of 32, window 7, shift 3")
        for side in (14, 28, 56, 112, 224, 448)
    ),
]  # fmt: skip


# ---- timm's block, op by op ----


def _roll_and_partition(x: torch.Tensor, s: Shape) -> torch.Tensor:
    """[B, H, W, C] -> [windows, places, C]"""
    if s.shift:
        x = torch.roll(x, shifts=(-s.shift, -s.shift), dims=(1, 2))
    hp, wp = s.padded
    x = F.pad(x, (0, 0, 0, wp - s.width, 0, hp - s.height))
    w = s.window
    x = x.view(-1, hp // w, w, wp // w, w, x.shape[-1]).permute(0, 1, 3, 2, 4, 5)
    return x.contiguous().view(-1, s.places, x.shape[-1])


def _reverse_and_roll(x: torch.Tensor, s: Shape) -> torch.Tensor:
    hp, wp = s.padded
    w = s.window
    x = x.view(-1, hp // w, wp // w, w, w, x.shape[-1]).permute(0, 1, 3, 2, 4, 5)
    x = x.contiguous().view(-1, hp, wp, x.shape[-1])[:, : s.height, : s.width].contiguous()
    return torch.roll(x, shifts=(s.shift, s.shift), dims=(1, 2)) if s.shift else x


def _index(s: Shape) -> torch.Tensor:
    at = torch.arange(s.window)
    y, x = at.repeat_interleave(s.window), at.repeat(s.window)
    delta_y, delta_x = y[:, None] - y, x[:, None] - x
    return (delta_y + s.window - 1) * (2 * s.window - 1) + delta_x + s.window - 1


def _mask(s: Shape, dtype: torch.dtype) -> torch.Tensor | None:
    """[windows of a map, places, places]"""
    if not s.shift:
        return None
    hp, wp = s.padded
    region = torch.zeros(hp, wp)
    bands = [slice(0, -s.window), slice(-s.window, -s.shift), slice(-s.shift, None)]
    for i, rows in enumerate(bands):
        for j, columns in enumerate(bands):
            region[rows, columns] = 3 * i + j
    w = s.window
    region = region.view(hp // w, w, wp // w, w).permute(0, 2, 1, 3).reshape(-1, s.places)
    return (MASK * (region[:, :, None] != region[:, None, :])).to(dtype)


class _Block:
    """timm's path; ``sdpa`` by its fused switch, ``cached`` with bias and mask added up once."""

    def __init__(self, s: Shape, table, logit_scale, *, sdpa: bool = False, cached: bool = False):
        self.shape, self.sdpa = s, sdpa
        self.index = _index(s).to(table.device)
        mask = _mask(s, table.dtype)
        self.mask = None if mask is None else mask.to(table.device)
        self.term: torch.Tensor | None = None
        if cached:
            term = self._bias(table)
            if self.mask is not None:
                hidden = self.mask.masked_fill(self.mask != 0, -math.inf)
                term = term + hidden[:, None]  # [windows of a map, heads, places, places]
            self.term = term.detach()

    def _bias(self, table: torch.Tensor) -> torch.Tensor:
        n = self.shape.places
        bias = table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
        return (16 * torch.sigmoid(bias) if self.shape.cosine else bias)[None]

    def _scores(self, q, k, logit_scale):
        if not self.shape.cosine:
            return (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        gain = torch.clamp(logit_scale, max=math.log(100.0)).exp()
        return (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)) * gain

    def _attend(self, q, k, v, table, logit_scale):
        s = self.shape
        n, heads, maps = s.places, s.heads, s.batch
        term = self._bias(table) if self.term is None else self.term
        mask = self.mask if self.term is None else None
        if self.sdpa:
            if mask is not None:
                mask = mask.view(1, -1, 1, n, n).expand(maps, -1, heads, -1, -1)
                term = term + mask.reshape(-1, heads, n, n)
            elif term.shape[0] > 1:
                term = term.expand(maps, *term.shape).reshape(-1, heads, n, n)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=term)
        scores = self._scores(q, k, logit_scale)
        if term.shape[0] > 1:
            scores = (scores.view(maps, -1, heads, n, n) + term).view(-1, heads, n, n)
        else:
            scores = scores + term
        if mask is not None:
            scores = scores.view(-1, len(mask), heads, n, n) + mask[:, None]
            scores = scores.view(-1, heads, n, n)
        return scores.softmax(-1) @ v

    def __call__(self, x, windows, table, logit_scale):
        """out [B, H, W, C], and what the qkv Linear would read."""
        s = self.shape
        read = _roll_and_partition(x, s)
        q, k, v = windows.view(-1, s.places, 3, s.heads, s.head_dim).permute(2, 0, 3, 1, 4).unbind()
        out = self._attend(q, k, v, table, logit_scale)
        return _reverse_and_roll(out.transpose(1, 2).reshape(-1, s.places, x.shape[-1]), s), read


# ---- cases ----


class _InMapOrder(Sequence[torch.Tensor]):
    """out, dqkv and the small gradients of a rival. dqkv is in windows, as the Linear's gradient
    takes it; it is put into the order of the map when somebody looks at it, outside the timing."""

    def __init__(self, outputs: list[torch.Tensor], s: Shape):
        self._outputs, self._shape = outputs, s

    def __len__(self) -> int:
        return len(self._outputs)

    def __getitem__(self, i: Any) -> Any:
        value = self._outputs[i]
        if i != 1:
            return value
        return _reverse_and_roll(value, self._shape).unflatten(
            -1, (3, self._shape.heads, self._shape.head_dim)
        )

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[i] for i in range(len(self)))


def _rivals(s: Shape, table, logit_scale) -> dict[str, Callable[..., Any]]:
    def block(sdpa: bool = False, cached: bool = False) -> _Block:
        return _Block(s, table, logit_scale, sdpa=sdpa, cached=cached)

    rivals: dict[str, Callable[..., Any]] = {"eager": block()}
    if not s.cached:
        rivals |= compiled(block())
    else:
        rivals["cached"] = block(cached=True)
        rivals |= compiled(block(cached=True), "cached")
    if not s.cosine:  # SDPA takes one factor for all scores
        name = "sdpa cached" if s.cached else "sdpa"
        rivals[name] = block(sdpa=True, cached=s.cached)
        rivals |= compiled(block(sdpa=True, cached=s.cached), name)
    return rivals


def _rivals_in_float32(s: Shape, table, logit_scale) -> dict[str, Callable[..., Any]]:
    tables = [t if t is None else t.float() for t in (table, logit_scale)]
    block = in_float32(_Block(s, *tables, sdpa=not s.cosine, cached=s.cached), table.dtype)
    kind = ("eager" if s.cosine else "sdpa") + (" cached" if s.cached else "") + " in float32"
    return {kind: block, f"torch.compile {kind}": torch.compile(block)}


def make_case(
    s: Shape,
    dtype: torch.dtype,
    backward: bool,
    device: str,
    target: float | None = None,
    backend: str = "auto",
) -> Case:
    """One case; tensors are made when it is measured."""
    channels = s.heads * s.head_dim
    options = {"window_size": s.window, "shift_size": s.shift, "padding": "roll_then_pad"}

    def ours(qkv, table, logit_scale, pad):
        if s.cosine:
            table, logit_scale = 16 * torch.sigmoid(table), logit_scale.flatten()
        return vitkit.window_attention(
            qkv, bias_table=table, logit_scale=logit_scale, pad_value=pad, backend=backend,
            **options,
        )  # fmt: skip

    def make() -> tuple[list[Provider], Callable[[], Outputs]]:
        torch.manual_seed(0)
        shape = (s.batch, s.height, s.width)
        x, grad = (torch.randn(*shape, channels, device=device).to(dtype) for _ in range(2))
        qkv = torch.randn(*shape, 3, s.heads, s.head_dim, device=device).to(dtype)
        pad = torch.zeros(3, s.heads, s.head_dim, device=device, dtype=dtype)
        table = torch.randn((2 * s.window - 1) ** 2, s.heads, device=device).to(dtype)
        logit_scale = None
        if s.cosine:
            logit_scale = (torch.rand(s.heads, 1, 1, device=device) + 2).to(dtype)
        windows = _roll_and_partition(qkv.flatten(3), s)
        grad_read = torch.randn(*windows.shape[:2], channels, device=device).to(dtype)

        def bind(
            function: Callable[..., Any], inputs: Sequence[Any], grads: Sequence[Any], rival: bool
        ) -> Callable[[], Outputs]:
            """``grads`` are those of the function's outputs; of the gradients, that of x is not
            compared: vitkit has no x."""

            def forward() -> Outputs:
                result = function(*inputs)
                return [result[0] if rival else result]

            if not backward:
                return forward
            leaves = [t if t is None else t.detach().requires_grad_() for t in inputs]
            if not rival:
                leaves[3] = pad
            wanted = [t for t in leaves if t is not None and t.requires_grad]

            def both() -> Outputs:
                results = function(*leaves)
                results = results if rival else (results,)
                found = torch.autograd.grad(results, wanted, grads)
                out = results[0].detach()
                return _InMapOrder([out, *found[1:]], s) if rival else [out, *found]

            return both

        given = (x, windows, table, logit_scale)
        providers = [
            Provider("vitkit", bind(ours, (qkv, table, logit_scale, pad), [grad], False), ours=True)
        ]
        rivals = _rivals(s, table, logit_scale)
        if half_on_cpu(dtype, device):
            rivals |= _rivals_in_float32(s, table, logit_scale)
        providers += [
            Provider(name, bind(f, given, [grad, grad_read], True)) for name, f in rivals.items()
        ]
        exact = [None if t is None else t.double() for t in given]
        truth = _Block(s, exact[2], exact[3])
        return providers, bind(truth, exact, [grad.double(), grad_read.double()], True)

    tokens = s.batch * s.height * s.width
    count = s.batch * s.padded[0] * s.padded[1] // s.places
    flops = 4.0 * count * s.heads * s.places**2 * s.head_dim
    traffic = 4.0 * tokens * channels * dtype.itemsize  # qkv and out
    return Case(
        OP,
        s.name,
        "forward+backward" if backward else "forward",
        dtype,
        "BHW3HD",
        f"{s.batch}x{s.height}x{s.width}x{s.heads}x{s.head_dim} window {s.window} shift {s.shift}",
        make,
        flops * (3.5 if backward else 1),
        traffic * (3 if backward else 1),
        s.places * s.head_dim * (count if backward else 1),
        target,
        s.sets,
        s.curve,
        s.height * s.width if s.curve else 0,
    )


def cases(device: str) -> list[Case]:
    return [
        make_case(s, dtype, backward, device, s.targets[2 * backward + (dtype == torch.bfloat16)])
        for s in SHAPES
        for backward in ((False,) if s.cached or s.curve else (False, True))
        for dtype in (torch.float32, torch.bfloat16)
    ]
