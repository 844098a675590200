"""vitkit.models against transformers: SigLIP, Perceiver."""

from __future__ import annotations

import pytest
import torch
from model_hosts import assert_loads_and_agrees, shapes

from vitkit.models import create

pytest.importorskip("transformers")
from transformers import (
    PerceiverConfig,
    PerceiverForImageClassificationFourier,
    SiglipVisionConfig,
    SiglipVisionModel,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def siglip_host(c):
    config = SiglipVisionConfig(
        hidden_size=c.dim,
        intermediate_size=c.mlp_hidden,
        num_hidden_layers=c.depth,
        num_attention_heads=c.num_heads,
        image_size=c.image_size,
        patch_size=c.patch_size,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=c.eps,
        vision_use_head=c.head,
    )
    return SiglipVisionModel(config)


@pytest.mark.parametrize("name", ["medsiglip", "medgemma_siglip"])
def test_siglip(name):
    with torch.device("meta"):
        full = create(name)
        assert shapes(full) == shapes(siglip_host(full.config))
    ours = create(name, reduced=True)
    torch.manual_seed(2)
    images = ours.example_inputs(batch=2)

    def host_call(model, cast):
        out = model(*cast(*images))
        return out.pooler_output if ours.config.head else out.last_hidden_state

    assert_loads_and_agrees(
        ours, siglip_host(ours.config), lambda m, cast: m(*cast(*images)), host_call
    )


def perceiver_host(c):
    config = PerceiverConfig(
        num_latents=c.latents,
        d_latents=c.dim,
        d_model=c.pixel_dim,
        num_blocks=c.blocks,
        num_self_attends_per_block=c.layers,
        num_self_attention_heads=c.num_heads,
        num_cross_attention_heads=1,
        attention_probs_dropout_prob=0.0,
        image_size=c.image_size,
        num_labels=c.num_classes,
    )
    return PerceiverForImageClassificationFourier(config)


def test_perceiver():
    """With the host's own pixel positions: 64 frequencies up to those of 224 pixels."""
    with torch.device("meta"):
        full = create("perceiver")
        assert shapes(full) == shapes(perceiver_host(full.config))
    ours = create("perceiver", latents=5, dim=64, blocks=2, layers=2, num_heads=2, num_classes=7)
    torch.manual_seed(2)
    images = (torch.randn(2, 3, 6, 9),)
    host = perceiver_host(ours.config)

    assert_loads_and_agrees(
        ours,
        host,
        lambda m, cast: m(*cast(*images)),
        lambda m, cast: m(pixel_values=cast(*images)[0]).logits,
    )
