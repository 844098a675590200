"""What a ViT looks at, asked of it unpatched and patched: the same answer, sooner.

    python -m vitkit.demo.explain docs/explainability.svg        (pip install 'vitkit[explain]')

trains a small timm ViT on handwritten digits, so that the answers mean something, and explains one
prediction by LIME, SHAP, occlusion, gradient times input and attention rollout.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import vitkit
from vitkit import _drawing
from vitkit._numerics import Parity, parity
from vitkit.benchmarks.convergence import digits, start
from vitkit.demo.rollout import AttentionCalls, rollout
from vitkit.verify import longest_sum

SIZE, PATCH, TILE = 48, 4, 6  # pixels; 8 x 8 tiles are what LIME and SHAP switch off
HELD_OUT, BATCH = 297, 128
SAMPLES = 500
BACKGROUND = -1.0

Attribution = Callable[[torch.nn.Module, torch.Tensor, int], torch.Tensor]


def small_vit(width: int = 96, depth: int = 3, size: int = SIZE) -> torch.nn.Module:
    """timm's VisionTransformer on [B, 1, size, size], with weights a few dozen steps can move."""
    from timm.models import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=size, patch_size=PATCH, in_chans=1, num_classes=10,
        embed_dim=width, depth=depth, num_heads=width // 32,
    )  # fmt: skip
    start(model)
    return model


def trained(model: torch.nn.Module, steps: int) -> tuple[torch.nn.Module, float]:
    """The model after ``steps`` steps of AdamW on digits, patched meanwhile, and its accuracy on
    digits it did not see."""
    images, classes = digits()
    images = F.interpolate(images.float(), size=SIZE, mode="bilinear")
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with vitkit.patched(model):
        for _ in range(steps):
            chosen = torch.randint(len(images) - HELD_OUT, (32,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), classes[chosen]).backward()
            optimizer.step()
        found = probabilities(model.eval(), images[-HELD_OUT:]).argmax(1)
    return model, (found == classes[-HELD_OUT:]).float().mean().item()


def probabilities(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(part).softmax(1) for part in images.split(BATCH)])


def tiles(size: int) -> torch.Tensor:
    """[size, size]: the number of the tile of every pixel."""
    index = torch.arange(size) // TILE
    return index[:, None] * (int(index[-1]) + 1) + index


def _dtype(model: torch.nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def lime(model: torch.nn.Module, image: torch.Tensor, label: int) -> torch.Tensor:
    """LIME's weights of tiles, of the package ``lime``: [size, size]."""
    from lime.lime_image import LimeImageExplainer

    segments = tiles(image.shape[-1]).numpy()

    def classify(images: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(images[..., 0])[:, None].to(_dtype(model))
        return probabilities(model, x).double().numpy()

    found = LimeImageExplainer(random_state=0).explain_instance(
        image[0].numpy().astype(np.float64)[..., None].repeat(3, 2), classify, labels=(label,),
        top_labels=None, hide_color=BACKGROUND, num_samples=SAMPLES, batch_size=BATCH,
        num_features=segments.max() + 1, segmentation_fn=lambda _: segments, random_seed=0,
    )  # fmt: skip
    weights = np.zeros(segments.max() + 1)
    for tile, weight in found.local_exp[label]:
        weights[tile] = weight
    return torch.from_numpy(weights[segments])


def shap(model: torch.nn.Module, image: torch.Tensor, label: int) -> torch.Tensor:
    """SHAP's values of tiles, of the package ``shap`` (KernelExplainer): [size, size]."""
    from shap import KernelExplainer

    segments = tiles(image.shape[-1])
    x = image.to(_dtype(model))

    def classify(switched_on: np.ndarray) -> np.ndarray:
        on = torch.from_numpy(switched_on).bool()[:, segments][:, None]
        return probabilities(model, torch.where(on, x, BACKGROUND))[:, label].double().numpy()

    count = int(segments.max()) + 1
    explainer = KernelExplainer(classify, np.zeros((1, count)))
    np.random.seed(0)  # it draws from numpy's global generator
    values = explainer.shap_values(
        np.ones((1, count)), nsamples=SAMPLES, l1_reg=False, silent=True, gc_collect=False
    )
    return torch.from_numpy(np.asarray(values)[0])[segments]


def occlusion(model: torch.nn.Module, image: torch.Tensor, label: int) -> torch.Tensor:
    """What the probability loses when a tile is wiped out: [size, size]."""
    segments = tiles(image.shape[-1])
    x = image.to(_dtype(model))
    wiped = torch.stack(
        [x.where(segments != t, BACKGROUND) for t in range(int(segments.max()) + 1)]
    )
    p = probabilities(model, torch.cat([x[None], wiped]))[:, label]
    return (p[0] - p[1:])[segments]


def gradient_input(model: torch.nn.Module, image: torch.Tensor, label: int) -> torch.Tensor:
    """Gradient of the logit times the distance from the background: [size, size]."""
    x = image[None].to(_dtype(model)).requires_grad_()
    (gradient,) = torch.autograd.grad(model(x)[0, label], x)
    return (gradient * (x - BACKGROUND)).detach()[0, 0]


def attention_rollout(model: torch.nn.Module, image: torch.Tensor, label: int) -> torch.Tensor:
    """What the class token attends through all layers, by patch: [size, size]. From the kernels'
    queries and keys where they run, otherwise as it is usually done: from every layer's matrix."""
    x = image[None].to(_dtype(model))
    with torch.no_grad():
        if vitkit.is_patched(model):
            with AttentionCalls() as seen:
                model(x)
            row = rollout(seen.calls)[0]
        else:
            row = _rollout_of_matrices(model, x)
    side = image.shape[-1] // PATCH
    return row[1:].view(side, side).repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)


def _rollout_of_matrices(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "fused_attn")]
    matrices: list[torch.Tensor] = []
    fused = [m.fused_attn for m in layers]
    handles = [
        m.attn_drop.register_forward_pre_hook(lambda _, args: matrices.append(args[0].mean(1)))
        for m in layers
    ]
    try:
        for m in layers:
            m.fused_attn = False  # the matrix exists on this path only
        model(x)
    finally:
        for m, before, handle in zip(layers, fused, handles, strict=True):
            m.fused_attn = before
            handle.remove()
    one = torch.eye(matrices[0].shape[-1], dtype=x.dtype)
    product = one
    for a in matrices:
        product = (a[0] + one) / 2 @ product
    return product[0]


METHODS: dict[str, Attribution] = {
    "LIME": lime,
    "SHAP": shap,
    "occlusion": occlusion,
    "gradient x input": gradient_input,
    "attention rollout": attention_rollout,
}


@dataclass(frozen=True)
class Comparison:
    """One explanation of an unpatched and a patched model.

    Attributes:
        parity: errors of the patched one against that of the model in float64, by the project's
            rule; its yardstick is the unpatched one.
        speedup: median over rounds of unpatched over patched time.
    """

    name: str
    unpatched: torch.Tensor
    patched: torch.Tensor
    parity: Parity
    seconds_before: float
    seconds_after: float
    speedup: float


def compare(
    name: str, model: torch.nn.Module, image: torch.Tensor, label: int, rounds: int = 3
) -> Comparison:
    """Explains one prediction with ``METHODS[name]``, unpatched and patched in turns."""
    method = METHODS[name]

    def timed() -> tuple[torch.Tensor, float]:
        begun = time.perf_counter()
        found = method(model, image, label)
        return found, time.perf_counter() - begun

    exact = method(copy.deepcopy(model).double(), image, label)
    before, after = [], []
    for _ in range(rounds):
        unpatched, seconds = timed()
        before.append(seconds)
        with vitkit.patched(model):
            patched, seconds = timed()
        after.append(seconds)
    found = parity(patched, unpatched, exact, dtype=torch.float32, terms=longest_sum(model))
    ratio = statistics.median(b / a for b, a in zip(before, after, strict=True))
    times = statistics.median(before), statistics.median(after)
    return Comparison(name, unpatched, patched, found, *times, ratio)


def draw(image: torch.Tensor, found: list[Comparison]) -> str:
    """SVG: the image, then a column for each explanation, unpatched above and patched below."""
    drawn, axes = _drawing.figure(2.0 * (len(found) + 1), 4.6, len(found) + 1, 2)
    for a in axes:
        a.set(xticks=[], yticks=[])
        for spine in a.spines.values():
            spine.set_visible(False)
    axes[0].imshow(image[0].numpy(), cmap="gray")
    axes[0].set_title("image")
    for column, c in enumerate(found, 1):
        limit = max(c.unpatched.abs().max().item(), 1e-12)
        for row, values in enumerate((c.unpatched, c.patched)):
            a = axes[column + row * (len(found) + 1)]
            a.imshow(values.double().numpy(), cmap="PuOr", vmin=-limit, vmax=limit)
        axes[column].set_title(c.name)
        below = axes[column + len(found) + 1]
        below.set_xlabel(f"{c.speedup:.2f}x as fast\nerror {c.parity.relative:.0e}")
    axes[1].set_ylabel("unpatched")
    axes[len(found) + 2].set_ylabel("patched")
    return _drawing.svg(drawn, "explanations of an unpatched and a patched model are the same")


def main(path: Path, steps: int = 120) -> int:
    model, accuracy = trained(small_vit(), steps)
    images, classes = digits()
    image = F.interpolate(images[-1:].float(), size=SIZE, mode="bilinear")[0]
    p = probabilities(model, image[None])[0]
    label = int(p.argmax())
    print(
        f"ViT of {steps} steps on digits, {accuracy:.0%} of {HELD_OUT} unseen ones right;"
        f" explained: a {int(classes[-1])}, taken for a {label} with p = {p[label]:.2f}"
    )
    found = []
    for name in METHODS:
        c = compare(name, model, image, label, rounds=3 if name in ("LIME", "SHAP") else 25)
        found.append(c)
        print(
            f"{name:>18}: {c.seconds_before * 1e3:8.1f} ms -> {c.seconds_after * 1e3:8.1f} ms,"
            f" {c.speedup:.2f}x; {c.parity}",
            flush=True,
        )
    path.write_text(_drawing.standalone(draw(image, found)))
    return 0 if all(c.parity.ok for c in found) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
