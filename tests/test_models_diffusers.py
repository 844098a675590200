"""vitkit.models against diffusers: U-Nets, autoencoder, DiT."""

from __future__ import annotations

import re

import pytest
import torch
from model_hosts import assert_loads_and_agrees, seeded, shapes
from numerics import assert_parity

from vitkit.models import create

pytest.importorskip("diffusers")
from diffusers import (
    AutoencoderKL,
    DiTTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def unet_host(c):
    """diffusers' options of a configuration, in the words of the published config.json files."""
    common = {
        "sample_size": c.sample_size,
        "in_channels": c.in_chans,
        "out_channels": c.out_chans,
        "block_out_channels": c.channels,
        "layers_per_block": c.layers,
        "norm_eps": c.eps,
    }
    if c.context_dim is None:
        down = ["AttnDownBlock2D" if a else "DownBlock2D" for a in c.attention]
        up = ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(c.attention)]
        return UNet2DModel(
            **common,
            down_block_types=down,
            up_block_types=up,
            attention_head_dim=None,
            freq_shift=1,
            flip_sin_to_cos=False,
            downsample_padding=0,
        )
    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in c.attention]
    up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(c.attention)]
    if c.added_dim is not None:
        common |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": c.added_dim,
        }
    return UNet2DConditionModel(
        **common,
        down_block_types=down,
        up_block_types=up,
        cross_attention_dim=c.context_dim,
        attention_head_dim=c.num_heads,
        use_linear_projection=c.linear,
        transformer_layers_per_block=tuple(max(a, 1) for a in c.attention),
    )


def vae_host(c):
    return AutoencoderKL(
        block_out_channels=c.channels,
        down_block_types=["DownEncoderBlock2D"] * len(c.channels),
        up_block_types=["UpDecoderBlock2D"] * len(c.channels),
        layers_per_block=c.layers,
        latent_channels=c.latent_chans,
        sample_size=c.image_size,
    )


UNETS = ["ddpm_cifar10", "ddpm_256", "sd15_unet", "sd21_unet", "sdxl_unet"]


@pytest.mark.parametrize("name", [*UNETS, "kl_vae"])
def test_full_configuration_is_diffusers(name):
    with torch.device("meta"):
        ours = create(name)
        host = vae_host(ours.config) if name == "kl_vae" else unet_host(ours.config)
    assert shapes(ours) == shapes(host)


@pytest.mark.parametrize("name", ["ddpm_cifar10", "sd15_unet", "sd21_unet", "sdxl_unet"])
def test_unet(name):
    """Also on latents whose size is not a multiple of what the levels divide by."""
    ours = create(name, reduced=True)
    c = ours.config
    torch.manual_seed(2)
    inputs = ours.example_inputs(batch=2)
    odd = (torch.randn(2, c.in_chans, 10, 14), *inputs[1:])
    calls = [inputs] if c.context_dim is None else [inputs, odd]

    def ours_call(model, cast):
        return tuple(model(*cast(*call)) for call in calls)

    def host_call(model, cast):
        return tuple(one(model, *cast(*call)) for call in calls)

    def one(model, x, t, text=None, pooled=None, sizes=None):
        if text is None:
            return model(x, t).sample
        added = {} if pooled is None else {"text_embeds": pooled, "time_ids": sizes}
        return model(x, t, text, added_cond_kwargs=added).sample

    assert_loads_and_agrees(ours, unet_host(c), ours_call, host_call)


def test_vae():
    ours = create("kl_vae", reduced=True)
    torch.manual_seed(2)
    images = torch.rand(2, 3, 16, 24) * 2 - 1

    def ours_call(model, cast):
        x = cast(images)[0]
        return *model.encode(x), model(x)

    def host_call(model, cast):
        posterior = model.encode(cast(images)[0]).latent_dist
        return posterior.mean, posterior.logvar, model.decode(posterior.mean).sample

    assert_loads_and_agrees(ours, vae_host(ours.config), ours_call, host_call)


# Names of the weights at github.com/facebookresearch/DiT.
DIT_KEYS = """
    x_embedder.proj.weight x_embedder.proj.bias pos_embed y_embedder.embedding_table.weight
    t_embedder.mlp.0.weight t_embedder.mlp.0.bias t_embedder.mlp.2.weight t_embedder.mlp.2.bias
    final_layer.linear.weight final_layer.linear.bias final_layer.adaLN_modulation.1.weight
    final_layer.adaLN_modulation.1.bias
"""
DIT_BLOCK_KEYS = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"}


def to_diffusers(state, depth):
    """The weights of DiT under the names of diffusers."""
    out = {}
    plain = {
        "pos_embed.proj": "x_embedder.proj",
        "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear",
    }
    for theirs, mine in plain.items():
        out |= {f"{theirs}.{p}": state[f"{mine}.{p}"] for p in ("weight", "bias")}
    for i in range(depth):
        block, host = f"blocks.{i}.", f"transformer_blocks.{i}."
        pairs = {
            "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
            "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
            "norm1.linear": block + "adaLN_modulation.1",
            "attn1.to_out.0": block + "attn.proj",
            "ff.net.0.proj": block + "mlp.fc1",
            "ff.net.2": block + "mlp.fc2",
        }
        table = "norm1.emb.class_embedder.embedding_table.weight"
        out[host + table] = state["y_embedder.embedding_table.weight"]
        for theirs, mine in pairs.items():
            out |= {f"{host}{theirs}.{p}": state[f"{mine}.{p}"] for p in ("weight", "bias")}
        for p in ("weight", "bias"):
            for part, value in zip("qkv", state[f"{block}attn.qkv.{p}"].chunk(3), strict=True):
                out[f"{host}attn1.to_{part}.{p}"] = value
    return out


@pytest.mark.parametrize("patch", [2, 4])
def test_dit(patch):
    """The published names, and diffusers' numbers after renaming (its frequencies put right: it
    shifts their exponent by one, the published code does not)."""
    ours = seeded(create(f"dit_xl{patch}", reduced=True)).eval()
    c, state = ours.config, ours.state_dict()
    blocks = {re.sub(r"^blocks\.\d+\.|\.(weight|bias)$", "", k) for k in state if "blocks." in k}
    assert blocks == DIT_BLOCK_KEYS
    assert {k for k in state if not k.startswith("blocks.")} == set(DIT_KEYS.split())
    host = DiTTransformer2DModel(
        num_attention_heads=c.num_heads,
        attention_head_dim=c.dim // c.num_heads,
        in_channels=c.in_chans,
        out_channels=2 * c.in_chans,
        num_layers=c.depth,
        sample_size=c.input_size,
        patch_size=c.patch_size,
        num_embeds_ada_norm=c.num_classes,
        norm_eps=1e-6,
    ).eval()
    for block in host.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    missing, unexpected = host.load_state_dict(to_diffusers(state, c.depth), strict=False)
    assert not unexpected and set(missing) <= {"pos_embed.pos_embed"}
    torch.manual_seed(2)
    x, t, y = ours.example_inputs(batch=2)
    t = t.round().long()
    with torch.no_grad():
        eager = host(x, t, y).sample
        exact = host.double()(x.double(), t, y).sample
        assert_parity("DiT", ours(x, t, y), eager, exact, terms=4096)


def test_sit_is_dit_without_its_variance():
    dit = seeded(create("dit_b2", reduced=True)).eval()
    sit = create("sit_b2", reduced=True).eval()
    sit.load_state_dict(dit.state_dict())
    x, t, y = sit.example_inputs(batch=2)
    assert t.min() >= 0 and t.max() <= 1
    assert torch.equal(sit(x, t, y), dit(x, t, y)[:, :4])
