"""diffusers' U-Nets and VAEs, patched: numbers, gradients, kernels called, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from patching import assert_same_numbers, counts, snapshot

import vitkit
from vitkit.verify import KernelCalls

diffusers = pytest.importorskip("diffusers")
from diffusers.models import attention_processor as processors  # noqa: E402
from diffusers.models.attention_processor import Attention  # noqa: E402
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D  # noqa: E402


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + ("norm" in name))
    return module


# ---- ResnetBlock2D ----

BLOCKS = {
    "no_time_embedding": {"temb_channels": None},
    "time_embedding_added": {},
    "time_embedding_scales_and_shifts": {"time_embedding_norm": "scale_shift"},
    "time_embedding_not_activated": {"skip_time_act": True},
    "shortcut": {"out_channels": 32},
    "output_scaled": {"output_scale_factor": 2**0.5},
    "upsampling": {"up": True},
    "downsampling": {"down": True},
    "fir_upsampling": {"up": True, "kernel": "fir"},
    "groups_of_its_own": {"groups_out": 8},
}


def block(**options):
    return seeded(ResnetBlock2D(in_channels=16, groups=4, **{"temb_channels": 24, **options}))


def block_inputs(module, batch=2):
    temb = None if module.time_emb_proj is None else randn(batch, 24, seed=2)
    return [randn(batch, 16, 8, 8), temb]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
def test_resnet_block(options, layout):
    module = block(**options).to(memory_format=layout)
    x, temb = block_inputs(module)
    calls = assert_same_numbers(module, [x.to(memory_format=layout), temb])
    assert calls.counts["group_norm_silu_fwd"] == {"cpu": 2}
    assert calls.counts["group_norm_silu_bwd"] == {"cpu": 2}


def test_resnet_block_dropout_draws_the_same_numbers():
    module = block(dropout=0.5).train()
    assert_same_numbers(module, block_inputs(module))


def test_resnet_block_large_batch_upsampling():
    module = block(up=True)
    assert_same_numbers(module.to(memory_format=torch.channels_last), block_inputs(module, 64))


def test_resnet_block_checks_its_time_embedding():
    module = block(time_embedding_norm="scale_shift", temb_channels=None)
    vitkit.patch(module)
    with pytest.raises(ValueError, match="temb"):
        module(randn(2, 16, 8, 8), None)


def test_hook_on_a_fused_norm_added_later_is_run():
    module = block()
    inputs = block_inputs(module)
    expected = module(*inputs)
    vitkit.patch(module)
    seen = []
    handle = module.norm2.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    with KernelCalls() as calls:
        torch.testing.assert_close(module(*inputs), expected, rtol=1e-5, atol=1e-5)
    assert seen == [(2, 16, 8, 8)] and counts(calls) == {}
    handle.remove()
    with KernelCalls() as calls:
        module(*inputs)
    assert calls.total("group_norm_silu_fwd") == 2


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda m: setattr(m, "nonlinearity", torch.nn.GELU()), "its activation is GELU"),
        (lambda m: setattr(m, "norm2", torch.nn.BatchNorm2d(16)), "its norms are not"),
        (lambda m: m.norm1.register_forward_hook(lambda m, i, o: None), "have hooks"),
    ],
    ids=["other_activation", "other_norm", "hook_on_a_norm"],
)
def test_resnet_block_refused(change, reason):
    module = block()
    change(module)
    report = vitkit.patch(module)
    assert reason in {s.name: s.reason for s in report.skipped}[""]
    assert type(module) is ResnetBlock2D


def test_other_blocks_are_named():
    module = ResnetBlockCondNorm2D(in_channels=16, groups=4, temb_channels=24)
    assert "no rule for diffusers's ResnetBlockCondNorm2D" in str(vitkit.patch(module))


# ---- Attention ----

ATTENTION = {
    "self": {},
    "cross": {"cross_attention_dim": 24},
    "biased_head_dim_40_of_sd15": {"bias": True, "heads": 2, "dim_head": 40},
    "vae_like": {"norm_num_groups": 4, "residual_connection": True, "bias": True},
    "rescaled": {"residual_connection": True, "rescale_output_factor": 2**0.5},
    "layer_norm_of_context": {"cross_attention_dim": 24, "cross_attention_norm": "layer_norm"},
    "group_norm_of_context": {
        "cross_attention_dim": 24,
        "cross_attention_norm": "group_norm",
        "cross_attention_norm_num_groups": 4,
    },
    "qk_norm": {"qk_norm": "layer_norm"},
    "spatial_norm": {"spatial_norm_dim": 4, "residual_connection": True},
}


def attention(**options):
    return seeded(Attention(**{"query_dim": 32, "heads": 2, "dim_head": 16, **options}))


@pytest.mark.parametrize("spatial", [False, True], ids=["tokens", "image"])
@pytest.mark.parametrize("options", ATTENTION.values(), ids=ATTENTION)
def test_attention(options, spatial):
    if ("spatial_norm_dim" in options) and not spatial:
        pytest.skip("spatial norm takes images")
    module = attention(**options)
    x = randn(2, 32, 4, 4) if spatial else randn(2, 16, 32)
    inputs = [x, randn(2, 7, 24, seed=2) if module.is_cross_attention else None]
    extra = {"temb": randn(2, 4, 4, 4, seed=3)} if "spatial_norm_dim" in options else {}
    calls = assert_same_numbers(module, inputs, extra)
    assert calls.counts["flash_attention_fwd"] == {"cpu": 1}


def test_attention_in_channels_last():
    module = attention(norm_num_groups=4, residual_connection=True)
    x = randn(2, 32, 4, 6).to(memory_format=torch.channels_last)
    expected = module(x)
    with vitkit.patched(module), KernelCalls() as calls:
        actual = module(x)
    assert calls.counts["group_norm_silu_fwd"] == {"cpu": 1}
    assert actual.stride() == expected.stride()


def key_mask(batch, keys, kept):
    bias = torch.zeros(batch, 1, keys)
    bias[:, :, kept:] = -10000.0
    return bias


MASKS = {
    "key_padding_as_unet_makes_it": key_mask(2, 7, 5),
    "per_query": randn(2, 16, 7, seed=5),
    "repeated_for_heads": randn(4, 16, 7, seed=5),
    "learned_for_heads_and_keys": randn(4, 1, 7, seed=5),
}


@pytest.mark.parametrize("processor", [processors.AttnProcessor2_0, processors.AttnProcessor])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_attention_masks(mask, processor):
    module = attention(cross_attention_dim=24)
    module.set_processor(processor())
    calls = assert_same_numbers(
        module, [randn(2, 16, 32), randn(2, 7, 24, seed=2)], {"attention_mask": mask}
    )
    assert calls.counts["flash_attention_fwd"] == {"cpu": 1}


def test_unscaled_attention_has_the_plain_processor_and_its_scale():
    module = attention(scale_qk=False)
    assert type(module.processor) is processors.AttnProcessor
    assert assert_same_numbers(module, [randn(2, 16, 32)]).total("flash_attention_fwd") == 1


def test_upcast_attention():
    module = attention(upcast_attention=True, upcast_softmax=True)
    module.set_processor(processors.AttnProcessor())
    assert_same_numbers(module, [randn(2, 16, 32)])


class Doubling:
    """A processor of somebody's own."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return 2 * hidden_states


def test_a_processor_set_later_runs_and_stays():
    module = attention()
    vitkit.patch(module)
    module.set_processor(Doubling())
    x = randn(2, 16, 32)
    assert torch.equal(module(x), 2 * x)
    vitkit.unpatch(module)
    assert type(module.processor) is Doubling and torch.equal(module(x), 2 * x)


@pytest.mark.parametrize(
    "options, processor, reason",
    [
        ({"dim_head": 512, "heads": 1}, None, "up to 256, not 512"),
        ({"dim_head": 12}, None, "multiple of 8"),
        ({"heads": 4, "kv_heads": 2}, None, "fewer key and value heads"),
        ({}, Doubling(), "its processor is Doubling"),
        ({}, processors.SlicedAttnProcessor(1), "its processor is SlicedAttnProcessor"),
    ],
    ids=["vae_head_dim", "odd_head_dim", "grouped_queries", "own_processor", "sliced"],
)
def test_attention_refused(options, processor, reason):
    module = attention(**options)
    if processor is not None:
        module.set_processor(processor)
    report = vitkit.patch(module)
    assert reason in report.skipped[0].reason and type(module) is Attention


def test_fused_projections_are_diffusers_own():
    """Before the patch: refused with the reason. After it: the fused processor runs."""
    module = attention()
    module.fuse_projections()
    module.set_processor(processors.FusedAttnProcessor2_0())
    assert "its processor is FusedAttnProcessor2_0" in vitkit.patch(module).skipped[0].reason
    later = attention()
    x = randn(2, 16, 32)
    expected = later(x)
    vitkit.patch(later)
    later.fuse_projections()
    later.set_processor(processors.FusedAttnProcessor2_0())
    with KernelCalls() as calls:
        torch.testing.assert_close(later(x), expected)
    assert calls.counts == {}


# ---- text and images in one sequence ----


def flux_attention(**options):
    from diffusers.models.transformers.transformer_flux import FluxAttention

    added = {"added_kv_proj_dim": 32, "context_pre_only": False}
    return seeded(
        FluxAttention(**{"query_dim": 32, "heads": 2, "dim_head": 16, **added, **options})
    )


def flux_inputs():
    table = randn(9, 8, seed=3).repeat_interleave(2, dim=1)
    return [randn(2, 6, 32), randn(2, 3, 32, seed=2)], {
        "image_rotary_emb": (table.cos(), table.sin())
    }


@pytest.mark.parametrize("bias", [None, randn(1, 1, 9, 9)], ids=["", "masked"])
def test_flux_attention_with_fused_projections(bias):
    module = flux_attention(bias=True)
    inputs, kwargs = flux_inputs()
    expected = module(*inputs, bias, **kwargs)
    module.fuse_projections()
    vitkit.patch(module)
    with KernelCalls() as calls:
        found = module(*inputs, bias, **kwargs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert calls.counts == {"rope_2d_fwd": {"cpu": 1}, "flash_attention_fwd": {"cpu": 1}}


def test_flux_keeps_the_backend_that_was_chosen():
    inputs, kwargs = flux_inputs()
    module = flux_attention()
    expected = module(*inputs, **kwargs)
    vitkit.patch(module)
    module.set_attention_backend("_native_math")
    with KernelCalls() as calls:
        torch.testing.assert_close(module(*inputs, **kwargs), expected, rtol=1e-4, atol=1e-4)
    assert calls.counts == {}
    vitkit.unpatch(module)
    assert "backend of diffusers other than 'native'" in vitkit.patch(module).skipped[0].reason


def test_sd3_attention_whose_text_is_not_projected_back():
    options = {"added_kv_proj_dim": 32, "context_pre_only": True, "qk_norm": "rms_norm"}
    module = attention(**options, processor=processors.JointAttnProcessor2_0())
    calls = assert_same_numbers(module, [randn(2, 6, 32), randn(2, 3, 32, seed=2)])
    assert calls.counts["flash_attention_fwd"] == {"cpu": 1}


# ---- whole models ----


def unet(**options):
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 2,
            "cross_attention_dim": 24,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            **options,
        }
    )


UNET_INPUTS = [randn(2, 4, 8, 8), torch.tensor([3, 700]), randn(2, 7, 24, seed=2)]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_unet(training):
    model = unet().train(training)
    before = snapshot(model)
    calls = assert_same_numbers(model, UNET_INPUTS)
    blocks = sum(type(m) is ResnetBlock2D for m in model.modules())
    attentions = sum(type(m) is Attention for m in model.modules())
    transformers = sum(type(m).__name__ == "Transformer2DModel" for m in model.modules())
    # Two norms a block, one a transformer, conv_norm_out; each backward runs once.
    norms = 2 * blocks + transformers + 1
    assert counts(calls) == {
        "group_norm_silu_fwd": {"cpu": norms},
        "group_norm_silu_bwd": {"cpu": norms},
        "flash_attention_fwd": {"cpu": attentions},
        "flash_attention_bwd": {"cpu": attentions},
        "geglu_fwd": {"cpu": transformers},  # one block each
        "geglu_bwd": {"cpu": transformers},
    }
    assert (blocks, attentions, transformers) == (8, 8, 4)
    assert snapshot(model) == before


def test_unet_with_masked_text():
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]], dtype=torch.bool)
    assert_same_numbers(unet(), UNET_INPUTS, {"encoder_attention_mask": mask})


def test_unet_that_scales_and_shifts():
    assert_same_numbers(unet(resnet_time_scale_shift="scale_shift"), UNET_INPUTS)


def test_unet_checkpointed():
    model = unet().train()
    plain = assert_same_numbers(model, UNET_INPUTS)
    model.enable_gradient_checkpointing()
    calls = assert_same_numbers(model, UNET_INPUTS)
    assert calls.total("flash_attention_fwd") == 2 * plain.total("flash_attention_fwd")


def test_unet_keeps_its_processors_and_slicing():
    """A patched model still answers diffusers' own switches."""
    model = unet()
    names = {n: type(p) for n, p in model.attn_processors.items()}
    expected = model(*UNET_INPUTS).sample
    with vitkit.patched(model):
        assert {n: type(p) for n, p in model.attn_processors.items()} == names
        model.set_attention_slice(1)
        with KernelCalls() as calls:
            actual = model(*UNET_INPUTS).sample
        assert calls.total("flash_attention_fwd") == 0
        model.set_default_attn_processor()
        with KernelCalls() as calls:
            model(*UNET_INPUTS)
        assert calls.total("flash_attention_fwd") == 8
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_unet_saves_and_loads_unchanged(tmp_path):
    model = unet()
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    vitkit.patch(model)
    model.save_pretrained(tmp_path)
    loaded = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    assert not vitkit.is_patched(loaded)
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) for k, v in loaded.state_dict().items())


def test_ddpm_unet():
    model = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    calls = assert_same_numbers(seeded(model), [randn(2, 3, 8, 8), torch.tensor([3, 700])])
    assert calls.total("flash_attention_fwd") == 4


def vae(**options):
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        **{
            "block_out_channels": (16, 32),
            "norm_num_groups": 4,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "layers_per_block": 1,
            **options,
        }
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_vae(layout):
    model = vae().to(memory_format=layout)
    x = randn(2, 3, 16, 16).to(memory_format=layout)
    calls = assert_same_numbers(model, [x])
    blocks = sum(type(m) is ResnetBlock2D for m in model.modules())
    assert calls.counts["group_norm_silu_fwd"] == {"cpu": 2 * blocks + 4}  # 2 attention, 2 out
    assert calls.counts["flash_attention_fwd"] == {"cpu": 2}


def test_vae_with_the_real_head_dim_says_what_it_leaves():
    model = vae(block_out_channels=(16, 512))
    report = vitkit.patch(model)
    left = {s.name: s.reason for s in report.skipped}
    assert set(left) == {"encoder.mid_block.attentions.0", "decoder.mid_block.attentions.0"}
    assert "up to 256, not 512" in left["decoder.mid_block.attentions.0"]
    vitkit.unpatch(model)
    with pytest.raises(ValueError, match="up to 256, not 512"):
        vitkit.patch(model, strict=True)


def test_norm_and_activation_stay_right_when_only_one_is_unpatched():
    decoder = vae().decoder
    z = randn(1, 4, 4, 4)
    expected = decoder(z)
    for part in ("conv_norm_out", "conv_act"):
        vitkit.patch(decoder)
        vitkit.unpatch(getattr(decoder, part))
        torch.testing.assert_close(decoder(z), expected, rtol=1e-4, atol=1e-4)
        vitkit.unpatch(decoder)


def test_hook_on_an_absorbed_activation_added_later_sees_what_it_should():
    decoder = vae().decoder
    z = randn(1, 4, 4, 4)
    vitkit.patch(decoder)
    seen = []
    decoder.conv_act.register_forward_hook(lambda m, i, o: seen.append((i[0], o)))
    decoder(z)
    torch.testing.assert_close(torch.nn.functional.silu(seen[0][0]), seen[0][1])
    twin = copy.deepcopy(decoder)
    assert twin.conv_act.vitkit_partner[0] is twin.conv_norm_out


def test_low_precision_keeps_the_tolerance():
    model = vae().decoder.to(torch.bfloat16)
    assert vitkit.verify(model, randn(1, 4, 4, 4).to(torch.bfloat16), seconds=0).ok


def test_one_model_of_several_hosts():
    timm = pytest.importorskip("timm")

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encode = vae().encoder
            self.pool = timm.layers.AttentionPoolLatent(8, num_heads=1)

        def forward(self, x):
            return self.pool(self.encode(x).flatten(2).transpose(1, 2))

    calls = assert_same_numbers(Both(), [randn(1, 3, 16, 16)])
    assert calls.total("flash_attention_fwd") == 2
