"""vitkit.models against timm: full configurations name by name, numbers at reduced size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from model_hosts import assert_loads_and_agrees, shapes

from vitkit.models import create, entry

timm = pytest.importorskip("timm")
from timm.layers import SwiGLUPacked  # noqa: E402
from timm.models.beit import Beit  # noqa: E402
from timm.models.eva import Eva  # noqa: E402
from timm.models.swin_transformer import SwinTransformer  # noqa: E402
from timm.models.swin_transformer_v2 import SwinTransformerV2  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

SWIGLU = {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU}
SCALED = {"init_values": 1e-5, "num_classes": 0}
BARE = {"num_classes": 0}
# Name here -> name in timm and what the model card says to build it with.
FULL = {
    "vit_s16": ("vit_small_patch16_224", {}),
    "vit_b16": ("vit_base_patch16_224", {}),
    "vit_l16": ("vit_large_patch16_224", {}),
    "vit_h14": ("vit_huge_patch14_224", {"num_classes": 1000}),
    "vit_g14": ("vit_giant_patch14_224", {}),
    "dino_s16": ("vit_small_patch16_224", BARE),
    "dino_s8": ("vit_small_patch8_224", BARE),
    "dino_b8": ("vit_base_patch8_224", BARE),
    "dinov2_s14": ("vit_small_patch14_dinov2", BARE),
    "dinov2_b14": ("vit_base_patch14_dinov2", BARE),
    "dinov2_l14": ("vit_large_patch14_dinov2", BARE),
    "dinov2_g14": ("vit_giant_patch14_dinov2", BARE),
    "dinov2_b14_reg4": ("vit_base_patch14_reg4_dinov2", BARE),
    "dinov2_g14_reg4": ("vit_giant_patch14_reg4_dinov2", BARE),
    "dinov3_s16": ("vit_small_patch16_dinov3", BARE),
    "dinov3_s16_plus": ("vit_small_plus_patch16_dinov3", BARE),
    "dinov3_b16": ("vit_base_patch16_dinov3", BARE),
    "dinov3_l16": ("vit_large_patch16_dinov3", BARE),
    "dinov3_h16_plus": ("vit_huge_plus_patch16_dinov3", BARE),
    "dinov3_7b16": ("vit_7b_patch16_dinov3", BARE),
    "siglip_b16": ("vit_base_patch16_siglip_224", BARE),
    "siglip_l16": ("vit_large_patch16_siglip_256", BARE),
    "siglip_so400m14": ("vit_so400m_patch14_siglip_224", BARE),
    "uni": ("vit_large_patch16_224", SCALED),
    "uni2_h": (
        "vit_giant_patch14_224",
        {
            "depth": 24,
            "num_heads": 24,
            "embed_dim": 1536,
            "mlp_ratio": 2.66667 * 2,
            "no_embed_class": True,
            "reg_tokens": 8,
            **SCALED,
            **SWIGLU,
        },
    ),
    "virchow": ("vit_huge_patch14_224", {"mlp_ratio": 5.3375, **SCALED, **SWIGLU}),
    "virchow2": (
        "vit_huge_patch14_224",
        {"mlp_ratio": 5.3375, "reg_tokens": 4, **SCALED, **SWIGLU},
    ),
    "gigapath_tile": (
        "vit_giant_patch14_dinov2",
        {"img_size": 224, "patch_size": 16, "mlp_ratio": 5.33334, **SCALED},
    ),
    "h_optimus": ("vit_giant_patch14_reg4_dinov2", {"img_size": 224, **SCALED}),
    "beit_b16": ("beit_base_patch16_224", {}),
    "beit_l16": ("beit_large_patch16_224", {}),
    "swin_t": ("swin_tiny_patch4_window7_224", {}),
    "swin_s": ("swin_small_patch4_window7_224", {}),
    "swin_b": ("swin_base_patch4_window7_224", {}),
    "swin_b_384": ("swin_base_patch4_window12_384", {}),
    "swinv2_t": ("swinv2_tiny_window8_256", {}),
    "swinv2_b": ("swinv2_base_window8_256", {}),
    "swinv2_b_w16": ("swinv2_base_window16_256", {}),
}


@pytest.mark.parametrize("name", FULL)
def test_full_configuration_is_timms(name):
    """The same names with the same shapes, and what shapes do not show."""
    host_name, options = FULL[name]
    with torch.device("meta"):
        ours, host = create(name), timm.create_model(host_name, **options)
    assert shapes(ours) == shapes(host)
    config = entry(name).config
    size = host.patch_embed.img_size or (config.image_size,) * 2
    assert tuple(size) == (config.image_size,) * 2
    if hasattr(host, "blocks"):
        assert host.blocks[0].attn.num_heads == config.num_heads
    else:
        for theirs, mine in zip(host.layers, ours.layers, strict=True):
            for a, b in zip(theirs.blocks, mine.blocks, strict=True):
                assert tuple(a.window_size) == b.attn.window_size
                assert tuple(a.shift_size) == b.attn.shift_size


def encoder_options(c):
    """What all of timm's transformers take."""
    return {
        "img_size": c.image_size,
        "patch_size": c.patch_size,
        "embed_dim": c.dim,
        "depth": c.depth,
        "num_heads": c.num_heads,
        "mlp_ratio": (c.mlp_hidden + 0.5) / c.dim,
        "init_values": c.layer_scale,
    }


def vit_host(c, **options):
    gated = SWIGLU if c.mlp == "swiglu" else {}
    pools = {"token": "token", "map": "map", "mean": "avg", "token_mean": "", "none": ""}
    return VisionTransformer(
        **encoder_options(c),
        class_token=c.class_token,
        reg_tokens=c.registers,
        no_embed_class=not c.prefix_positions,
        global_pool=pools[c.pool],
        fc_norm=c.norm_after_pool,
        num_classes=c.num_classes,
        dynamic_img_size=True,
        **gated,
        **options,
    )


VITS = ["vit_b16", "vit_h14", "dinov2_g14_reg4", "siglip_so400m14", "virchow2", "uni2_h"]


def run(model, cast, *inputs):
    return model(*cast(*inputs))


def images(size, batch=2, seed=3):
    generator = torch.Generator().manual_seed(seed)
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, 3, height, width, generator=generator)


@pytest.mark.parametrize("name", VITS)
def test_vit(name):
    """Also on an image of another size, for which positions are resampled."""
    ours = create(name, reduced=True)
    c, patch = ours.config, ours.config.patch_size
    sizes = [c.image_size, (4 * patch, 5 * patch)]

    def host_call(model, cast):
        outs = tuple(run(model, cast, images(s)) for s in sizes)
        if c.pool == "token_mean":
            return tuple(torch.cat([x[:, 0], x[:, c.prefix :].mean(1)], -1) for x in outs)
        return outs

    def ours_call(model, cast):
        return tuple(run(model, cast, images(s)) for s in sizes)

    assert_loads_and_agrees(ours, vit_host(c), ours_call, host_call)


def test_vit_with_the_norm_after_the_pool():
    options = {"pool": "mean", "norm_after_pool": True}
    ours = create("vit_b16", reduced=True, **options)

    def call(model, cast):
        return run(model, cast, images(ours.config.image_size))

    assert_loads_and_agrees(ours, vit_host(ours.config), call)


@pytest.mark.parametrize("name", ["dinov3_b16", "dinov3_h16_plus"])
def test_dinov3(name):
    ours = create(name, reduced=True)
    c = ours.config
    host = Eva(
        **encoder_options(c),
        swiglu_mlp=c.mlp == "swiglu",
        swiglu_align_to=8 if c.mlp == "swiglu" else 0,
        qkv_bias=False,
        rope_type="dinov3",
        rope_temperature=c.theta,
        rope_rotate_half=True,
        use_rot_pos_emb=True,
        use_abs_pos_emb=False,
        num_reg_tokens=c.registers,
        use_fc_norm=False,
        dynamic_img_size=True,
        norm_layer=lambda dim, **kw: torch.nn.LayerNorm(dim, eps=c.eps, **kw),
        global_pool="token",
        num_classes=0,
    )

    def call(model, cast):
        sizes = (c.image_size, (4 * c.patch_size, 2 * c.patch_size))
        return tuple(run(model, cast, images(s)) for s in sizes)

    assert_loads_and_agrees(ours, host, call)


def test_beit():
    ours = create("beit_b16", reduced=True, num_classes=5)
    c = ours.config
    host = Beit(
        **encoder_options(c),
        use_abs_pos_emb=False,
        use_rel_pos_bias=True,
        num_classes=5,
        norm_layer=lambda dim, **kw: torch.nn.LayerNorm(dim, eps=c.eps, **kw),
    )

    def call(model, cast):
        return run(model, cast, images(c.image_size))

    assert_loads_and_agrees(ours, host, call)


def swin_host(c, **options):
    cls = SwinTransformer if c.version == 1 else SwinTransformerV2
    return cls(
        img_size=c.image_size,
        patch_size=4,
        embed_dim=c.dim,
        depths=c.depths,
        num_heads=c.num_heads,
        window_size=c.window_size,
        num_classes=c.num_classes,
        drop_path_rate=0.0,
        **options,
    )


class ConvStem(torch.nn.Module):
    """The stem CTransPath's repository gives to timm, as its paper describes it."""

    def __init__(self, img_size, embed_dim, norm_layer, **options):
        super().__init__()
        self.grid_size = (img_size // 4,) * 2
        self.proj = torch.nn.Sequential(
            torch.nn.Conv2d(3, embed_dim // 8, 3, stride=2, padding=1, bias=False),
            torch.nn.BatchNorm2d(embed_dim // 8),
            torch.nn.ReLU(),
            torch.nn.Conv2d(embed_dim // 8, embed_dim // 4, 3, stride=2, padding=1, bias=False),
            torch.nn.BatchNorm2d(embed_dim // 4),
            torch.nn.ReLU(),
            torch.nn.Conv2d(embed_dim // 4, embed_dim, 1),
        )
        self.norm = norm_layer(embed_dim)

    def forward(self, x):
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


SWINS = {
    "v1": ("swin_t", {}),
    "v1_window_does_not_divide": ("swin_t", {"image_size": 76}),
    "v2": ("swinv2_t", {}),
    "v2_pretrained_on_other_windows": ("swinv2_t", {"pretrained_window_size": 6}),
    "ctranspath": ("ctranspath", {}),
}


@pytest.mark.parametrize(("name", "options"), SWINS.values(), ids=SWINS)
def test_swin(name, options):
    ours = create(name, reduced=True, **options)
    c, more = ours.config, {}
    if c.pretrained_window_size:
        more["pretrained_window_sizes"] = (c.pretrained_window_size,) * len(c.depths)
    if c.conv_stem:
        more["embed_layer"] = ConvStem

    def call(model, cast):
        return run(model, cast, images(c.image_size))

    assert_loads_and_agrees(ours, swin_host(c, **more), call)


class Pooler(torch.nn.Module):
    """open_clip's attention pool, on torch's own attention."""

    def __init__(self, dim, context_dim, heads, queries):
        super().__init__()
        self.query = torch.nn.Parameter(torch.randn(queries, dim))
        self.attn = torch.nn.MultiheadAttention(
            dim, heads, kdim=context_dim, vdim=context_dim, batch_first=True
        )
        self.ln_q, self.ln_k = torch.nn.LayerNorm(dim), torch.nn.LayerNorm(context_dim)

    def forward(self, x):
        query, x = self.ln_q(self.query).expand(len(x), -1, -1), self.ln_k(x)
        return self.attn(query, x, x, need_weights=False)[0]


class ConchHost(torch.nn.Module):
    def __init__(self, c):
        super().__init__()
        self.trunk = vit_host(c.trunk)
        self.attn_pool_contrast = Pooler(c.dim, c.trunk.dim, c.pool_heads, 1)
        self.ln_contrast = torch.nn.LayerNorm(c.dim)
        self.proj_contrast = torch.nn.Parameter(torch.randn(c.dim, c.dim))
        width = c.trunk.dim
        self.attn_pool_caption = Pooler(width, width, c.pool_heads, c.caption_queries)
        self.ln_caption = torch.nn.LayerNorm(width)

    def forward(self, x):
        tokens = self.trunk.forward_features(x)
        pooled = self.ln_contrast(self.attn_pool_contrast(tokens)[:, 0])
        return pooled @ self.proj_contrast, self.ln_caption(self.attn_pool_caption(tokens))


def test_conch():
    ours = create("conch", reduced=True)

    def ours_call(model, cast):
        x = cast(images(ours.config.image_size))[0]
        return model.project(model(x)), model.caption_tokens(x)

    def host_call(model, cast):
        return run(model, cast, images(ours.config.image_size))

    assert_loads_and_agrees(ours, ConchHost(ours.config), ours_call, host_call)


def test_conch_v1_5():
    """Its pool written out, with the weights under their published names."""
    ours = create("conch_v1_5", reduced=True).eval()
    x = images(ours.config.image_size)
    w = {k.removeprefix("attn_pool_contrast."): v for k, v in ours.state_dict().items()}
    with torch.no_grad():
        tokens = ours.trunk.forward_features(x)
        dim = ours.config.dim
        q = F.layer_norm(w["query"], (dim,), w["ln_q.weight"], w["ln_q.bias"])
        q = (q @ w["to_q.weight"].T).view(1, 1, 2, -1).transpose(1, 2)
        y = F.layer_norm(tokens, tokens.shape[-1:], w["ln_k.weight"], w["ln_k.bias"])
        k, v = (y @ w["to_kv.weight"].T).unflatten(-1, (2, 2, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) * (dim // 2) ** -0.5).softmax(-1)
        pooled = (weights @ v).transpose(1, 2).flatten(2)[:, 0] @ w["to_out.weight"].T
        expected = F.layer_norm(pooled, (dim,), w["ln_contrast.weight"], w["ln_contrast.bias"])
        torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)
