"""Training with and without patches: small models on handwritten digits, from one seed.

``python -m vitkit.benchmarks.convergence docs/convergence.svg`` draws the curves. The images are
the 1,797 digits of 8 x 8 pixels that scikit-learn ships (Alpaydin and Kaynak, 1998).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import vitkit
from vitkit import _drawing
from vitkit._drawing import AFTER, BEFORE, INK

STEPS, BATCH, RATE = 30, 32, 1e-3


@dataclass(frozen=True)
class Task:
    """A model on images of one size, and its loss on a batch."""

    name: str
    size: int
    make: Callable[[], torch.nn.Module]
    loss: Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


def _vit() -> torch.nn.Module:
    from timm.models import VisionTransformer

    return VisionTransformer(
        img_size=16, patch_size=4, in_chans=1, num_classes=10, embed_dim=48, depth=2, num_heads=3
    )


def _swin() -> torch.nn.Module:
    from timm.models import SwinTransformer

    return SwinTransformer(
        img_size=16, patch_size=2, in_chans=1, num_classes=10, embed_dim=16, depths=(2, 2),
        num_heads=(1, 2), window_size=4, drop_path_rate=0.0,
    )  # fmt: skip


def _unet() -> torch.nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=16, in_channels=1, out_channels=1, layers_per_block=1,
        block_out_channels=(32, 32), norm_num_groups=8, attention_head_dim=16,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def _classify(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y)


def _denoise(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """One noise level per digit class, so that a batch holds many."""
    generator = torch.Generator().manual_seed(int(y.sum()))
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
    level = (y.to(x.dtype) + 1)[:, None, None, None] / 11
    noisy = (1 - level).sqrt() * x + level.sqrt() * noise
    return F.mse_loss(model(noisy, 100 * y).sample, noise)


TASKS = (
    Task("ViT", 16, _vit, _classify),
    Task("Swin", 16, _swin, _classify),
    Task("U-Net", 16, _unet, _denoise),
)


def digits(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[1797, 1, size, size] in -1..1, and their classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images)[:, None] / 8 - 1
    return F.interpolate(images, size=size, mode="bilinear"), torch.from_numpy(data.target).long()


def train(task: Task, dtype: torch.dtype, patched: bool) -> torch.Tensor:
    """Losses of ``STEPS`` steps of AdamW, float64, from one seed."""
    torch.manual_seed(0)
    model = task.make().to(dtype)
    images, classes = digits(task.size)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    images, classes = images[order].to(dtype), classes[order]
    if patched:
        vitkit.patch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    losses = []
    for step in range(STEPS):
        at = slice(step * BATCH, (step + 1) * BATCH)
        loss = task.loss(model, images[at], classes[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def draw(curves: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> str:
    """SVG of (unpatched, patched) losses by task."""
    drawn, axes = _drawing.figure(9.0, 2.6, len(curves))
    for a, (name, (before, after)) in zip(axes, curves.items(), strict=True):
        a.plot(before, color=BEFORE, linewidth=4, label="unpatched")
        a.plot(after, color=AFTER, linewidth=1.5, label="patched")
        a.set(title=name, xlabel="step")
    axes[0].set_ylabel("loss")
    axes[0].legend(frameon=False, labelcolor=INK)
    return _drawing.svg(drawn, "losses of patched and unpatched models lie on each other")


def main(path: Path) -> int:
    pairs: dict[str, Any] = {
        t.name: (train(t, torch.float32, False), train(t, torch.float32, True)) for t in TASKS
    }
    path.write_text(_drawing.standalone(draw(pairs)))
    for name, (before, after) in pairs.items():
        print(f"{name}: loss {before[0]:.3f} -> {before[-1]:.3f}, patched {after[-1]:.3f}, largest"
              f" difference {(before - after).abs().max():.1e}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
