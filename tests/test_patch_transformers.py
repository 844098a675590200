"""transformers' vision models, patched: attention through its registry, and by name."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from patching import assert_same_numbers, snapshot

import vitkit
from vitkit.compat import transformers as compat
from vitkit.verify import KernelCalls

transformers = pytest.importorskip("transformers")
from transformers import (  # noqa: E402
    BeitConfig,
    BeitModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    IJepaConfig,
    IJepaModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    Swinv2Config,
    Swinv2Model,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)  # fmt: skip

SMALL = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
    image_size=32, patch_size=8, attn_implementation="sdpa",
)  # fmt: skip
MODELS = {
    "vit": (ViTModel, ViTConfig, {}),
    "deit": (DeiTModel, DeiTConfig, {}),
    "dinov2": (Dinov2Model, Dinov2Config, {"mlp_ratio": 2}),
    "dinov3": (DINOv3ViTModel, DINOv3ViTConfig, {"num_register_tokens": 2}),
    "siglip": (SiglipVisionModel, SiglipVisionConfig, {}),
    "clip": (CLIPVisionModel, CLIPVisionConfig, {}),
    "ijepa": (IJepaModel, IJepaConfig, {}),
    "beit": (BeitModel, BeitConfig, {"use_relative_position_bias": True}),
}


def make(name, **options):
    cls, config, extra = MODELS[name]
    torch.manual_seed(0)
    model = cls(config(**(SMALL | extra | options))).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # tables and scales that begin as zeros, too
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


IMAGES = randn(2, 3, 32, 32)


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    model = make(name)
    before = snapshot(model)
    calls = assert_same_numbers(model, [IMAGES])
    assert calls.total("flash_attention_fwd") == calls.total("flash_attention_bwd") == 2
    assert snapshot(model) == before


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "size", [(32, 32), (36, 28), (16, 8)], ids=["divisible", "ragged", "small"]
)
def test_swin(version, size):
    """Attention on the map; a map no larger than a window, on one axis or both, is the host's own
    case: it shrinks the window, or rolls within it."""
    torch.manual_seed(0)
    cls, config = (SwinModel, SwinConfig) if version == 1 else (Swinv2Model, Swinv2Config)
    options = dict(
        image_size=32, patch_size=2, embed_dim=16, depths=[2], num_heads=[2], window_size=4,
        drop_path_rate=0.0,
    )  # fmt: skip
    model = cls(config(**options)).eval()
    model.set_attn_implementation("sdpa")
    calls = assert_same_numbers(model, [randn(2, 3, *size)])
    assert calls.total("window_attention_fwd") == 2


def test_swin_leaves_dropout_weights_and_hooks_to_the_host():
    torch.manual_seed(0)
    options = dict(
        image_size=32, patch_size=2, embed_dim=16, depths=[2], num_heads=[2], window_size=4,
        drop_path_rate=0.0, attention_probs_dropout_prob=0.5,
    )  # fmt: skip
    for model in (
        SwinModel(SwinConfig(**options, attn_implementation="sdpa")),
        Swinv2Model(Swinv2Config(**options)),
    ):
        torch.manual_seed(3)
        expected = model.train()(IMAGES).last_hidden_state
        layer = next(m for m in model.modules() if type(m).__name__.endswith("Layer"))
        with vitkit.patched(model) as report, KernelCalls() as calls:
            assert "own layer while attention dropout is active" in str(report)
            torch.manual_seed(3)
            torch.testing.assert_close(model(IMAGES).last_hidden_state, expected)
            model.eval()
            handle = layer.attention.register_forward_hook(lambda *_: None)
            model(IMAGES)
            handle.remove()
        assert calls.total("window_attention_fwd") == 1


@pytest.mark.parametrize(
    "module, reason",
    [
        (lambda: perceiver(num_heads=1, q_dim=288), "up to 256, not 288"),
        (lambda: perceiver(num_heads=2, q_dim=32, v_channels=64), "another head dim"),
        (lambda: sam_attention("SamVisionAttention"), "is 'eager', which returns weights"),
    ],
    ids=["head_dim_of_the_default", "wide_values", "eager_sam"],
)
def test_refused(module, reason):
    report = vitkit.patch(module(), dry_run=True)
    assert reason in {s.name: s.reason for s in report.skipped}[""]


def perceiver(**options):
    from transformers.models.perceiver.modeling_perceiver import PerceiverSelfAttention

    options.setdefault("kv_dim", options["q_dim"])
    return PerceiverSelfAttention(transformers.PerceiverConfig(), **options)


def sam_attention(name):
    from transformers.models.sam import modeling_sam

    config = transformers.SamVisionConfig(hidden_size=32, num_attention_heads=2)
    return getattr(modeling_sam, name)(config, window_size=3)


def test_weights_that_are_asked_for_are_the_hosts():
    module = perceiver(num_heads=2, q_dim=32).eval()
    x = randn(2, 5, 32)
    expected = module(x, output_attentions=True)
    with vitkit.patched(module), KernelCalls() as calls:
        torch.testing.assert_close(module(x, output_attentions=True), expected)
    assert calls.counts == {}


def test_masked_autoencoder():
    torch.manual_seed(0)
    model = ViTMAEModel(ViTMAEConfig(**SMALL, mask_ratio=0.0)).eval()
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(0))
    with KernelCalls() as calls, vitkit.patched(model), torch.no_grad():
        model(IMAGES, noise=noise)
    assert calls.total("flash_attention_fwd") == 2


def test_copies_pickles_and_a_second_patch():
    model = make("vit")
    expected = model(IMAGES).last_hidden_state
    keys = list(model.state_dict())
    vitkit.patch(model)
    assert vitkit.patch(model).replaced == []
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with KernelCalls() as calls:
            found = other(IMAGES).last_hidden_state
        assert calls.total("flash_attention_fwd") == 2
        torch.testing.assert_close(found, expected)
        assert list(other.state_dict()) == keys and vitkit.unpatch(other) > 0
        assert {m.config._attn_implementation for m in other.modules() if hasattr(m, "config")} == {
            "sdpa"
        }


def test_dropout_goes_to_the_host():
    model = make("vit", attention_probs_dropout_prob=0.5).train()
    torch.manual_seed(3)
    expected = model(IMAGES).last_hidden_state
    with vitkit.patched(model), KernelCalls() as calls:
        torch.manual_seed(3)
        found = model(IMAGES).last_hidden_state
    assert calls.total("flash_attention_fwd") == 0
    torch.testing.assert_close(found, expected)


def test_head_dims_without_a_kernel_go_to_the_host():
    model = make("vit", hidden_size=36)
    expected = model(IMAGES).last_hidden_state
    with vitkit.patched(model), KernelCalls() as calls:
        torch.testing.assert_close(model(IMAGES).last_hidden_state, expected)
    assert calls.total("flash_attention_fwd") == 0


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_other_implementations_are_left(implementation):
    model = make("vit", attn_implementation=implementation)
    report = vitkit.patch(model)
    reasons = [s.reason for s in report.skipped]
    assert sum(f"is {implementation!r}" in reason for reason in reasons) == 2


def test_by_name():
    compat.register()
    model = make("vit")
    expected = model(IMAGES).last_hidden_state
    model.set_attn_implementation("vitkit")
    with KernelCalls() as calls:
        torch.testing.assert_close(model(IMAGES).last_hidden_state, expected)
    assert calls.total("flash_attention_fwd") == 2


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "padded"])
def test_text_towers_get_their_masks(masked):
    """CLIP's text model is causal; a name without a mask function would attend padding."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, attn_implementation="sdpa",
    )  # fmt: skip
    model = CLIPTextModel(config).eval()
    ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if masked:
        mask[1, 6:] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    expected = model(**given).last_hidden_state
    compat.register()
    model.set_attn_implementation("vitkit")
    with KernelCalls() as calls:
        found = model(**given).last_hidden_state
    assert calls.total("flash_attention_fwd") == 2
    keep = mask.bool()
    torch.testing.assert_close(found[keep], expected[keep])


def test_groups_of_heads_and_wide_calls():
    module = torch.nn.Module()
    module.is_causal = False
    q = torch.randn(2, 4, 5, 16)
    k, v = torch.randn(2, 2, 2, 7, 16)
    out, weights = compat.attention_forward(module, q, k, v, None, scaling=0.25)
    wide = [t.repeat_interleave(2, 1) for t in (k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(q, *wide, scale=0.25)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    assert weights is None and out.is_contiguous()
