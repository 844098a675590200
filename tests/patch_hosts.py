"""Small models of every host that patch has rules for, and what a patched call of each must run."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


IMAGE = randn(2, 3, 32, 32)
LATENT = randn(2, 4, 8, 8)
TEXT = randn(2, 5, 24, seed=2)
POOLED = randn(2, 16, seed=3)
STEPS = torch.tensor([3, 700])


@dataclass(frozen=True)
class Case:
    """A host's model.

    Args:
        host: the library that must be installed.
        make: builds the model, without dropout.
        inputs, kwargs: of a call.
        kernels: op -> forward kernels of one call.
        lora: names of the modules that adapters are put on.
        left: what the report says about the attention of a model with such adapters; "" where
            they are honoured.
        compiles: whether to compile it; what only repeats another case's attention is not.
    """

    host: str
    make: Callable[[], torch.nn.Module]
    inputs: list[Any]
    kernels: dict[str, int]
    kwargs: dict[str, Any] = field(default_factory=dict)
    lora: tuple[str, ...] = ()
    left: str = ""
    compiles: bool = True

    def model(self) -> torch.nn.Module:
        """With every parameter moved: those that begin as zeros or ones would hide mistakes."""
        pytest.importorskip(self.host)
        torch.manual_seed(0)
        model = self.make().eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
        return model


def _timm(name, **options):
    def make():
        from timm import create_model

        small = {"img_size": 32, "num_classes": 5}
        return create_model(name, pretrained=False, **{**small, **options})

    return make


_VIT = {"patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 1}


def _pool(name, **options):
    def make():
        from timm import layers

        return getattr(layers, name)(**options)

    return make


def _transformers(name, **options):
    def make():
        hf = importlib.import_module("transformers")
        config = name.replace("Model", "Config")
        config = "SamVisionConfig" if name == "SamVisionModel" else config
        model = getattr(hf, name)(getattr(hf, config)(**options))
        if name != "VitDetModel":
            model.set_attn_implementation("sdpa")
        return model

    return make


_HF = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
_HF_SWIN = {
    "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2], "num_heads": [2],
    "window_size": 4, "drop_path_rate": 0.0,
}  # fmt: skip
_HF_MAP = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 4, "window_size": 3,
}  # fmt: skip


def _diffusers(name, **options):
    return lambda: getattr(importlib.import_module("diffusers"), name)(**options)


_UNET = {
    "sample_size": 8, "block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4,
    "attention_head_dim": 1, "cross_attention_dim": 24, "mid_block_type": None,
    "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",),
}  # fmt: skip
_DIT = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 1, "attention_head_dim": 16,
    "num_attention_heads": 2, "norm_num_groups": 4,
}  # fmt: skip
_SD3 = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2,
    "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24,
    "caption_projection_dim": 32, "pooled_projection_dim": 16, "pos_embed_max_size": 8,
    "dual_attention_layers": (0,), "qk_norm": "rms_norm",
}  # fmt: skip
_FLUX = {
    "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1,
    "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24,
    "pooled_projection_dim": 16, "axes_dims_rope": (4, 4, 8),
}  # fmt: skip


def _torchvision(name, **options):
    return lambda: getattr(importlib.import_module("torchvision").models, name)(**options)


def _swin_of_torchvision(version):
    def make():
        from torchvision.models import swin_transformer as swin

        blocks = {"block": swin.SwinTransformerBlockV2} if version == 2 else {}
        merging = {"downsample_layer": swin.PatchMergingV2} if version == 2 else {}
        return swin.SwinTransformer(
            patch_size=[2, 2], embed_dim=16, depths=[2], num_heads=[2], window_size=[4, 4],
            num_classes=5, stochastic_depth_prob=0.0, **blocks, **merging,
        )  # fmt: skip

    return make


def _vitkit(name):
    def make():
        import vitkit

        return vitkit.models.create(name, reduced=True, backend="reference")

    return make


BY_WEIGHT = "uses the weight only"
CASES: dict[str, Case] = {
    # ---- timm ----
    "timm_vit": Case(
        "timm", _timm("vit_tiny_patch16_224", **_VIT), [IMAGE],
        {"flash_attention": 1, "patch_embed": 1, "gelu": 1}, lora=("qkv", "proj"),
    ),
    "timm_vit_map_pooling": Case(
        "timm", _timm("vit_tiny_patch16_224", **_VIT, class_token=False, global_pool="map"),
        [IMAGE], {"flash_attention": 2}, lora=("qkv", "kv"), compiles=False,
    ),
    "timm_rope": Case(
        "timm",
        _timm("vit_base_patch16_rope_224", **_VIT), [IMAGE],
        {"flash_attention": 1, "rope_2d": 1}, lora=("qkv",),
    ),
    "timm_eva": Case(
        "timm", _timm("eva02_tiny_patch14_224", **_VIT), [IMAGE],
        {"flash_attention": 1, "rope_2d": 1, "swiglu": 1}, lora=("qkv",), left=BY_WEIGHT,
    ),
    "timm_beit": Case(
        "timm", _timm("beit_base_patch16_224", **_VIT), [IMAGE], {"flash_attention": 1},
        lora=("qkv",), left=BY_WEIGHT,
    ),
    "timm_relpos": Case(
        "timm", _timm("vit_relpos_base_patch16_224", **_VIT), [IMAGE], {"flash_attention": 1},
        lora=("qkv",),
    ),
    "timm_sam": Case(
        "timm",
        _timm("samvit_base_patch16", **_VIT, window_size=3, global_attn_indexes=(), neck_chans=8),
        [IMAGE], {"flash_attention_decomposed": 1}, lora=("qkv",),
    ),
    "timm_swin": Case(
        "timm",
        _timm("swin_tiny_patch4_window7_224", window_size=4, embed_dim=16, depths=(2,),
              num_heads=(2,), drop_path_rate=0.0),
        [IMAGE], {"window_attention": 2}, lora=("qkv",),
    ),
    "timm_swin_v2": Case(
        "timm",
        _timm("swinv2_tiny_window8_256", window_size=4, embed_dim=16, depths=(2,), num_heads=(2,),
              drop_path_rate=0.0),
        [IMAGE], {"window_attention": 2}, lora=("qkv",), left=BY_WEIGHT,
    ),
    "timm_pool_2d": Case(
        "timm", _pool("AttentionPool2d", in_features=32, feat_size=4, head_dim=16),
        [randn(2, 32, 4, 4)], {"flash_attention": 1}, lora=("qkv", "proj"),
    ),
    "timm_pool_2d_rotary": Case(
        "timm",
        _pool("RotAttentionPool2d", in_features=32, ref_feat_size=4, head_dim=16, pool_type=""),
        [randn(2, 32, 4, 5)], {"flash_attention": 1, "rope_2d": 1}, lora=("qkv", "proj"),
    ),
    "timm_pool_prr": Case(
        "timm", _pool("AttentionPoolPrr", dim=32, num_heads=2, post_norm=True),
        [randn(2, 9, 32)], {"flash_attention": 1},
    ),
    # ---- transformers ----
    "hf_vit": Case(
        "transformers", _transformers("ViTModel", **_HF), [IMAGE],
        {"flash_attention": 1, "patch_embed": 1, "gelu": 1}, lora=("q_proj", "v_proj"),
    ),
    "hf_beit": Case(
        "transformers", _transformers("BeitModel", **_HF, use_relative_position_bias=True),
        [IMAGE], {"flash_attention": 1}, lora=("q_proj", "v_proj"), compiles=False,
    ),
    "hf_swin": Case(
        "transformers", _transformers("SwinModel", **_HF_SWIN), [IMAGE],
        {"window_attention": 2}, lora=("q_proj", "o_proj"),
    ),
    "hf_swin_v2": Case(
        "transformers", _transformers("Swinv2Model", **_HF_SWIN), [IMAGE[..., :28]],
        {"window_attention": 2}, lora=("query", "value"),
    ),
    "hf_perceiver": Case(
        "transformers",
        _transformers(
            "PerceiverModel", num_latents=8, d_latents=32, d_model=24, num_blocks=1,
            num_self_attends_per_block=1, num_self_attention_heads=2, num_cross_attention_heads=2,
            qk_channels=32, v_channels=32, attention_probs_dropout_prob=0.0,
        ),
        [randn(2, 11, 24)], {"flash_attention": 2},
        {"attention_mask": torch.tensor([[1] * 11, [1] * 7 + [0] * 4])}, lora=("query", "value"),
    ),
    "hf_sam": Case(
        "transformers",
        _transformers("SamVisionModel", **_HF_MAP, global_attn_indexes=[], output_channels=8,
                      mlp_dim=32),
        [IMAGE], {"flash_attention_decomposed": 1}, lora=("qkv",),
    ),
    "hf_vitdet": Case(
        "transformers",
        _transformers("VitDetModel", **_HF_MAP, window_block_indices=[0], dropout_prob=0.0,
                      use_relative_position_embeddings=True),
        [IMAGE], {"flash_attention_decomposed": 1}, lora=("qkv",), compiles=False,
    ),
    # ---- diffusers ----
    "diffusers_unet": Case(
        "diffusers", _diffusers("UNet2DConditionModel", **_UNET), [LATENT, STEPS, TEXT],
        {"flash_attention": 6, "group_norm_silu": 10, "geglu": 3}, lora=("to_q", "to_out.0"),
    ),
    "diffusers_vae": Case(
        "diffusers",
        _diffusers("AutoencoderKL", block_out_channels=(16,), norm_num_groups=4,
                   layers_per_block=1),
        [IMAGE[..., :8, :8]], {"flash_attention": 2}, lora=("to_q",), compiles=False,
    ),
    "diffusers_dit": Case(
        "diffusers", _diffusers("DiTTransformer2DModel", **_DIT, num_embeds_ada_norm=10),
        [LATENT, STEPS, torch.tensor([1, 3])],
        {"flash_attention": 1, "layer_norm_modulate": 1, "patch_embed": 1}, lora=("to_q", "to_v"),
    ),
    "diffusers_pixart": Case(
        "diffusers",
        _diffusers("PixArtTransformer2DModel", **_DIT, cross_attention_dim=32, caption_channels=24,
                   use_additional_conditions=False),
        [LATENT, TEXT, STEPS], {"flash_attention": 2, "patch_embed": 1},
        {"encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1] * 5])},
        lora=("to_q", "to_v"), compiles=False,
    ),
    "diffusers_sd3": Case(
        "diffusers", _diffusers("SD3Transformer2DModel", **_SD3), [LATENT, TEXT, POOLED, STEPS],
        {"flash_attention": 3, "layer_norm_modulate": 6}, lora=("to_q", "add_k_proj"),
    ),
    "diffusers_flux": Case(
        "diffusers", _diffusers("FluxTransformer2DModel", **_FLUX),
        [randn(2, 12, 4), TEXT, POOLED, STEPS / 1000],
        {"flash_attention": 2, "rope_2d": 2, "layer_norm_modulate": 4},
        {"img_ids": torch.arange(36).view(12, 3) % 5.0, "txt_ids": torch.zeros(5, 3)},
        lora=("to_q", "add_k_proj"),
    ),
    # ---- torchvision ----
    "torchvision_vit": Case(
        "torchvision",
        _torchvision("VisionTransformer", image_size=32, patch_size=8, num_layers=1, num_heads=2,
                     hidden_dim=32, mlp_dim=48, num_classes=5),
        [IMAGE], {"flash_attention": 1, "gelu": 1}, lora=("self_attention",),
    ),
    "torchvision_swin": Case(
        "torchvision", _swin_of_torchvision(1), [IMAGE], {"window_attention": 2}, lora=("qkv",),
        left="uses weight and bias only",
    ),
    "torchvision_swin_v2": Case(
        "torchvision", _swin_of_torchvision(2), [IMAGE], {"window_attention": 2}, lora=("qkv",),
        left="uses weight and bias only",
    ),
    # ---- vitkit ----
    "vitkit_vit": Case(
        "vitkit", _vitkit("vit_s16"), [randn(1, 3, 48, 48)],
        {"flash_attention": 2, "patch_embed": 1, "gelu": 2}, lora=("qkv",),
    ),
}  # fmt: skip
