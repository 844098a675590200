"""Whole models: unpatched and patched, as they are and compiled, with random weights.

A row named after a model races the patched model against the unpatched one and the unpatched one
compiled; "compiled" in its layout column races the patched and compiled model against the same two.
All are of the row's dtype. Where a single call would take minutes, because torch has no quick
product of that dtype on this machine, the row is left out and says so.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import vitkit
from vitkit._checks import name_of
from vitkit.models import create
from vitkit.models.longnet import FeedForward
from vitkit.nn import DilatedAttention
from vitkit.verify import longest_sum

from ..harness import LONGEST_CALL, Case, LeftOut, Outputs, Provider, compiled
from ..timing import Clock
from .dilated_attention import gathered

OP = "models"
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class Model(NamedTuple):
    """``make()`` returns the model and the inputs of a call; targets: fp32, bf16. ``rival`` turns a
    model that needs no patching, one of vitkit's own, into what it is raced against. ``leaves``:
    something replaceable is left, with a reason."""

    name: str
    shape: str
    make: Callable[[], tuple[torch.nn.Module, Inputs]]
    targets: tuple[float | None, float | None]
    sets: tuple[str, ...] = ("full",)
    rival: Callable[[torch.nn.Module], None] | None = None
    leaves: bool = False


def _timm(name: str, batch: int, size: int = 224, **options: Any) -> Callable[[], Any]:
    def make() -> tuple[torch.nn.Module, Inputs]:
        import timm

        model = timm.create_model(name, pretrained=False, num_classes=0, **options)
        return model, ((torch.randn(batch, 3, size, size),), {})

    return make


def _vae_decoder() -> tuple[torch.nn.Module, Inputs]:
    from diffusers import AutoencoderKL

    widths = (128, 256, 512, 512)
    model = AutoencoderKL(
        block_out_channels=widths, layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).decoder.to(memory_format=torch.channels_last)  # fmt: skip
    return model, ((torch.randn(1, 4, 64, 64),), {})


def _ddpm() -> tuple[torch.nn.Module, Inputs]:
    """google/ddpm-cifar10-32"""
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=32, block_out_channels=(128, 256, 256, 256), layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6,
        attention_head_dim=None,
    )  # fmt: skip
    return model, ((torch.randn(4, 3, 32, 32), torch.tensor(500)), {"return_dict": False})


def _sd15() -> tuple[torch.nn.Module, Inputs]:
    """The U-Net of Stable Diffusion 1.5, 256 pixels, with and without guidance."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    options = {"encoder_hidden_states": torch.randn(2, 77, 768), "return_dict": False}
    return model, ((torch.randn(2, 4, 32, 32), torch.tensor(500)), options)


class _Gathering(DilatedAttention):
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return gathered(q, k, v)


def _as_published(model: torch.nn.Module) -> None:
    """Dilated attention by gathering, all tokens at once, everything else by torch."""
    for module in model.modules():
        module.__dict__["vitkit_backend"] = "reference"
        if isinstance(module, DilatedAttention):
            module.__class__ = _Gathering
        if isinstance(module, FeedForward):
            module.tokens = sys.maxsize


def _gigapath() -> tuple[torch.nn.Module, Inputs]:
    model = create("gigapath_slide", depth=1)
    return model, (model.example_inputs(batch=1), {})  # type: ignore[operator]


MODELS = [
    Model("ViT-B/16", "8x3x224x224", _timm("vit_base_patch16_224", 8), (1.05, 1.15)),
    Model("Swin-T", "4x3x224x224", _timm("swin_tiny_patch4_window7_224", 4), (1.2, 1.5)),
    Model("SwinV2-T", "4x3x256x256", _timm("swinv2_tiny_window8_256", 4, 256), (1.25, 1.5)),
    Model(
        "SigLIP so400m, 6 blocks", "2x3x224x224",
        _timm("vit_so400m_patch14_siglip_224", 2, depth=6), (1.0, 1.1),
    ),
    Model("DDPM U-Net CIFAR-10", "4x3x32x32", _ddpm, (1.05, 1.25)),
    # Its one attention has a head of 512.
    Model("KL-VAE decode 512px", "1x4x64x64", _vae_decoder, (1.05, 1.2), leaves=True),
    Model("SD1.5 U-Net 256px", "2x4x32x32", _sd15, (1.0, 1.1)),
    Model(
        "GigaPath slide encoder, 1 layer", "1x10000x1536", _gigapath, (1.3, 1.5),
        rival=_as_published,
    ),
]  # fmt: skip


def _cast(values: Any, dtype: torch.dtype, device: str) -> Any:
    def one(t: Any) -> Any:
        if not isinstance(t, torch.Tensor):
            return t
        return t.to(device, dtype if t.is_floating_point() else t.dtype)

    return torch.utils._pytree.tree_map(one, values)


def _first(outputs: Any) -> list[torch.Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor)]


@cache
def _rates(dtype: torch.dtype, device: str) -> dict[str, float]:
    """FLOP/s of torch's products and convolutions of that dtype, of a middling size."""
    a = torch.randn(1024, 1024, device=device).to(dtype)
    x = torch.randn(1, 128, 32, 32, device=device).to(dtype)
    w = torch.randn(128, 128, 3, 3, device=device).to(dtype)
    clock = Clock(device)

    def seconds(call: Callable[[], Any]) -> float:
        return min(clock.sample(call) for _ in range(3))

    return {
        "multiplies": 2 * 1024**3 / seconds(lambda: F.linear(a, a)),
        "convolves": 2 * 9 * 128**2 * 32**2 / seconds(lambda: F.conv2d(x, w, padding=1)),
    }


def _refuse_long(counter: FlopCounterMode, dtype: torch.dtype, device: str) -> None:
    """Raises LeftOut if a call takes longer than LONGEST_CALL at torch's rates."""
    rates = _rates(dtype, device)
    flops = dict.fromkeys(rates, 0.0)
    for op, count in counter.get_flop_counts()["Global"].items():
        flops["convolves" if "convolution" in str(op) else "multiplies"] += count
    spent = {kind: flops[kind] / rate for kind, rate in rates.items()}
    if sum(spent.values()) > LONGEST_CALL:
        kind = max(spent, key=spent.__getitem__)
        raise LeftOut(
            f"a call takes about {sum(spent.values()):.0f} s: torch {kind}"
            f" {name_of(dtype)} at {rates[kind] / 1e9:.1f} GFLOP/s here"
        )


def _least_flops(counter: FlopCounterMode) -> float:
    """What a call has to multiply: convolutions of 3 x 3 by minimal filtering 4 / 9 of their sums
    as they are written, which is taken for all convolutions."""
    counts = counter.get_flop_counts()["Global"].items()
    return sum(count * (4 / 9 if "conv" in str(op) else 1.0) for op, count in counts)


def make_case(model: Model, dtype: torch.dtype, device: str, compile_ours: bool) -> Case:
    """One case; the model is made when it is measured."""

    def make() -> tuple[list[Provider], Callable[[], Outputs]]:
        torch.manual_seed(0)
        made, inputs = model.make()
        made = made.to(device).eval().requires_grad_(False)
        args, kwargs = _cast(inputs, torch.float32, device)
        case.terms = longest_sum(made)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            made(*args, **kwargs)
        case.flops = _least_flops(counter)
        _refuse_long(counter, dtype, device)
        ours = made.to(dtype)
        args, kwargs = _cast(inputs, dtype, device)
        # The same parameters: a second copy of a U-Net may not fit.
        plain = copy.deepcopy(ours, {id(t): t for t in [*ours.parameters(), *ours.buffers()]})
        if model.rival is None:
            vitkit.patch(ours, strict=not model.leaves)
        else:
            model.rival(plain)
        case.bytes = float(sum(p.nbytes for p in plain.parameters()))

        def bind(function: Callable[..., Any]) -> Any:
            def call() -> Outputs:
                with torch.no_grad():
                    return _first(function(*args, **kwargs))

            return call

        def exact() -> Outputs:
            double = copy.deepcopy(plain).double()
            wide_args, wide_kwargs = _cast((args, kwargs), torch.float64, device)
            with torch.no_grad():
                return _first(double(*wide_args, **wide_kwargs))

        patched = torch.compile(ours) if compile_ours else ours
        return [
            Provider("vitkit", bind(patched), ours=True),
            Provider("eager", bind(plain)),
            *(Provider(n, bind(f)) for n, f in compiled(plain).items()),
        ], exact

    case = Case(
        OP,
        model.name,
        "forward",
        dtype,
        "compiled" if compile_ours else "as it is",
        model.shape,
        make,
        0.0,
        0.0,
        1,
        None if compile_ours else model.targets[int(dtype == torch.bfloat16)],
        model.sets,
    )
    return case


def cases(device: str) -> list[Case]:
    return [
        make_case(model, dtype, device, compile_ours)
        for model in MODELS
        for dtype in (torch.float32, torch.bfloat16)
        for compile_ours in (False, True)
    ]
