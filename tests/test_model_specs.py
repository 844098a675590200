"""Models named in a line of text: every kind, their inputs, and what is said of a wrong line."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from vitkit.example_inputs import example_inputs
from vitkit.model_specs import build_model, parse_options

SMALL_UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 8,
}
NARROW = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**NARROW, "intermediate_size": 40, "vocab_size": 50}
VISION = {**NARROW, "intermediate_size": 40, "image_size": 32, "patch_size": 16}
TRANSFORMER = {
    "sample_size": 8, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
    "patch_size": 2,
}  # fmt: skip
EVERY_KIND = {
    "timm": ("timm:test_vit", {"num_classes": 3}),
    "torchvision": ("torchvision:squeezenet1_1", {"num_classes": 3}),
    "vitkit": ("vitkit:titan", {"reduced": True}),
    "image": ("transformers:ViTModel", VISION),
    "text_and_image": ("transformers:CLIPModel", {"text_config": TEXT, "vision_config": VISION}),
    "unet": ("diffusers:UNet2DConditionModel", SMALL_UNET),
    "class_conditioned": ("diffusers:DiTTransformer2DModel", {**TRANSFORMER, "in_channels": 4}),
    "pooled_text": (
        "diffusers:SD3Transformer2DModel",
        {**TRANSFORMER, "joint_attention_dim": 24, "caption_projection_dim": 16,
         "pooled_projection_dim": 20},
    ),
    "tokens_with_places": (
        "diffusers:FluxTransformer2DModel",
        {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
         "num_attention_heads": 2, "joint_attention_dim": 24, "pooled_projection_dim": 20,
         "guidance_embeds": True, "axes_dims_rope": (4, 6, 6)},
    ),
    "sizes": (
        "diffusers:PixArtTransformer2DModel",
        {**TRANSFORMER, "cross_attention_dim": 16, "caption_channels": 24,
         "use_additional_conditions": False},
    ),
    "python_path": ("torch.nn:GroupNorm", {"num_groups": 1, "num_channels": 3}),
}  # fmt: skip


@pytest.mark.parametrize(("spec", "options"), EVERY_KIND.values(), ids=EVERY_KIND)
def test_a_model_of_every_kind_runs_on_its_inputs(spec, options):
    pytest.importorskip(spec.partition(":")[0].split(".")[0])
    torch.manual_seed(0)
    model = build_model(spec, **options).eval()
    args, kwargs = example_inputs(model)
    with torch.no_grad():
        outputs = model(*args, **kwargs)
    tensors = torch.utils._pytree.tree_leaves(
        dict(outputs) if hasattr(outputs, "keys") else outputs
    )
    assert any(isinstance(t, torch.Tensor) and t.isfinite().all() for t in tensors)


def test_gates_that_start_at_zero_are_redrawn():
    """With them a diffusion transformer is the identity, and proves nothing."""
    model = build_model("vitkit:dit_s2", reduced=True).eval()
    assert all(p.any() for p in model.parameters())
    args, _ = example_inputs(model)
    assert model(*args).abs().max() > 0


def test_a_file_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "own_model.py").write_text(
        "import torch\n"
        "class Make:\n"
        "    def norm(width=4):\n"
        "        return torch.nn.GroupNorm(2, width), (torch.ones(1, width, 3, 3),)\n"
    )
    model, (x,) = build_model(f"{tmp_path}/own_model.py:Make.norm", width=6)
    assert model(x).shape == (1, 6, 3, 3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.delitem(sys.modules, "own_model")
    assert build_model("own_model:Make.norm")[0].num_channels == 4


def test_shapes_and_batches():
    model = torch.nn.Conv2d(3, 4, 3)
    assert example_inputs(model, batch=5)[0][0].shape == (5, 3, 224, 224)
    assert example_inputs(model, (2, 3, 8, 9), batch=5)[0][0].shape == (2, 3, 8, 9)


def test_options_are_python_where_they_can_be():
    given = ["depth=2", "mlp=swiglu", "sizes=(1, 2)", "norm=None", "rate=1e-3"]
    assert parse_options(given) == {
        "depth": 2, "mlp": "swiglu", "sizes": (1, 2), "norm": None, "rate": 1e-3
    }  # fmt: skip
    with pytest.raises(ValueError, match="option must look like depth=2, got 'depth'"):
        parse_options(["depth"])


WRONG = {
    "no_name": ("timm", "must be one of timm:NAME, .* got 'timm'"),
    "unknown_in_timm": ("timm:vit_bas_patch16_224", r"no 'vit_bas_.*near: vit_base_patch16_224"),
    "unknown_in_torchvision": ("torchvision:swin_tt", r"no 'swin_tt' \(near: swin_t"),
    "unknown_in_transformers": ("transformers:VitModel", r"no class 'VitModel' \(near: .*ViTModel"),
    "unknown_in_diffusers": ("diffusers:Unet2DModel", r"no class .* \(near: UNet2DModel"),
    "unknown_in_vitkit": ("vitkit:vit_b", r"got 'vit_b' \(near: .*vit_b16"),
    "no_model": ("diffusers:DDPMScheduler", "DDPMScheduler of diffusers is no model"),
    "no_single_class": ("transformers:AutoModel", "is no model with a configuration"),
    "unknown_host": ("tim:vit", r"no host or module 'tim' \(near: timm"),
    "unknown_attribute": ("torch.nn:GroupNom", r"no 'GroupNom' \(near: GroupNorm"),
    "no_file": ("nowhere/own.py:make", "there is no file nowhere/own.py"),
    "no_callable": ("torch:float32", "made by a callable, 'torch:float32' is dtype"),
    "no_module": ("builtins:list", "must be a torch.nn.Module, 'builtins:list' made list"),
    "missing_argument": ("torch.nn:GroupNorm", "cannot be made with no options: .*num_groups"),
    "wrong_option": ("vitkit:uni -o layers=3", "must be fields of ViTConfig"),
}  # fmt: skip


@pytest.mark.parametrize(("spec", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_line_is_answered_in_one(spec, message):
    spec, _, option = spec.partition(" -o ")
    with pytest.raises(ValueError, match=message) as caught:
        build_model(spec, **parse_options([option] if option else []))
    assert "\n" not in str(caught.value)


def test_a_missing_host_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"timm must be installed .* run pip install timm"):
        build_model("timm:vit_base_patch16_224")
