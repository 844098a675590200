"""timm's attention modules, patched: numbers, gradients, kernels called, and what is refused."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch
from patching import assert_same_numbers, replaced, snapshot

import vitkit
from vitkit.verify import KernelCalls

timm = pytest.importorskip("timm")
from timm.layers import Attention, AttentionPoolLatent, AttentionRope  # noqa: E402

LayerNorm = torch.nn.LayerNorm


def seeded(module, seed=0):
    """The module with every parameter drawn anew: biases and latents that start at zero would hide
    mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return module


def tokens(n=17, dim=48, batch=2, seed=1):
    return torch.randn(batch, n, dim, generator=torch.Generator().manual_seed(seed))


def random_mask(*shape, dtype=torch.bool):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) > 0.4
    mask[..., 0] = True
    return mask if dtype == torch.bool else torch.where(mask, 0.5, -3.0).to(dtype)


SELF_ATTENTION = {
    "plain": {},
    "biased": {"qkv_bias": True},
    "no_output_bias": {"proj_bias": False},
    "head_dim_72_of_siglip": {"dim": 144, "num_heads": 2},
    "head_dim_apart_from_width": {"attn_head_dim": 8, "dim_out": 24},
    "qk_norm": {"qk_norm": True, "norm_layer": LayerNorm},
    "scale_norm": {"scale_norm": True, "norm_layer": LayerNorm},
    "gated": {"gated": True},
}
CALLS = {
    "no_mask": {},
    "bool_mask_per_sample": {"attn_mask": random_mask(2, 1, 17, 17)},
    "float_mask_of_all": {"attn_mask": random_mask(17, 17, dtype=torch.float32)},
    "key_padding": {"attn_mask": random_mask(2, 1, 1, 17)},
    "causal": {"is_causal": True},
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("options", SELF_ATTENTION.values(), ids=SELF_ATTENTION)
def test_attention_variants(options, training):
    options = {"dim": 48, "num_heads": 3, **options}
    module = seeded(Attention(**options)).train(training)
    calls = assert_same_numbers(module, [tokens(dim=options["dim"])])
    assert calls.counts == {"flash_attention_fwd": {"cpu": 1}, "flash_attention_bwd": {"cpu": 1}}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_attention_masks(call):
    module = seeded(Attention(48, 3, qkv_bias=True))
    calls = assert_same_numbers(module, [tokens()], call)
    assert calls.total("flash_attention_fwd") == 1


ROPE = {
    "fused_qkv": {"qkv_fused": True},
    "separate_projections": {"qkv_fused": False},
    "grouped_queries": {"qkv_fused": False, "num_heads": 4, "dim": 64, "num_kv_heads": 2},
    "rotate_half": {"rotate_half": True},
    "no_prefix": {"num_prefix_tokens": 0},
    "qk_and_scale_norm": {"qk_norm": True, "scale_norm": True, "norm_layer": LayerNorm},
    "gated": {"gated": True},
}


@pytest.mark.parametrize("options", ROPE.values(), ids=ROPE)
def test_attention_rope(options):
    options = {"dim": 48, "num_heads": 3, **options}
    module = seeded(AttentionRope(**options))
    prefix = options.get("num_prefix_tokens", 1)
    rope = torch.randn(17 - prefix, 2 * module.head_dim)
    calls = assert_same_numbers(module, [tokens(dim=options["dim"]), rope])
    assert calls.total("flash_attention_fwd") == 1
    assert calls.counts["rope_2d_fwd"] == calls.counts["rope_2d_bwd"] == {"cpu": 1}
    calls = assert_same_numbers(
        module, [tokens(dim=options["dim"])], {"attn_mask": random_mask(2, 1, 17, 17)}
    )
    assert calls.total("flash_attention_fwd") == 1


TABLES = {
    "learned_per_head": (3, 16, 32),
    "of_each_sample": (2, 1, 16, 32),
    "of_each_sample_and_head": (2, 3, 16, 32),
}


@pytest.mark.parametrize("shape", TABLES.values(), ids=TABLES)
def test_attention_rope_tables(shape):
    """Given as an input, they have a gradient, as timm's mixed frequencies do."""
    calls = assert_same_numbers(seeded(AttentionRope(48, 3)), [tokens(), torch.randn(shape)])
    assert calls.total("rope_2d_fwd") == calls.total("flash_attention_fwd") == 1


def test_attention_rope_leaves_other_broadcasts_to_timm():
    module = seeded(AttentionRope(48, 3))
    vitkit.patch(module)
    with KernelCalls() as calls:
        module(tokens(), torch.randn(1, 32))  # one angle for every token
    assert calls.counts == {}


POOL = {
    "siglip": {"norm_layer": LayerNorm},
    "several_latents_averaged": {"latent_len": 3, "pool_type": "avg"},
    "all_latents": {"latent_len": 3, "pool_type": ""},
    "positions": {"pos_embed": "abs", "feat_size": 17},
    "qk_norm": {"qk_norm": True},
    "no_projections": {"out_features": 0, "q_proj": False},
}


@pytest.mark.parametrize("options", POOL.values(), ids=POOL)
def test_attention_pool(options):
    module = seeded(AttentionPoolLatent(48, num_heads=3, **options))
    calls = assert_same_numbers(module, [tokens()])
    assert calls.total("flash_attention_fwd") == 1
    calls = assert_same_numbers(module, [tokens()], {"attn_mask": random_mask(2, 1, 1, 17)})
    assert calls.total("flash_attention_fwd") == 1


def tiny_vit(**options):
    torch.manual_seed(0)
    defaults = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
    return timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, depth=2, **{**defaults, **options}
    )


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_whole_vit(images, training):
    model = tiny_vit().train(training)
    before = snapshot(model)
    calls = assert_same_numbers(model, [images])
    assert calls.counts["flash_attention_fwd"] == {"cpu": 2}
    assert snapshot(model) == before


def test_whole_vit_with_attention_pooling(images):
    model = tiny_vit(class_token=False, global_pool="map")
    calls = assert_same_numbers(model, [images])
    assert calls.total("flash_attention_fwd") == 3


def test_checkpointed_blocks(images):
    model = tiny_vit().train()
    model.set_grad_checkpointing(True)
    calls = assert_same_numbers(model, [images])
    assert calls.total("flash_attention_fwd") == 4  # each block again in the backward pass


def test_active_attention_dropout_runs_the_host(images):
    model = tiny_vit(attn_drop_rate=0.5, proj_drop_rate=0.25).train()
    torch.manual_seed(5)
    expected = model(images)
    with vitkit.patched(model) as report:
        assert "timm's own forward while attention dropout is active" in str(report)
        torch.manual_seed(5)
        with KernelCalls() as calls:
            torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
        assert calls.counts == {"gelu_fwd": {"cpu": 2}, "patch_embed_fwd": {"cpu": 1}}
        with KernelCalls() as calls:
            model.eval()(images)
        assert calls.total("flash_attention_fwd") == 2


def test_output_dropout_draws_the_same_numbers(images):
    assert_same_numbers(tiny_vit(proj_drop_rate=0.25).train(), [images])


def test_a_hook_on_the_attention_weights_gets_them():
    """Attention rollout reads the weights from attn_drop of an unfused module."""
    module = seeded(Attention(48, 3))
    module.fused_attn = False
    vitkit.patch(module)
    seen = []
    handle = module.attn_drop.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    with KernelCalls() as calls:
        module(tokens())
    assert seen == [(2, 3, 17, 17)] and calls.counts == {}
    handle.remove()
    with KernelCalls() as calls:
        module(tokens())
    assert calls.total("flash_attention_fwd") == 1


class LowRank(torch.nn.Module):
    """What PEFT does to a Linear: the base layer inside, a low-rank product added."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base_layer = base
        self.a = torch.nn.Linear(base.in_features, rank, bias=False)
        self.b = torch.nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.b(self.a(x))


def test_wrapped_projections_are_called(images):
    model = tiny_vit()
    for block in model.blocks:
        block.attn.qkv = LowRank(block.attn.qkv)
        block.attn.proj = LowRank(block.attn.proj)
    calls = assert_same_numbers(seeded(model), [images])
    assert calls.total("flash_attention_fwd") == 2


def test_wrapping_after_patching(images):
    model = tiny_vit()
    vitkit.patch(model)
    model.blocks[0].attn.qkv = LowRank(model.blocks[0].attn.qkv)
    patched = model(images)
    vitkit.unpatch(model)
    torch.testing.assert_close(patched, model(images))


def test_compiled_training_step(images):
    model = tiny_vit()
    expected = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
    vitkit.patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(images).square().sum(), list(model.parameters()))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_low_precision_keeps_the_tolerance(images):
    model = tiny_vit().eval().to(torch.bfloat16)
    assert vitkit.verify(model, images.to(torch.bfloat16), seconds=0).ok


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"num_heads": 4}, "multiple of 8 up to 256, not 12"),
        ({"num_heads": 1, "dim": 264}, "multiple of 8 up to 256, not 264"),
    ],
    ids=["odd_head_dim", "head_dim_too_large"],
)
def test_refused_head_dims(options, reason):
    report = vitkit.patch(Attention(**{"dim": 48, **options}))
    assert replaced(report) == [] and reason in report.skipped[0].reason


def test_refused_scale_and_subclass():
    class Louder(Attention):
        def forward(self, x, attn_mask=None, is_causal=False):
            return 2 * super().forward(x, attn_mask, is_causal)

    scaled = Attention(48, 3)
    scaled.scale = 1.0
    report = vitkit.patch(torch.nn.ModuleList([scaled, Louder(48, 3)]))
    reasons = [s.reason for s in report.skipped]
    assert "its scale is 1.0" in reasons[0] and "a subclass of timm's Attention" in reasons[1]


def test_unknown_host_source_is_refused(monkeypatch):
    """The module of a timm release that changed forward keeps it, and the report says why."""

    def forward(self, x, attn_mask=None, is_causal=False):
        return x

    engine = importlib.import_module("vitkit.patch.engine")
    rule = next(r for r in engine._rules() if r.cls is Attention)
    changed = dataclasses.replace(rule, repeats=((forward, rule.repeats[0][1]),))
    monkeypatch.setattr(engine, "_rules", lambda: [changed])
    report = vitkit.patch(Attention(48, 3))
    assert report.replaced == [] and "1.0.28 to 1.0.31" in report.skipped[0].reason
