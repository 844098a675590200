"""One table of sample calls per op: every test of the op contract runs over it, and an op without
samples fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import vitkit


@dataclass(frozen=True)
class Sample:
    """``make(device, dtype)`` returns (tensors by name, other keyword arguments) of ``public``,
    with the parts of its ``bias`` in place of a structured one."""

    op: str
    why: str
    make: Callable[[str, torch.dtype], tuple[dict[str, torch.Tensor], dict]]
    bias: type | None = None
    parts: tuple[str, ...] = ()  # of the bias
    suffix: str = ""  # of the operators behind the op

    @property
    def public(self):
        return getattr(vitkit, self.op)

    @property
    def operator(self) -> str:
        return self.op + self.suffix

    def __str__(self) -> str:
        return f"{self.op}-{self.why}"

    def arguments(self, given: dict) -> dict:
        """Of ``public``."""
        if self.bias is None:
            return given
        bias = self.bias(*(given[n] for n in self.parts))
        return {n: v for n, v in given.items() if n not in self.parts} | {"bias": bias}

    def differentiable(self, device, dtype):
        """(function of the floating tensors, those tensors)"""
        tensors, options = self.make(device, dtype)
        names = [n for n, t in tensors.items() if t.is_floating_point()]
        fixed = {n: t for n, t in tensors.items() if n not in names}

        def function(*values, backend="auto"):
            given = {**dict(zip(names, values, strict=True)), **fixed, **options}
            return self.public(**self.arguments(given), backend=backend)

        return function, [tensors[n] for n in names]


def _randn(device, dtype, *shape):
    return torch.randn(*shape, device=device, dtype=torch.float32).to(dtype)


def _attention(nq=5, nk=7, batch=2, heads=2, head_dim=8, bias=None, **options):
    def make(device, dtype):
        torch.manual_seed(0)
        tensors = {
            "q": _randn(device, dtype, batch, nq, heads, head_dim),
            "k": _randn(device, dtype, batch, nk, heads, head_dim),
            "v": _randn(device, dtype, batch, nk, heads, head_dim),
        }
        if bias == "mask":
            tensors["bias"] = torch.rand(batch, 1, nq, nk, device=device) > 0.3
        elif bias is not None:
            tensors["bias"] = _randn(device, dtype, *bias)
        return tensors, options

    return make


def _decomposed(device, dtype):
    tensors, options = _attention(nk=6)(device, dtype)
    rel = {"rel_h": _randn(device, dtype, 2, 2, 5, 2), "rel_w": _randn(device, dtype, 2, 2, 5, 3)}
    return tensors | rel, options


def _distance(device, dtype):
    tensors, options = _attention(return_lse=True)(device, dtype)
    q, k = (_randn(device, torch.float32, 1, n, 2) for n in (5, 7))
    q[0, 0] = float("nan")  # a token without a place
    return tensors | {"slopes": _randn(device, dtype, 2)}, options | {"coords_q": q, "coords_k": k}


def _packed(device, dtype):
    torch.manual_seed(0)
    tensors = {n: _randn(device, dtype, 9, 2, 8) for n in "qkv"}
    offsets = torch.tensor([0, 4, 4, 9], dtype=torch.int32, device=device)
    return {**tensors, "cu_seqlens_q": offsets, "cu_seqlens_k": offsets}, {"causal": True}


def _group_norm(
    shape=(2, 8, 3, 5), groups=4, affine=True, modulated=False, channels_last=False, **options
):
    def make(device, dtype):
        torch.manual_seed(0)
        n, c = shape[:2]
        x = _randn(device, dtype, *shape)
        tensors = {"x": x.contiguous(memory_format=torch.channels_last) if channels_last else x}
        if affine:
            tensors |= {"weight": _randn(device, dtype, c), "bias": _randn(device, dtype, c)}
        if modulated:
            tensors |= {name: _randn(device, dtype, n, c) for name in ("add", "scale", "shift")}
        return tensors, {"num_groups": groups, **options}

    return make


def _layer_norm(shape=(2, 5, 12), modulation=None, affine=True):
    def make(device, dtype):
        torch.manual_seed(0)
        tensors = {"x": _randn(device, dtype, *shape)}
        if modulation is not None:
            tensors |= {name: _randn(device, dtype, *modulation) for name in ("shift", "scale")}
        if affine:
            tensors |= {name: _randn(device, dtype, shape[-1]) for name in ("weight", "bias")}
        return tensors, {}

    return make


def _patches(
    images=(2, 3, 8, 12), patch=(4, 4), embed=10, uint8=False, norm=False, prefixes=0, **options
):
    def make(device, dtype):
        torch.manual_seed(0)
        grid = [-(-s // p) for s, p in zip(images[2:], patch, strict=True)]
        tensors = {"images": _randn(device, dtype, *images)}
        if uint8:
            tensors["images"] = torch.randint(256, images, dtype=torch.uint8, device=device)
        tensors["weight"] = _randn(device, dtype, embed, images[1], *patch) * 0.3
        tensors["bias"] = _randn(device, dtype, embed)
        if norm:
            tensors |= {n: _randn(device, dtype, embed) for n in ("norm_weight", "norm_bias")}
        rows = prefixes + torch.Size(grid).numel()
        tensors["pos_embed"] = _randn(device, dtype, rows, embed)
        if prefixes:
            tensors["prefix_tokens"] = _randn(device, dtype, prefixes, embed)
        return tensors, options

    return make


def _gated_residual(gate):
    def make(device, dtype):
        torch.manual_seed(0)
        shapes = {"x": (2, 5, 12), "y": (2, 5, 12), "gate": gate}
        return {name: _randn(device, dtype, *shape) for name, shape in shapes.items()}, {}

    return make


def _patches_packed(device, dtype):
    torch.manual_seed(0)
    tensors = {
        "images": _randn(device, dtype, 2, 3, 8, 12),
        "weight": _randn(device, dtype, 10, 3, 4, 4) * 0.3,
        "bias": _randn(device, dtype, 10),
        "pos_embed": _randn(device, dtype, 2, 3, 10),
    }
    return tensors, {"sizes": [(8, 8), (4, 12)]}


def _window(height=5, width=7, window=(3, 3), cosine=False, **options):
    def make(device, dtype):
        torch.manual_seed(0)
        places = (2 * window[0] - 1) * (2 * window[1] - 1)
        tensors = {
            "qkv": _randn(device, dtype, 2, height, width, 3, 2, 8),
            "bias_table": _randn(device, dtype, places, 2),
            "pad_value": _randn(device, dtype, 3, 2, 8),
        }
        if cosine:
            tensors["logit_scale"] = _randn(device, dtype, 2) * 0.1 + 2.0
        return tensors, {"window_size": window, **options}

    return make


def _dilated(**options):
    def make(device, dtype):
        torch.manual_seed(0)
        tensors = {n: _randn(device, dtype, 2, 11, 3, 8) for n in "qkv"}
        return tensors, {"segment_lengths": [4, 7], "dilation_ratios": [1, 2], **options}

    return make


def _gated(separate=False, **options):
    def make(device, dtype):
        torch.manual_seed(0)
        if separate:
            return {n: _randn(device, dtype, 2, 3, 9) for n in ("x", "gate")}, options
        return {"x": _randn(device, dtype, 2, 3, 18)}, options

    return make


def _gelu(channels_last=False, **options):
    def make(device, dtype):
        torch.manual_seed(0)
        x = _randn(device, dtype, 2, 3, 5, 7)
        return {
            "x": x.contiguous(memory_format=torch.channels_last) if channels_last else x
        }, options

    return make


def _rope(table, k_heads=2, **options):
    def make(device, dtype):
        torch.manual_seed(0)
        tensors = {
            "q": _randn(device, dtype, 2, 7, 2, 12),
            "k": _randn(device, dtype, 2, 7, k_heads, 12),
        }
        return tensors | {n: _randn(device, dtype, *table) for n in ("cos", "sin")}, options

    return make


SAMPLES = [
    Sample("dilated_attention", "zeros_attended", _dilated()),
    Sample(
        "dilated_attention",
        "causal_with_lse",
        _dilated(causal=True, alignment="torchscale", return_lse=True),
    ),
    Sample("flash_attention", "cross_attention", _attention()),
    Sample("flash_attention", "shared_bias", _attention(bias=(1, 2, 5, 7))),
    Sample("flash_attention", "bool_mask", _attention(bias="mask", scale=0.5)),
    Sample("flash_attention", "causal_with_lse", _attention(nk=5, causal=True, return_lse=True)),
    Sample("flash_attention", "packed", _packed),
    Sample(
        "flash_attention",
        "decomposed_bias",
        _decomposed,
        vitkit.DecomposedBias,
        ("rel_h", "rel_w"),
        "_decomposed",
    ),
    Sample(
        "flash_attention",
        "distance_bias",
        _distance,
        vitkit.DistanceBias,
        ("slopes", "coords_q", "coords_k"),
        "_distance",
    ),
    Sample("geglu", "packed", _gated()),
    Sample("geglu", "separate_tanh", _gated(separate=True, approximate="tanh")),
    Sample("gelu", "channels_last", _gelu(channels_last=True)),
    Sample("gelu", "tanh", _gelu(approximate="tanh")),
    Sample("gated_residual", "sample", _gated_residual((2, 12))),
    Sample("gated_residual", "token", _gated_residual((2, 5, 12))),
    Sample("gated_residual", "layer_scale", _gated_residual((12,))),
    Sample("group_norm_silu", "affine", _group_norm()),
    Sample(
        "group_norm_silu", "plain_without_activation", _group_norm(affine=False, activation=None)
    ),
    Sample("group_norm_silu", "modulated", _group_norm(modulated=True)),
    Sample("group_norm_silu", "channels_last", _group_norm(channels_last=True, modulated=True)),
    Sample("group_norm_silu", "volume", _group_norm(shape=(1, 4, 2, 3, 2), groups=2)),
    Sample("rope_2d", "prefix_of_one", _rope((6, 12))),
    Sample("rope_2d", "tables_of_heads", _rope((2, 7, 2, 6), layout="interleaved")),
    Sample("swiglu", "packed", _gated()),
    Sample("swiglu", "separate", _gated(separate=True)),
    Sample("layer_norm_modulate", "plain", _layer_norm()),
    Sample("layer_norm_modulate", "sample", _layer_norm(modulation=(2, 12), affine=False)),
    Sample("layer_norm_modulate", "token", _layer_norm(modulation=(2, 5, 12))),
    Sample("patch_embed", "positions_and_prefix", _patches(prefixes=2)),
    Sample("patch_embed", "norm_and_padding", _patches((2, 3, 7, 9), norm=True, pad=True)),
    Sample(
        "patch_embed", "bytes", _patches(uint8=True, mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.25])
    ),
    Sample("patch_embed", "video", _patches((1, 2, 2, 4, 4), (2, 2, 2), 6)),
    Sample("patch_embed_packed", "padded_batch", _patches_packed),
    Sample("window_attention", "shifted", _window(shift_size=(1, 2))),
    Sample("window_attention", "cosine", _window(cosine=True, padding="roll_then_pad")),
]
