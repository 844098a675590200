"""The models of the demo."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class DemoModel:
    """One row of the demo: ``make()`` returns a model and the inputs of one call."""

    name: str
    make: Callable[[], tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]]


def photograph(path: Path | None, size: int, mean: float = 0.5, std: float = 0.5) -> torch.Tensor:
    """[1, 3, size, size]: the centre of a photograph, normalised. Without a path, the portrait of
    Grace Hopper (public domain) that ships with matplotlib."""
    import numpy as np
    from PIL import Image

    with Image.open(path or default_photograph()) as opened:
        image = opened.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 4
    image = image.crop((left, top, left + side, top + side)).resize((size, size))
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
    return ((pixels - mean) / std)[None]


def default_photograph() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"


def demo_models(image: Path | None, pretrained: bool, quick: bool) -> list[DemoModel]:
    """timm ViT-B/16, Swin-T and SigLIP so400m (head dim 72), a KL-VAE decoder, a text-conditioned
    U-Net."""

    def vit():
        import timm

        model = timm.create_model("vit_base_patch16_224", pretrained=pretrained)
        batch = 1 if quick else 4
        return model, (photograph(image, 224).expand(batch, -1, -1, -1).contiguous(),), {}

    def swin():
        import timm

        model = timm.create_model("swin_tiny_patch4_window7_224", pretrained=pretrained)
        batch = 1 if quick else 4
        return model, (photograph(image, 224).expand(batch, -1, -1, -1).contiguous(),), {}

    def siglip():
        import timm

        blocks: dict[str, Any] = {} if pretrained else {"depth": 2 if quick else 4}
        name = "vit_so400m_patch14_siglip_224"
        model = timm.create_model(name, pretrained=pretrained, num_classes=0, **blocks)
        batch = 1 if quick else 2
        return model, (photograph(image, 224).expand(batch, -1, -1, -1).contiguous(),), {}

    def vae():
        model = _autoencoder(pretrained, quick)
        with torch.no_grad():
            latent = model.encode(photograph(image, 64 if quick else 128)).latent_dist.mean
        return model.decoder, (latent,), {}

    def unet():
        torch.manual_seed(0)
        model, width = _unet(pretrained, quick)
        latent = torch.nn.functional.interpolate(photograph(image, 32), size=32)
        latent = torch.cat([latent, latent.mean(1, keepdim=True)], 1).expand(2, -1, -1, -1)
        text = torch.randn(2, 77, width)
        options = {"encoder_hidden_states": text, "return_dict": False}
        return model, (latent.contiguous(), torch.tensor(500)), options

    shortened = "" if pretrained else f", {2 if quick else 4} blocks"
    logging.getLogger("diffusers").setLevel(logging.ERROR)  # remarks on dtype casts
    return [
        DemoModel("ViT-B/16", vit),
        DemoModel("Swin-T", swin),
        DemoModel(f"SigLIP so400m{shortened}", siglip),
        DemoModel("KL-VAE decode", vae),
        DemoModel("U-Net, one step", unet),
    ]


def _autoencoder(pretrained: bool, quick: bool) -> Any:
    from diffusers import AutoencoderKL

    if pretrained:
        return AutoencoderKL.from_pretrained("stabilityai/sd-vae-ft-mse")
    widths = (64, 128, 128) if quick else (128, 256, 512, 512)
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1 if quick else 2,
        latent_channels=4,
    )


def _unet(pretrained: bool, quick: bool) -> tuple[Any, int]:
    from diffusers import UNet2DConditionModel

    if pretrained:
        name = "stable-diffusion-v1-5/stable-diffusion-v1-5"
        return UNet2DConditionModel.from_pretrained(name, subfolder="unet"), 768
    widths = (64, 128, 128) if quick else (160, 320, 320)
    down = ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",)
    up = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2
    model = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=widths,
        layers_per_block=1,
        cross_attention_dim=256,
        attention_head_dim=8 if not quick else 4,
        down_block_types=down,
        up_block_types=up,
    )
    return model, 256
