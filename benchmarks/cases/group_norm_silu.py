"""Shapes of group_norm_silu: U-Net and KL-VAE feature maps, 32 groups, with weight and bias."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

import vitkit

from ..harness import Case, Outputs, Provider, compiled

OP = "group_norm_silu"
GROUPS = 32

# (model, shape, targets of (fp32, bf16) forward NCHW, channels_last, forward+backward), sets)
SHAPES: list[tuple[str, tuple[int, ...], tuple[float | None, ...], tuple[str, ...]]] = [
    ("SD1.5 U-Net 64px", (2, 320, 64, 64), (2.2, 2.5, 1.7, 1.5), ("smoke", "fast", "full")),
    ("SD1.5 U-Net 16px", (2, 1280, 16, 16), (1.8, 2.5, 1.7, 1.5), ("fast forward", "full")),
    ("SD1.5 U-Net 32px", (2, 640, 32, 32), (None, None, None, None), ("full",)),
    ("SD1.5 U-Net 8px", (2, 2560, 8, 8), (None, None, None, None), ("full",)),
    ("KL-VAE 512px", (1, 128, 512, 512), (1.8, 2.5, None, 1.5), ("full",)),
    ("KL-VAE mid block", (1, 512, 64, 64), (None, None, None, None), ("full",)),
]


def _eager(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int) -> torch.Tensor:
    return F.silu(F.group_norm(x, groups, weight, bias))


def _eager_inplace(x, weight, bias, groups):
    return F.silu(F.group_norm(x, groups, weight, bias), inplace=True)


def _optional_gpu_rivals(channels: int, groups: int) -> dict[str, Callable[..., torch.Tensor]]:
    """apex's channels_last kernel, where it is installed and loads."""
    try:
        from apex.contrib.group_norm import GroupNorm
    except (ImportError, OSError):
        return {}
    module = GroupNorm(groups, channels, act="silu").cuda()

    def call(x, weight, bias, groups):
        return torch.func.functional_call(module, {"weight": weight, "bias": bias}, (x,))

    return {"apex": call}


def make_case(
    name: str,
    shape: tuple[int, ...],
    groups: int,
    dtype: torch.dtype,
    channels_last: bool,
    backward: bool,
    device: str,
    target: float | None = None,
    sets: tuple[str, ...] = ("full",),
    backend: str = "auto",
) -> Case:
    """One case; tensors are made when it is measured."""

    def make() -> tuple[list[Provider], Callable[[], Outputs]]:
        torch.manual_seed(0)
        x, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        if channels_last:
            x, grad = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, grad))
        weight, bias = (torch.randn(shape[1], device=device).to(dtype) for _ in range(2))

        def bind(
            function: Callable[..., torch.Tensor], double: bool = False
        ) -> Callable[[], Outputs]:
            given = [t.double() if double else t for t in (x, weight, bias)]
            if not backward:
                return lambda: [function(*given, groups)]
            leaves = [t.detach().requires_grad_() for t in given]
            cotangent = grad.double() if double else grad

            def call() -> Outputs:
                y = function(*leaves, groups)
                return [y.detach(), *torch.autograd.grad(y, leaves, cotangent)]

            return call

        def ours(x, weight, bias, groups):
            return vitkit.group_norm_silu(x, groups, weight, bias, backend=backend)

        providers = [
            Provider("vitkit", bind(ours), ours=True),
            Provider("eager", bind(_eager)),
            Provider("eager, silu in place", bind(_eager_inplace)),
            *(Provider(n, bind(f)) for n, f in compiled(_eager).items()),
        ]
        if device == "cuda" and channels_last:
            optional = _optional_gpu_rivals(shape[1], groups)
            providers += [Provider(n, bind(f)) for n, f in optional.items()]
        return providers, bind(_eager, double=True)

    elements = torch.Size(shape).numel()
    return Case(
        OP,
        name,
        "forward+backward" if backward else "forward",
        dtype,
        "NHWC" if channels_last else "NCHW",
        "x".join(map(str, shape)) + (f" groups {groups}" if groups != GROUPS else ""),
        make,
        12.0 * elements * (3 if backward else 1),
        2.0 * elements * dtype.itemsize * (2.5 if backward else 1),
        elements // shape[1] * (1 if backward else shape[1] // groups),
        target,
        sets,
    )


def cases(device: str) -> list[Case]:
    found = []
    for name, shape, targets, sets in SHAPES:
        for backward in (False, True):
            for channels_last in (False, True):
                for dtype in (torch.float32, torch.bfloat16):
                    index = 3 if backward else 2 if channels_last else int(dtype == torch.bfloat16)
                    target = targets[index]
                    found.append(
                        make_case(
                            name,
                            shape,
                            GROUPS,
                            dtype,
                            channels_last,
                            backward,
                            device,
                            target,
                            sets,
                        )
                    )
    return found
