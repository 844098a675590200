"""Rules for transformers' patch embeddings: ViT, DeiT, DINOv2 (with registers) and Swin."""

from __future__ import annotations

from transformers.models.deit import modeling_deit as deit
from transformers.models.dinov2 import modeling_dinov2 as dinov2
from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers as registers
from transformers.models.swin import modeling_swin as swin
from transformers.models.vit import modeling_vit as vit

from vitkit import nn
from vitkit.patch.patches import must_call_host, onto
from vitkit.patch.rules import Rule

_VIT = {"1d007cf93f": "5.23"}
_DINO = {"cb95a895f8": "5.23"}
_SWIN = {"e7b83cb0b5": "5.23"}


class ViTPatchEmbeddings(vit.ViTPatchEmbeddings):
    """ViT's patch embeddings on vitkit.patch_embed."""

    def forward(self, pixel_values):
        if must_call_host(pixel_values, self.projection, False):
            return super().forward(pixel_values)
        return nn.patch_embed(self, pixel_values, self.projection)


class DeiTPatchEmbeddings(deit.DeiTPatchEmbeddings):
    """DeiT's patch embeddings on vitkit.patch_embed."""

    def forward(self, pixel_values):
        if must_call_host(pixel_values, self.projection, False):
            return super().forward(pixel_values)
        return nn.patch_embed(self, pixel_values, self.projection)


class Dinov2PatchEmbeddings(dinov2.Dinov2PatchEmbeddings):
    """DINOv2's patch embeddings on vitkit.patch_embed."""

    def forward(self, pixel_values):
        pixels = pixel_values.to(self.projection.weight.dtype)
        if must_call_host(pixels, self.projection, False):
            return super().forward(pixel_values)
        return nn.patch_embed(self, pixels, self.projection)


class Dinov2WithRegistersPatchEmbeddings(registers.Dinov2WithRegistersPatchEmbeddings):
    """DINOv2's patch embeddings on vitkit.patch_embed."""

    def forward(self, pixel_values):
        pixels = pixel_values.to(self.projection.weight.dtype)
        if must_call_host(pixels, self.projection, False):
            return super().forward(pixel_values)
        return nn.patch_embed(self, pixels, self.projection)


class SwinPatchEmbeddings(swin.SwinPatchEmbeddings):
    """Swin's patch embeddings on vitkit.patch_embed, padding without a copy."""

    def forward(self, pixel_values):
        if must_call_host(pixel_values, self.projection, True):
            return super().forward(pixel_values)
        height, width = (
            -(-s // p) for s, p in zip(pixel_values.shape[2:], self.patch_size, strict=True)
        )
        return nn.patch_embed(self, pixel_values, self.projection, pad=True), (height, width)


RULES = [
    Rule(base, "patch_embed", onto(twin, "projection"), ((base.forward, known),))
    for base, twin, known in (
        (vit.ViTPatchEmbeddings, ViTPatchEmbeddings, _VIT),
        (deit.DeiTPatchEmbeddings, DeiTPatchEmbeddings, _VIT),
        (dinov2.Dinov2PatchEmbeddings, Dinov2PatchEmbeddings, _DINO),
        (
            registers.Dinov2WithRegistersPatchEmbeddings,
            Dinov2WithRegistersPatchEmbeddings,
            _DINO,
        ),
        (swin.SwinPatchEmbeddings, SwinPatchEmbeddings, _SWIN),
    )
]
