"""Swin Transformer V1 (Liu et al. 2021), V2 (Liu et al. 2022) and CTransPath (Wang et al. 2022) in
timm's parameter layout. Nothing is rolled, partitioned or padded in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from vitkit.models.layers import ImageModel, init_weights
from vitkit.models.registry import Entry, Family
from vitkit.nn import Conv2d, LayerNorm, Linear, Mlp, PatchEmbed, WindowAttention, WindowAttentionV2

EPS = 1e-5


@dataclass(frozen=True)
class SwinConfig:
    """
    Args:
        image_size: side of the images; the maps of the stages follow from it.
        dim: width of the first stage; each later one is twice as wide.
        depths, num_heads: per stage.
        window_size: side of a window, which shrinks to a map that is smaller.
        version: 1, or 2 with cosine attention and LayerNorms after the branches.
        pretrained_window_size: of version 2, side of the windows of the weights, 0 for the same.
        conv_stem: CTransPath's convolutions in place of the patch embedding.
        num_classes: of the head, 0 for none.
    """

    image_size: int = 224
    dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    version: int = 1
    pretrained_window_size: int = 0
    conv_stem: bool = False
    num_classes: int = 1000

    def reduced(self) -> SwinConfig:
        # Two stages: one with shifted windows, one whose window covers its map.
        return replace(
            self,
            image_size=8 * self.window_size,
            dim=self.dim // self.num_heads[0],
            depths=(2, 2),
            num_heads=(1, 2),
        )


class ConvStem(torch.nn.Module):
    """CTransPath's stem: two strided 3x3 convolutions and a 1x1, to a quarter of the size."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        layers: list[torch.nn.Module] = []
        for given, made in ((3, dim // 8), (dim // 8, dim // 4)):
            layers += [
                Conv2d(given, made, 3, stride=2, padding=1, bias=False),
                torch.nn.BatchNorm2d(made),
                torch.nn.ReLU(inplace=True),
            ]
        self.proj = torch.nn.Sequential(*layers, Conv2d(dim // 4, dim, 1))
        self.norm = LayerNorm(dim, eps=EPS)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(images).flatten(2).transpose(1, 2))


class PatchMerging(torch.nn.Module):
    """Half the map, twice the width."""

    def __init__(self, dim: int, version: int) -> None:
        super().__init__()
        self.version = version
        self.norm = LayerNorm(4 * dim if version == 1 else 2 * dim, eps=EPS)
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, H, W, C] -> [B, H / 2, W / 2, 2 C]; odd sides get a row or column of zeros."""
        b, h, w, c = x.shape
        x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2))
        x = x.reshape(b, (h + 1) // 2, 2, (w + 1) // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(x)) if self.version == 1 else self.norm(self.reduction(x))


class Block(torch.nn.Module):
    def __init__(
        self, c: SwinConfig, dim: int, num_heads: int, side: int, shifted: bool, pretrained: int
    ) -> None:
        super().__init__()
        self.version = c.version
        # A window as large as its map is one window; there is nothing to shift.
        covers = side <= c.window_size
        window = side if covers else c.window_size
        shift = window // 2 if shifted and not covers else 0
        if c.version == 1:
            attention = WindowAttention(dim, num_heads, window, shift, padding="roll_then_pad")
        else:
            attention = WindowAttentionV2(  # type: ignore[assignment]
                dim,
                num_heads,
                window,
                shift,
                padding="roll_then_pad",
                pretrained_window_size=pretrained,
            )
        self.norm1 = LayerNorm(dim, eps=EPS)
        self.attn = attention
        self.norm2 = LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.version == 1:
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        x = x + self.norm1(self.attn(x))
        return x + self.norm2(self.mlp(x))


class Stage(torch.nn.Module):
    def __init__(self, c: SwinConfig, index: int) -> None:
        super().__init__()
        dim, side = c.dim << index, c.image_size // 4
        for _ in range(index):
            side = (side + 1) // 2
        merges = index > 0
        self.downsample = PatchMerging(dim // 2, c.version) if merges else torch.nn.Identity()
        self.blocks = torch.nn.ModuleList(
            Block(c, dim, c.num_heads[index], side, i % 2 == 1, c.pretrained_window_size)
            for i in range(c.depths[index])
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            x = block(x)
        return x


class Head(torch.nn.Module):
    """The mean of the map, then the classes."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.fc = Linear(dim, num_classes) if num_classes else torch.nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.mean((1, 2)))


class SwinTransformer(ImageModel):
    """Images [B, 3, H, W] to logits [B, num_classes], or features [B, E]."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        c = self.config = config
        if c.version not in (1, 2):
            raise ValueError(f"SwinTransformer: version must be 1 or 2, got {c.version}")
        stem = PatchEmbed(4, embed_dim=c.dim, norm=True, norm_eps=EPS, pad=True)
        self.patch_embed = ConvStem(c.dim) if c.conv_stem else stem
        self.layers = torch.nn.ModuleList(Stage(c, i) for i in range(len(c.depths)))
        features = c.dim << (len(c.depths) - 1)
        self.norm = LayerNorm(features, eps=EPS)
        self.head = Head(features, c.num_classes)
        init_weights(self)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """The last map [B, H / 32, W / 32, E]."""
        height, width = (-(-n // 4) for n in images.shape[-2:])
        x = self.patch_embed(images).unflatten(1, (height, width))
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.forward_features(images))


T = SwinConfig()
S = replace(T, depths=(2, 2, 18, 2))
B = replace(S, dim=128, num_heads=(4, 8, 16, 32))


def _v2(config: SwinConfig, window: int) -> SwinConfig:
    return replace(config, image_size=256, window_size=window, version=2)


FAMILY = Family(
    SwinTransformer,
    {
        "swin_t": Entry(T, "timm swin_tiny_patch4_window7_224"),
        "swin_s": Entry(S, "timm swin_small_patch4_window7_224"),
        "swin_b": Entry(B, "timm swin_base_patch4_window7_224"),
        "swin_b_384": Entry(
            replace(B, image_size=384, window_size=12), "timm swin_base_patch4_window12_384"
        ),
        "swinv2_t": Entry(_v2(T, 8), "timm swinv2_tiny_window8_256"),
        "swinv2_s": Entry(_v2(S, 8), "timm swinv2_small_window8_256"),
        "swinv2_b": Entry(_v2(B, 8), "timm swinv2_base_window8_256"),
        "swinv2_t_w16": Entry(_v2(T, 16), "timm swinv2_tiny_window16_256"),
        "swinv2_s_w16": Entry(_v2(S, 16), "timm swinv2_small_window16_256"),
        "swinv2_b_w16": Entry(_v2(B, 16), "timm swinv2_base_window16_256"),
        "ctranspath": Entry(
            replace(T, conv_stem=True, num_classes=0),
            "CTransPath, `downsample` at the start of a stage as in timm 0.9 and later",
        ),
    },
)
