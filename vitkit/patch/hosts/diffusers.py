"""Rules for diffusers: attention processors and every GroupNorm with what surrounds it.

``set_attention_backend`` has no effect on U-Nets and VAEs, whose processors call torch's attention
directly; here each Attention gets another processor.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import resnet
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.autoencoders import vae
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from vitkit import nn
from vitkit.patch.rules import Change, Replacement, Rule, is_group_norm, observed, swap_class

MAX_HEAD_DIM = 256


class FlashAttnProcessor:
    """What diffusers' AttnProcessor2_0 computes, on flash attention in [B, N, H, D]."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        *args,
        **kwargs,
    ) -> torch.Tensor:
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        keys_from = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        batch, keys, _ = keys_from.shape
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, keys, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        if encoder_hidden_states is None:
            encoder_hidden_states = hidden_states
        elif attn.norm_cross:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)

        q = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))
        k = attn.to_k(encoder_hidden_states).unflatten(-1, (attn.heads, -1))
        v = attn.to_v(encoder_hidden_states).unflatten(-1, (attn.heads, -1))
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        hidden_states = nn.attend(attn, q, k, v, attention_mask).flatten(2).to(q.dtype)

        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if len(shape) == 4:
            hidden_states = hidden_states.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        # Dividing by exactly 1 is what most models ask for; it changes nothing but costs a pass.
        if attn.rescale_output_factor != 1.0:
            hidden_states = hidden_states / attn.rescale_output_factor
        return hidden_states


class ResnetBlock2D(resnet.ResnetBlock2D):
    """diffusers' ResnetBlock2D with norm, time embedding and activation in one pass each."""

    def forward(self, input_tensor, temb, *args, **kwargs):
        if self.time_emb_proj is None and temb is not None:
            return super().forward(input_tensor, temb, *args, **kwargs)
        hidden_states = nn.group_norm_silu(self.norm1, input_tensor)
        resample = self.upsample if self.upsample is not None else self.downsample
        if resample is not None:
            # diffusers works around an interpolation kernel that fails on large channels_last
            # batches.
            if self.upsample is not None and hidden_states.shape[0] >= 64:
                input_tensor, hidden_states = input_tensor.contiguous(), hidden_states.contiguous()
            input_tensor, hidden_states = resample(input_tensor), resample(hidden_states)
        hidden_states = self.conv1(hidden_states)
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        if self.time_embedding_norm == "scale_shift":
            if temb is None:
                raise ValueError("temb must not be None when time_embedding_norm is scale_shift")
            scale, shift = temb.chunk(2, dim=1)
            hidden_states = nn.group_norm_silu(self.norm2, hidden_states, scale=scale, shift=shift)
        else:
            hidden_states = nn.group_norm_silu(self.norm2, hidden_states, add=temb)
        hidden_states = self.conv2(self.dropout(hidden_states))
        if self.conv_shortcut is not None:
            # As the host: contiguous gradients for DDP.
            shortcut = input_tensor.contiguous() if self.training else input_tensor
            input_tensor = self.conv_shortcut(shortcut)
        output = input_tensor + hidden_states
        return output if self.output_scale_factor == 1.0 else output / self.output_scale_factor


class ActivationInNorm(torch.nn.SiLU):
    """A SiLU whose work the normalisation before it has done."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input


def _attention(module: Any) -> Replacement | str:
    if type(module.processor) not in (AttnProcessor, AttnProcessor2_0):
        return f"its processor is {type(module.processor).__name__}"
    head_dim = module.inner_dim // module.heads
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        return f"head dim {head_dim}: kernels need a multiple of 8 up to {MAX_HEAD_DIM}"
    if getattr(module, "inner_kv_dim", module.inner_dim) != module.inner_dim:
        return "it has fewer key and value heads than query heads"
    standard = head_dim**-0.5
    if type(module.processor) is AttnProcessor and abs(module.scale - standard) > 1e-6 * standard:
        return f"its scale is {module.scale}, not head_dim ** -0.5"
    return Replacement("flash_attention", (Change(module, "processor", FlashAttnProcessor()),))


def _resnet_block(module: Any) -> Replacement | str:
    if not isinstance(module.nonlinearity, torch.nn.SiLU):
        return f"its activation is {type(module.nonlinearity).__name__}, not SiLU"
    if not (is_group_norm(module.norm1) and is_group_norm(module.norm2)):
        return "its norms are not torch.nn.GroupNorm"
    reason = observed(module.norm1, module.norm2, module.nonlinearity)
    fused = "time embedding, GroupNorm, SiLU"
    if module.time_embedding_norm == "scale_shift":
        fused = "GroupNorm, scale and shift, SiLU"
    return reason or Replacement(
        f"group_norm_silu ({fused})",
        (swap_class(module, ResnetBlock2D),),
        (module.norm1, module.norm2),
    )


def _norm_out(module: Any) -> Replacement | str:
    norm, activation = module.conv_norm_out, module.conv_act
    if not is_group_norm(norm):
        return f"its conv_norm_out is {type(norm).__name__}, not torch.nn.GroupNorm"
    if type(activation) is not torch.nn.SiLU:
        return f"its conv_act is {type(activation).__name__}, not SiLU"
    shared = sum(m is activation for _, m in module.named_modules(remove_duplicate=False)) > 1
    if shared:
        return "its conv_act is used in several places"
    return observed(norm, activation) or Replacement(
        "group_norm_silu (conv_norm_out, conv_act)",
        (swap_class(norm, nn.GroupNormSiLU), swap_class(activation, ActivationInNorm)),
        (norm, activation),
    )


def _has_norm_out(module: torch.nn.Module) -> bool:
    hosts = (UNet2DConditionModel, UNet2DModel, vae.Encoder, vae.Decoder)
    return type(module) in hosts and module.conv_norm_out is not None


RULES = [
    Rule(lambda m: type(m) is Attention, _attention),
    Rule(lambda m: type(m) is resnet.ResnetBlock2D, _resnet_block),
    Rule(_has_norm_out, _norm_out),
]
