"""Rules for diffusers: attention of U-Nets, VAEs, DiT and SD3, and every GroupNorm with what
surrounds it.

``set_attention_backend`` has no effect on these models, whose attention processors call torch
directly. A replaced Attention keeps its processor and looks at it on every call: one that is set
later (IP-Adapter, slicing, fused projections) simply runs.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import attention_processor as host
from diffusers.models import resnet
from diffusers.models.autoencoders import vae
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from vitkit import nn
from vitkit.patch.hosts.diffusers_joint import RULES as JOINT_RULES
from vitkit.patch.hosts.diffusers_joint import SD3, attend_jointly
from vitkit.patch.hosts.diffusers_mlp import RULES as MLP_RULES
from vitkit.patch.hosts.diffusers_norms import RULES as NORM_RULES
from vitkit.patch.hosts.diffusers_patch import RULES as PATCH_RULES
from vitkit.patch.rules import Change, Replacement, Rule, is_group_norm, swap_class, watched
from vitkit.patch.source import is_followed, source_of

# What the replacements repeat, in every version whose source they were compared with.
_SINCE_035 = "0.35 to 0.42"
_ATTENTION = {"f60a9adec7": _SINCE_035}
_PROCESSOR = {"9f5ab38006": _SINCE_035}
_PROCESSOR_SDPA = {"4d222923b5": _SINCE_035}
_MASK = {"bc6e8f1b4c": _SINCE_035}
_SCORES = {"fa4dd78a47": _SINCE_035}
_RESNET = {"3bd9fc3996": "0.35, 0.36", "e54fca853a": "0.37 to 0.42"}

PROCESSORS = (host.AttnProcessor2_0, host.AttnProcessor)


class Attention(host.Attention):
    """diffusers' Attention with AttnProcessor2_0, AttnProcessor or SD3's, on flash attention."""

    def forward(
        self, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **kwargs
    ):
        if type(self.processor) is host.JointAttnProcessor2_0 and not kwargs:
            return attend_jointly(self, hidden_states, encoder_hidden_states)
        if type(self.processor) not in PROCESSORS or kwargs:
            if temb is not None:
                kwargs["temb"] = temb
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        residual = hidden_states
        if self.spatial_norm is not None:
            hidden_states = self.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape
        if len(shape) == 4:
            # Normalised before it is flattened: the same numbers, and channels_last stays so.
            if self.group_norm is not None:
                hidden_states = self.group_norm(hidden_states)
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        elif self.group_norm is not None:
            hidden_states = self.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        if encoder_hidden_states is None:
            encoder_hidden_states = hidden_states
        elif self.norm_cross:
            encoder_hidden_states = self.norm_encoder_hidden_states(encoder_hidden_states)
        hidden_states = self._attend(hidden_states, encoder_hidden_states, attention_mask)
        hidden_states = self.to_out[1](self.to_out[0](hidden_states))
        if len(shape) == 4:
            hidden_states = hidden_states.transpose(1, 2).reshape(shape)
        if self.residual_connection:
            hidden_states = hidden_states + residual
        return _divided(hidden_states, self.rescale_output_factor)

    def _attend(self, hidden_states, encoder_hidden_states, mask):
        q = self.to_q(hidden_states).unflatten(-1, (self.heads, -1))
        k = self.to_k(encoder_hidden_states).unflatten(-1, (self.heads, -1))
        v = self.to_v(encoder_hidden_states).unflatten(-1, (self.heads, -1))
        scale = None
        if type(self.processor) is host.AttnProcessor:
            scale = self.scale
        else:  # AttnProcessor2_0 knows norms of queries and keys, but no scale
            q = q if self.norm_q is None else self.norm_q(q)
            k = k if self.norm_k is None else self.norm_k(k)
        if mask is not None:
            mask = self._mask(mask, *k.shape[:2])
        return nn.attend(self, q, k, v, mask, scale=scale).flatten(2)

    def _mask(self, mask, batch, keys):
        """[B, 1 or H, 1 or Nq, Nk]; the host repeats it for every head."""
        if mask.dim() == 3 and mask.shape[0] == batch and mask.shape[-1] == keys:
            return mask[:, None]
        mask = self.prepare_attention_mask(mask, keys, batch)
        return mask.view(batch, self.heads, -1, mask.shape[-1])


def _divided(x: torch.Tensor, factor: float) -> torch.Tensor:
    # Most models divide by exactly 1, which changes nothing but costs a pass over memory.
    return x if factor == 1.0 else x / factor


class ResnetBlock2D(resnet.ResnetBlock2D):
    """diffusers' ResnetBlock2D with norm, time embedding and activation in one pass each."""

    def forward(self, input_tensor, temb, *args, **kwargs):
        extra = self.time_emb_proj is None and temb is not None
        if extra or args or kwargs or _why_not_block(self):
            return super().forward(input_tensor, temb, *args, **kwargs)
        hidden_states = nn.group_norm_silu(self.norm1, input_tensor)
        resample = self.upsample if self.upsample is not None else self.downsample
        if resample is not None:
            if self.upsample is not None and hidden_states.shape[0] >= 64:
                # As the host, whose interpolation fails on large channels_last batches.
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
            # As the host: DDP wants contiguous gradients.
            input_tensor = input_tensor.contiguous() if self.training else input_tensor
            input_tensor = self.conv_shortcut(input_tensor)
        return _divided(input_tensor + hidden_states, self.output_scale_factor)


def _why_not_block(block: Any) -> str | None:
    """The reason a block's norms and activation cannot be computed together, now."""
    if type(block.nonlinearity) is not torch.nn.SiLU:
        return f"its activation is {type(block.nonlinearity).__name__}, not SiLU"
    if not (is_group_norm(block.norm1) and is_group_norm(block.norm2)):
        return "its norms are not torch.nn.GroupNorm"
    if watched(block.norm1, block.norm2, block.nonlinearity):
        return "its norms or its activation have hooks, which a fused call would not run"
    return None


class GroupNormBeforeSiLU(torch.nn.GroupNorm):
    """A GroupNorm that computes the activation after it too, while that is a SiLUInNorm."""

    vitkit_partner: Any  # (activation,): in a tuple it is no submodule and has no state_dict key

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        fused = _are_fused(self, self.vitkit_partner[0])
        return nn.group_norm_silu(self, input, activation="silu" if fused else None)


class SiLUInNorm(torch.nn.SiLU):
    """A SiLU whose work the normalisation before it does, while that is a GroupNormBeforeSiLU."""

    vitkit_partner: Any  # (norm,)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input if _are_fused(self.vitkit_partner[0], self) else super().forward(input)


def _are_fused(norm: torch.nn.Module, activation: torch.nn.Module) -> bool:
    """Both ask the same question, so that unpatching or hooking only one of them stays right."""
    pair = type(norm) is GroupNormBeforeSiLU and type(activation) is SiLUInNorm
    return pair and not watched(norm, activation)


def _attention(module: Any) -> Replacement | str:
    if type(module.processor) not in (*PROCESSORS, host.JointAttnProcessor2_0):
        return f"its processor is {type(module.processor).__name__}"
    if getattr(module, "inner_kv_dim", module.inner_dim) != module.inner_dim:
        return "it has fewer key and value heads than query heads"
    head_dim = module.inner_dim // module.heads
    reason = nn.why_no_kernel("flash_attention", "meta", torch.float32, head_dim)
    return reason or Replacement("flash_attention", (swap_class(module, Attention),))


def _resnet_block(module: Any) -> Replacement | str:
    reason = _why_not_block(module)
    if reason:
        return reason
    modulated = module.time_embedding_norm == "scale_shift"
    fused = "scale and shift" if modulated else "time embedding"
    return Replacement(
        f"group_norm_silu x2 (SiLU{f', {fused}' if module.time_emb_proj is not None else ''})",
        (swap_class(module, ResnetBlock2D),),
        (module.norm1, module.norm2),
    )


def _norm_out(module: Any) -> Replacement | str | None:
    norm, activation = module.conv_norm_out, module.conv_act
    if norm is None:
        return None
    if not is_group_norm(norm):
        return f"its conv_norm_out is {type(norm).__name__}, not torch.nn.GroupNorm"
    if type(activation) is not torch.nn.SiLU:
        return f"its conv_act is {type(activation).__name__}, not SiLU"
    if not is_followed(source_of(type(module).forward), "conv_norm_out", "conv_act"):
        return "its forward does not call conv_act right after conv_norm_out"
    if sum(m is activation for _, m in module.named_modules(remove_duplicate=False)) > 1:
        return "its conv_act is used in several places"
    if watched(norm, activation):
        return "its conv_norm_out or conv_act has hooks, which a fused call would not run"
    changes = (
        swap_class(norm, GroupNormBeforeSiLU),
        Change(norm, "vitkit_partner", (activation,)),
        swap_class(activation, SiLUInNorm),
        Change(activation, "vitkit_partner", (norm,)),
    )
    return Replacement("group_norm_silu (conv_norm_out, conv_act)", changes, (norm, activation))


RULES = [
    Rule(
        host.Attention,
        "flash_attention",
        _attention,
        (
            (host.Attention.forward, _ATTENTION),
            (host.Attention.prepare_attention_mask, _MASK),
            (host.Attention.get_attention_scores, _SCORES),
            (host.AttnProcessor.__call__, _PROCESSOR),
            (host.AttnProcessor2_0.__call__, _PROCESSOR_SDPA),
            *SD3,
        ),
    ),
    Rule(
        resnet.ResnetBlock2D,
        "group_norm_silu",
        _resnet_block,
        ((resnet.ResnetBlock2D.forward, _RESNET),),
    ),
    *(
        Rule(cls, "group_norm_silu", _norm_out)
        for cls in (UNet2DConditionModel, UNet2DModel, vae.Encoder, vae.Decoder)
    ),
    *JOINT_RULES,
    *MLP_RULES,
    *NORM_RULES,
    *PATCH_RULES,
]
