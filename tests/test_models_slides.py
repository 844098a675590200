"""vitkit.models of slides and text against their computation written out in plain PyTorch, with
the weights under their published names."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from model_hosts import seeded
from numerics import assert_parity, double
from test_dilated_attention import eager_dilated_attention

from vitkit.models import create, entry

pytestmark = pytest.mark.usefixtures("one_thread")


class Weights:
    """Linear and LayerNorm by the names of a state_dict."""

    def __init__(self, model, dtype):
        self.w = {k: v.to(dtype) for k, v in model.state_dict().items()}

    def __getitem__(self, name):
        return self.w[name]

    def linear(self, name, x):
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, name, x, eps=1e-5):
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps)


def attention(q, k, v, heads, bias=None):
    """softmax(q k' / sqrt(d) + bias) v of [B, N, E] tokens."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores if bias is None else scores + bias
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def check(name, written_out, *, terms=4096, **options):
    """The model's output is that of ``written_out(weights, config, *inputs)``."""
    model = seeded(create(name, reduced=True, **options)).eval()
    torch.manual_seed(1)
    inputs = model.example_inputs()
    with torch.no_grad():
        actual = model(*inputs)
        eager = written_out(Weights(model, torch.float32), model.config, *inputs)
        exact = written_out(Weights(model, torch.float64), model.config, *double(*inputs))
    assert exact.std() > 0
    assert_parity(name, actual, eager, exact, terms=terms)


def longnet(w, c, tiles, coords):
    x = w.linear("patch_embed.proj", tiles)
    cells = (coords / c.tile_size).floor().double()
    omega = 10000 ** (-torch.arange(c.dim // 4, dtype=torch.float64) / (c.dim // 4))
    places = [cells[..., axis, None] * omega for axis in (1, 0)]
    table = torch.cat([f(p) for p in places for f in (torch.sin, torch.cos)], -1)
    x = torch.cat([w["cls_token"], x + table.float().to(x.dtype)], 1)
    for i in range(c.depth):
        name = f"encoder.layers.{i}"
        h = w.norm(f"{name}.self_attn_layer_norm", x)
        q, k, v = (w.linear(f"{name}.self_attn.{p}_proj", h) for p in "qkv")
        q, k, v = (t.unflatten(-1, (c.num_heads, -1)) for t in (q, k, v))
        scale = q.shape[-1] ** -0.5
        ratios = [1, 2, 4, 8, 16]
        h = eager_dilated_attention(q, k, v, c.segment_lengths, ratios, False, scale, True)[0]
        h = w.norm(f"{name}.self_attn.inner_attn_ln", h.flatten(2))
        x = x + w.linear(f"{name}.self_attn.out_proj", h)
        h = F.gelu(w.linear(f"{name}.ffn.fc1", w.norm(f"{name}.final_layer_norm", x)))
        x = x + w.linear(f"{name}.ffn.fc2", w.norm(f"{name}.ffn.ffn_layernorm", h))
    x = w.norm("encoder.layer_norm", x)
    return w.norm("norm", x[:, 1:].mean(1) if c.pool == "mean" else x[:, 0], 1e-6)


def test_gigapath_slide():
    check("gigapath_slide", longnet)
    check("gigapath_slide", longnet, pool="mean")


def test_gigapath_slide_is_small():
    """Apart from its parameters the full model keeps less than two megabytes."""
    with torch.device("meta"):
        model = create("gigapath_slide")
    assert sum(b.numel() * b.element_size() for b in model.buffers()) < 2e6
    assert not [k for k in model.state_dict() if "pos" in k]


def titan(w, c, features, coords, size):
    assert c.num_heads == 3
    slopes = [2.0**-4, 2.0**-8, 2.0**-2]
    cells = ((coords - coords.amin(0)) // size).to(features.dtype)
    distance = (cells[:, None] - cells).square().sum(-1).sqrt()
    bias = F.pad(-torch.tensor(slopes).to(features)[:, None, None] * distance, (1, 0, 1, 0))
    x = F.gelu(w.linear("patch_embed.0", features[None]))
    x = torch.cat([w["cls_token"], x], 1)
    for i in range(c.depth):
        name = f"blocks.modules_list.{i}"
        q, k, v = w.linear(f"{name}.attn.qkv", w.norm(f"{name}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + w.linear(f"{name}.attn.proj", attention(q, k, v, c.num_heads, bias))
        h = F.gelu(w.linear(f"{name}.mlp.fc1", w.norm(f"{name}.norm2", x, 1e-6)))
        x = x + w.linear(f"{name}.mlp.fc2", h)
    x = w.norm("norm", x, 1e-6)
    name = "attn_pool_contrastive"
    q, x = w.norm(f"{name}.ln_q", w[f"{name}.query"])[None], w.norm(f"{name}.ln_k", x)
    weights = w[f"{name}.attn.in_proj_weight"].chunk(3)
    biases = w[f"{name}.attn.in_proj_bias"].chunk(3)
    q, k, v = (F.linear(t, a, b) for t, a, b in zip((q, x, x), weights, biases, strict=True))
    return w.linear(f"{name}.attn.out_proj", attention(q, k, v, c.pool_heads))[:, 0] @ w["proj"]


def test_titan():
    check("titan", titan)


def test_slopes_of_titan():
    """Twelve heads: those of eight, then every second one of sixteen."""
    slopes = create("titan", depth=1).bfloat16().log_slopes.float().exp2()
    expected = [2.0**-i for i in range(1, 9)] + [2.0 ** -(i + 0.5) for i in range(4)]
    torch.testing.assert_close(slopes, torch.tensor(expected), atol=0, rtol=2e-7)


def prism(w, c, tiles, mask):
    x = w["perceiver.latents"][None]

    def feed_forward(name, x):
        h, gate = w.linear(f"{name}.net.0", w.norm(f"{name}.norm", x)).chunk(2, -1)
        return w.linear(f"{name}.net.2", h * F.gelu(gate))

    for i in range(c.blocks):
        name = f"perceiver.layers.{i}.xattn"
        q = w.linear(f"{name}.xattn.to_q", w.norm(f"{name}.xattn.x_norm", x))
        k, v = w.linear(f"{name}.xattn.to_kv", tiles).chunk(2, -1)
        x = x + w.linear(f"{name}.xattn.to_out", attention(q, k, v, 1))
        x = x + feed_forward(f"{name}.ff", x)
        for j in range(c.layers):
            name = f"perceiver.layers.{i}.tf.{j}"
            h = w.norm(f"{name}.mhsa.norm", x)
            q, k, v = F.linear(h, w[f"{name}.mhsa.mha.in_proj_weight"]).chunk(3, -1)
            x = x + w.linear(f"{name}.mhsa.mha.out_proj", attention(q, k, v, c.num_heads))
            x = x + feed_forward(f"{name}.ff", x)
    return w.norm("cls_norm", x[:, 0])


def test_prism():
    """The state_dict names shared weights once per block, as the published one does."""
    check("prism", prism)
    model = create("prism", reduced=True)
    layers = model.perceiver.layers
    assert layers[1].xattn is layers[2].xattn is not layers[0].xattn
    assert layers[0].tf is layers[2].tf


def flamingo(w, c, features):
    b, t = features.shape[:2]
    x = features.flatten(2, 3).flatten(0, 1)
    latents = w["latents"].expand(b * t, -1, -1)
    for i in range(c.depth):
        name = f"layers.{i}.0"
        h = w.norm(f"{name}.norm_latents", latents)
        context = torch.cat([w.norm(f"{name}.norm_media", x), h], 1)
        k, v = w.linear(f"{name}.to_kv", context).chunk(2, -1)
        h = attention(w.linear(f"{name}.to_q", h), k, v, c.num_heads)
        latents = latents + w.linear(f"{name}.to_out", h)
        h = F.gelu(w.linear(f"layers.{i}.1.1", w.norm(f"layers.{i}.1.0", latents)))
        latents = latents + w.linear(f"layers.{i}.1.3", h)
    return w.norm("norm", latents).unflatten(0, (b, t))


def test_flamingo_resampler():
    check("flamingo_resampler", flamingo)


def fit(w, c, x, t, y, grid, mask):
    def modulate(name, x, shift, scale):
        return F.layer_norm(x, x.shape[-1:], None, None, 1e-6) * (1 + scale) + shift

    def turn(t, cos, sin):
        a, b = t[..., ::2], t[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)

    x = w.linear("x_embedder.proj", x.transpose(1, 2))
    freqs = torch.exp(-math.log(10000) * torch.arange(128).float() / 128)
    angles = t.float()[:, None] * freqs
    time = torch.cat([angles.cos(), angles.sin()], -1).to(x.dtype)
    time = w.linear("t_embedder.mlp.2", F.silu(w.linear("t_embedder.mlp.0", time)))
    condition = F.silu(time + w["y_embedder.embedding_table.weight"][y])
    axis = c.dim // c.num_heads // 2
    freqs = 10000 ** -(torch.arange(0, axis, 2).float() / axis)
    angles = torch.cat([grid[:, 1, :, None] * freqs, grid[:, 0, :, None] * freqs], -1)
    cos, sin = (f(angles)[:, :, None].to(x.dtype) for f in (torch.cos, torch.sin))
    same = mask[:, None, :, None] == mask[:, None, None]
    bias = torch.zeros(same.shape, dtype=x.dtype).masked_fill(~same, -math.inf)
    real = (mask != 0)[..., None]
    for i in range(c.depth):
        name = f"blocks.{i}"
        parts = w.linear(f"{name}.adaLN_modulation.1", condition)[:, None].chunk(6, -1)
        h = w.linear(f"{name}.attn.qkv", modulate("norm1", x, *parts[:2])).chunk(3, -1)
        q, k = (turn(p.unflatten(-1, (c.num_heads, -1)), cos, sin).flatten(2) for p in h[:2])
        h = attention(q, k, h[2], c.num_heads, bias)
        x = x + parts[2] * w.linear(f"{name}.attn.proj", h * real)
        h = modulate("norm2", x, *parts[3:5])
        h = F.silu(w.linear(f"{name}.mlp.fc1_g", h)) * w.linear(f"{name}.mlp.fc1_x", h)
        x = x + parts[5] * w.linear(f"{name}.mlp.fc2", h)
    parts = w.linear("final_layer.adaLN_modulation.1", condition)[:, None].chunk(2, -1)
    return (w.linear("final_layer.linear", modulate("norm_final", x, *parts)) * real).transpose(
        1, 2
    )


def test_fit():
    check("fit_xl2", fit)


def test_hipt_region_transformer():
    """The second ViT with the names of its repository."""
    model = seeded(create("hipt", reduced=True)).eval()
    w, c = Weights(model.model4k, torch.float32), model.config
    grid = torch.randn(2, c.tile.dim, c.position_grid, c.position_grid)
    x = F.gelu(w.linear("phi.0", grid.flatten(2).transpose(1, 2)))
    x = torch.cat([w["cls_token"].expand(2, -1, -1), x], 1) + w["pos_embed"]
    for i in range(c.depth):
        q, k, v = w.linear(f"blocks.{i}.attn.qkv", w.norm(f"blocks.{i}.norm1", x, 1e-6)).chunk(
            3, -1
        )
        x = x + w.linear(f"blocks.{i}.attn.proj", attention(q, k, v, c.num_heads))
        h = F.gelu(w.linear(f"blocks.{i}.mlp.fc1", w.norm(f"blocks.{i}.norm2", x, 1e-6)))
        x = x + w.linear(f"blocks.{i}.mlp.fc2", h)
    torch.testing.assert_close(model.model4k(grid), w.norm("norm", x, 1e-6), atol=2e-5, rtol=2e-5)
    assert entry("hipt").config.dim == 192
