"""Training with and without patches: small models on handwritten digits, from one seed.

``python -m vitkit.benchmarks.convergence docs/convergence.svg`` trains and draws. The images are
the 1,797 digits of 8 x 8 pixels that scikit-learn ships (Alpaydin and Kaynak, 1998).

Plain SGD with momentum, because Adam divides a gradient by its own size: a kernel whose gradient is
1 % too large would train to the same curve. How far two correct runs may lie apart is measured, not
assumed: ``train(..., jitter=1)`` moves every pixel and every weight by one rounding before every
step.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import vitkit
from vitkit import _drawing
from vitkit._drawing import AFTER, BAD, BEFORE, INK, LINE

STEPS, RATE, MOMENTUM, SIZE = 30, 0.05, 0.9, 8
FAULT = 1.01


@dataclass(frozen=True)
class Task:
    """A model of a host library, the images of one step, and the loss on them: of (model, images,
    classes, generator)."""

    name: str
    make: Callable[[], torch.nn.Module]
    batch: int
    loss: Callable[..., torch.Tensor]


def _vit() -> torch.nn.Module:
    from timm.models import VisionTransformer

    return VisionTransformer(
        img_size=SIZE, patch_size=2, in_chans=1, num_classes=10, embed_dim=48, depth=2, num_heads=3
    )


def _swin() -> torch.nn.Module:
    """4 x 4 tokens in windows of 2, shifted in every other block."""
    from timm.models import SwinTransformer

    return SwinTransformer(
        img_size=SIZE, patch_size=2, in_chans=1, num_classes=10, embed_dim=32, depths=(2, 2),
        num_heads=(4, 4), window_size=2, drop_path_rate=0.0,
    )  # fmt: skip


def _unet() -> torch.nn.Module:
    from diffusers import UNet2DModel

    logging.getLogger("diffusers").setLevel(logging.ERROR)  # remarks on dtype casts
    return UNet2DModel(
        sample_size=SIZE, in_channels=1, out_channels=1, layers_per_block=1,
        block_out_channels=(16, 32), norm_num_groups=8, attention_head_dim=16,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def _classify(model, x, y, generator) -> torch.Tensor:
    return F.cross_entropy(model(x), y)


def _denoise(model, x, y, generator) -> torch.Tensor:
    """Mean squared error of the predicted noise, a noise level per image."""
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
    level = torch.rand(len(x), 1, 1, 1, generator=generator, dtype=torch.float64).to(x.dtype)
    noisy = (1 - level).sqrt() * x + level.sqrt() * noise
    return F.mse_loss(model(noisy, 1000 * level.flatten()).sample, noise)


TASKS = (
    Task("ViT", _vit, 64, _classify),
    Task("Swin", _swin, 32, _classify),
    Task("U-Net", _unet, 16, _denoise),
)


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """[1797, 1, 8, 8] in -1..1 in float64, and their classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images)[:, None] / 8 - 1
    return images, torch.from_numpy(data.target).long()


def start(model: torch.nn.Module) -> None:
    """Weights for narrow models: the hosts' standard deviation of 0.02 suits widths of hundreds,
    at 48 nothing is learnt in 30 steps."""
    for name, p in model.named_parameters():
        if "pos" in name.rpartition(".")[2]:
            torch.nn.init.normal_(p, std=0.5)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)


class ScaledGradient(TorchDispatchMode):
    """A fault: while entered, all that the backward kernel ``op`` returns is 1 % too large."""

    def __init__(self, op: str | None) -> None:
        super().__init__()
        self.op = op

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace != "vitkit" or func._schema.name != f"vitkit::{self.op}":
            return out
        grads = out if isinstance(out, tuple | list) else (out,)
        scaled = tuple(FAULT * g if isinstance(g, torch.Tensor) else g for g in grads)
        return scaled if isinstance(out, tuple | list) else scaled[0]


def _one_rounding_off(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    sign = 2 * torch.randint(0, 2, x.shape, generator=generator) - 1
    return x * (1 + torch.finfo(torch.float32).eps * sign).to(x.dtype)


def train(
    task: Task,
    dtype: torch.dtype = torch.float32,
    *,
    backend: str | None = None,
    steps: int = STEPS,
    jitter: int = 0,
    fault: str | None = None,
) -> torch.Tensor:
    """Losses of ``steps`` steps, [steps] in float64, always from the same weights and batches.

    Args:
        backend: of the patched model; None trains it unpatched.
        jitter: a seed other than 0 moves pixels and weights by one rounding before every step.
        fault: a backward op whose results are made 1 % too large.
    """
    torch.manual_seed(0)
    model = task.make()
    start(model)
    model = model.to(dtype)
    images, classes = digits()
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(len(images), generator=generator)
    off = torch.Generator().manual_seed(jitter)
    if backend is not None:
        vitkit.patch(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    losses = []
    with ScaledGradient(fault):
        for step in range(steps):
            chosen = order[torch.arange(step * task.batch, (step + 1) * task.batch) % len(order)]
            x = images[chosen].to(dtype)
            if jitter:
                x = _one_rounding_off(x, off)
                with torch.no_grad():
                    for p in model.parameters():
                        p.copy_(_one_rounding_off(p, off))
            loss = task.loss(model, x, classes[chosen], generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


@dataclass(frozen=True)
class Curves:
    """Losses of one task, [steps] each; ``exact`` is the unpatched model in float64."""

    exact: torch.Tensor
    unpatched: torch.Tensor
    jittered: torch.Tensor
    patched: torch.Tensor
    faulty: torch.Tensor


def curves(task: Task, fault: str, backend: str = "auto") -> Curves:
    return Curves(
        exact=train(task, torch.float64),
        unpatched=train(task),
        jittered=train(task, jitter=1),
        patched=train(task, backend=backend),
        faulty=train(task, backend=backend, fault=fault),
    )


def draw(found: dict[str, Curves]) -> str:
    """SVG: losses above, their distances from the float64 run below."""
    drawn, axes = _drawing.figure(9.0, 4.6, len(found), 2)
    for column, (name, c) in enumerate(found.items()):
        above, below = axes[column], axes[column + len(found)]
        above.plot(c.unpatched, color=BEFORE, linewidth=5, label="unpatched")
        above.plot(c.patched, color=AFTER, linewidth=1.5, label="patched")
        above.set_title(name)
        lines = (
            (c.faulty, BAD, "-", "patched, one gradient 1 % too large"),
            (c.jittered, LINE, "-", "unpatched, all weights off by one rounding"),
            (c.unpatched, BEFORE, "-", "unpatched"),
            (c.patched, AFTER, "--", "patched"),
        )
        for losses, colour, dash, label in lines:
            apart = (losses - c.exact).abs().clamp(min=1e-10)
            below.semilogy(apart, dash, color=colour, label=label)
        below.set(xlabel="step", ylim=(1e-10, 1))
    axes[0].set_ylabel("loss")
    axes[len(found)].set_ylabel("distance from float64")
    axes[0].legend(frameon=False, labelcolor=INK)
    handles, labels = axes[-1].get_legend_handles_labels()
    drawn.legend(
        handles, labels, loc="outside lower center", ncols=2, frameon=False, labelcolor=INK
    )
    label = "losses of patched and unpatched models lie on each other; their distances below"
    return _drawing.svg(drawn, label)


FAULTS = {
    "ViT": "flash_attention_bwd",
    "Swin": "window_attention_bwd",
    "U-Net": "group_norm_silu_bwd",
}


def main(path: Path) -> int:
    torch.set_num_threads(1)  # the models are too small to share
    found = {task.name: curves(task, FAULTS[task.name]) for task in TASKS}
    path.write_text(_drawing.standalone(draw(found)))
    for name, c in found.items():
        apart = {
            "unpatched": c.unpatched, "patched": c.patched, "jittered": c.jittered,
            f"{FAULTS[name]} x {FAULT}": c.faulty,
        }  # fmt: skip
        distances = ", ".join(f"{k} {(v - c.exact).abs().max():.1e}" for k, v in apart.items())
        print(f"{name}: loss {c.unpatched[0]:.3f} -> {c.unpatched[-3:].mean():.3f} (patched"
              f" {c.patched[-3:].mean():.3f}); furthest from float64: {distances}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
