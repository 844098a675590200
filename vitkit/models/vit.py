"""Vision transformers (Dosovitskiy et al. 2021) in timm's parameter layout.

One class is ViT, DINO, DINOv2 with and without registers, iBOT, SigLIP, and most encoders of
histopathology tiles; the table says what each one is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from vitkit.models.layers import (
    Block,
    ImageModel,
    init_weights,
    narrow_encoder,
    resample_positions,
    token_parameter,
)
from vitkit.models.registry import Entry, Family
from vitkit.nn import AttentionPoolLatent, LayerNorm, Linear, PatchEmbed

POOLS = ("token", "mean", "token_mean", "map", "none")


@dataclass(frozen=True)
class ViTConfig:
    """
    Args:
        image_size: side of the images, of which the learned positions are.
        patch_size: side of a patch.
        dim, depth, num_heads: of the transformer.
        mlp: ``"gelu"``, ``"gelu_tanh"`` or ``"swiglu"``.
        mlp_hidden: width after the MLP's first projection.
        layer_scale: initial value, None for none.
        class_token: whether there is one.
        registers: number of register tokens, after the class token.
        prefix_positions: class and register tokens have positions too.
        resample: how positions become those of another grid, see ``resample_positions``.
        pool: ``"token"`` is the class token, ``"mean"`` of the patches, ``"token_mean"`` both side
            by side, ``"map"`` an attention pool with one latent, ``"none"`` returns all tokens.
        norm_after_pool: the last LayerNorm comes after pooling.
        num_classes: of the head, 0 for none.
        eps: of the LayerNorms.
    """

    image_size: int = 224
    patch_size: int = 16
    dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp: str = "gelu"
    mlp_hidden: int = 3072
    layer_scale: float | None = None
    class_token: bool = True
    registers: int = 0
    prefix_positions: bool = True
    resample: str = "antialias"
    pool: str = "token"
    norm_after_pool: bool = False
    num_classes: int = 0
    eps: float = 1e-6

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def prefix(self) -> int:
        return self.class_token + self.registers

    def reduced(self) -> ViTConfig:
        return narrow_encoder(self)


class VisionTransformer(ImageModel):
    """Images [B, 3, H, W] to features [B, E] (or tokens [B, N, E], or logits)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        c = self.config = config
        if c.pool not in POOLS:
            raise ValueError(f"VisionTransformer: pool must be one of {POOLS}, got {c.pool!r}")
        self.patch_embed = PatchEmbed(c.patch_size, embed_dim=c.dim)
        self.cls_token = token_parameter(1, 1, c.dim) if c.class_token else None
        self.reg_token = token_parameter(1, c.registers, c.dim) if c.registers else None
        positions = c.grid**2 + (c.prefix if c.prefix_positions else 0)
        self.pos_embed = token_parameter(1, positions, c.dim)
        self.blocks = torch.nn.ModuleList(
            Block(
                c.dim,
                c.num_heads,
                c.mlp_hidden,
                mlp=c.mlp,
                layer_scale=c.layer_scale,
                eps=c.eps,
            )
            for _ in range(c.depth)
        )
        norm = LayerNorm(c.dim, eps=c.eps)
        self.norm = torch.nn.Identity() if c.norm_after_pool else norm
        self.attn_pool = None
        if c.pool == "map":
            # Half a unit more, for the ratio is rounded down to a width.
            ratio = (c.mlp_hidden + 0.5) / c.dim
            self.attn_pool = AttentionPoolLatent(
                c.dim,
                c.num_heads,
                mlp_ratio=ratio,
                norm_layer=lambda dim: LayerNorm(dim, eps=c.eps),
            )
        self.fc_norm = norm if c.norm_after_pool else torch.nn.Identity()
        features = 2 * c.dim if c.pool == "token_mean" else c.dim
        self.head = Linear(features, c.num_classes) if c.num_classes else torch.nn.Identity()
        init_weights(self)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Tokens [B, P + N, E] before the first block."""
        c = self.config
        grid = (images.shape[-2] // c.patch_size, images.shape[-1] // c.patch_size)
        prefix = [t[0] for t in (self.cls_token, self.reg_token) if t is not None]
        positions = resample_positions(
            self.pos_embed[0], c.prefix if c.prefix_positions else 0, grid, c.resample
        )
        return self.patch_embed(images, positions, torch.cat(prefix) if prefix else None)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """Tokens [B, P + N, E] after the last block."""
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        kind, prefix = self.config.pool, self.config.prefix
        if self.attn_pool is not None:
            return self.attn_pool(x[:, prefix:])
        if kind == "token":
            return x[:, 0]
        if kind == "mean":
            return x[:, prefix:].mean(1)
        if kind == "token_mean":
            return torch.cat([x[:, 0], x[:, prefix:].mean(1)], -1)
        return x

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.fc_norm(self.pool(self.forward_features(images))))


S = ViTConfig(dim=384, num_heads=6, mlp_hidden=1536)
B = ViTConfig()
L = ViTConfig(dim=1024, depth=24, num_heads=16, mlp_hidden=4096)
H = ViTConfig(dim=1280, depth=32, num_heads=16, mlp_hidden=5120, patch_size=14)
# The g of DINOv2: other widths than the g of Zhai et al. (2022), and a gated MLP.
G = ViTConfig(dim=1536, depth=40, num_heads=24, mlp="swiglu", mlp_hidden=8192, layer_scale=1e-5)


def _dinov2(config: ViTConfig, registers: int = 0) -> ViTConfig:
    return replace(
        config,
        image_size=518,
        patch_size=14,
        layer_scale=1e-5,
        registers=registers,
        prefix_positions=registers == 0,
    )


def _siglip(config: ViTConfig, image_size: int = 224) -> ViTConfig:
    return replace(config, class_token=False, pool="map", image_size=image_size)


SO400M = ViTConfig(patch_size=14, dim=1152, depth=27, num_heads=16, mlp_hidden=4304)
VIRCHOW = replace(H, mlp="swiglu", mlp_hidden=6832, layer_scale=1e-5, pool="token_mean")

FAMILY = Family(
    VisionTransformer,
    {
        "vit_s16": Entry(replace(S, num_classes=1000), "timm vit_small_patch16_224"),
        "vit_b16": Entry(replace(B, num_classes=1000), "timm vit_base_patch16_224"),
        "vit_l16": Entry(replace(L, num_classes=1000), "timm vit_large_patch16_224"),
        "vit_h14": Entry(replace(H, num_classes=1000), "timm vit_huge_patch14_224"),
        "vit_g14": Entry(
            ViTConfig(
                patch_size=14, dim=1408, depth=40, num_heads=16, mlp_hidden=6144, num_classes=1000
            ),
            "timm vit_giant_patch14_224",
        ),
        "dino_s16": Entry(S, "DINO ViT-S/16; timm vit_small_patch16_224.dino"),
        "dino_s8": Entry(replace(S, patch_size=8), "DINO ViT-S/8; timm vit_small_patch8_224.dino"),
        "dino_b16": Entry(B, "DINO ViT-B/16; timm vit_base_patch16_224.dino"),
        "dino_b8": Entry(replace(B, patch_size=8), "DINO ViT-B/8; timm vit_base_patch8_224.dino"),
        "dinov2_s14": Entry(_dinov2(S), "timm vit_small_patch14_dinov2"),
        "dinov2_b14": Entry(_dinov2(B), "timm vit_base_patch14_dinov2"),
        "dinov2_l14": Entry(_dinov2(L), "timm vit_large_patch14_dinov2"),
        "dinov2_g14": Entry(_dinov2(G), "timm vit_giant_patch14_dinov2"),
        "dinov2_s14_reg4": Entry(_dinov2(S, 4), "timm vit_small_patch14_reg4_dinov2"),
        "dinov2_b14_reg4": Entry(_dinov2(B, 4), "timm vit_base_patch14_reg4_dinov2"),
        "dinov2_l14_reg4": Entry(_dinov2(L, 4), "timm vit_large_patch14_reg4_dinov2"),
        "dinov2_g14_reg4": Entry(_dinov2(G, 4), "timm vit_giant_patch14_reg4_dinov2"),
        "ibot_s16": Entry(S, "iBOT ViT-S/16 backbone, names of timm"),
        "ibot_b16": Entry(B, "iBOT ViT-B/16 backbone (also Phikon), names of timm"),
        "ibot_l16": Entry(L, "iBOT ViT-L/16 backbone, names of timm"),
        "siglip_b16": Entry(_siglip(B), "timm vit_base_patch16_siglip_224"),
        "siglip_l16": Entry(_siglip(L, image_size=256), "timm vit_large_patch16_siglip_256"),
        "siglip_so400m14": Entry(_siglip(SO400M), "timm vit_so400m_patch14_siglip_224"),
        "uni": Entry(replace(L, layer_scale=1e-5), "MahmoodLab/UNI, names of timm"),
        "uni2_h": Entry(
            replace(G, patch_size=14, depth=24, registers=8, prefix_positions=False),
            "MahmoodLab/UNI2-h, names of timm",
        ),
        "virchow": Entry(VIRCHOW, "paige-ai/Virchow, names of timm"),
        "virchow2": Entry(replace(VIRCHOW, registers=4), "paige-ai/Virchow2, names of timm"),
        "gigapath_tile": Entry(G, "prov-gigapath/prov-gigapath tile encoder, names of timm"),
        "h_optimus": Entry(
            replace(G, patch_size=14, registers=4, prefix_positions=False),
            "bioptimus/H-optimus-0 and H-optimus-1, names of timm",
        ),
        "rudolfv": Entry(
            replace(L, patch_size=14, layer_scale=1e-5),
            "RudolfV: weights not public, DINOv2 ViT-L/14 as its paper says; names of timm",
        ),
        "sp22m": Entry(S, "MSKCC SP22M (Campanella et al.), names of DINO"),
        "sp85m": Entry(B, "MSKCC SP85M (Campanella et al.), names of DINO"),
        "hipt_256": Entry(
            replace(S, resample="dino"), "HIPT and iSTAR ViT-256, images of 256 pixels; DINO names"
        ),
    },
)
