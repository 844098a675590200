"""Assertions over vitkit._numerics, the one tolerance rule of the project."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from vitkit._numerics import parity

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_parity(name, actual, eager, exact, *, dtype=None, terms=1):
    """``actual`` is as near to ``exact`` (float64) as the rule of DESIGN §5 demands, ``eager``
    being its yardstick."""
    result = parity(actual, eager, exact, dtype=dtype, terms=terms)
    assert result.ok, f"{name}: {result}"


def gradients(function, tensors, cotangents):
    """Outputs of ``function(*tensors)`` and the gradients of sum(output * cotangent) for every
    floating tensor."""
    leaves = [
        t.detach().requires_grad_() if t is not None and t.is_floating_point() else t
        for t in tensors
    ]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if c is not None]
    grads = torch.autograd.grad(
        [o for o, _ in pairs], wanted, [c.to(o.dtype) for o, c in pairs], allow_unused=True
    )
    return outputs, grads


def double(*tensors):
    return [t.detach().double() if t is not None and t.is_floating_point() else t for t in tensors]


def eager_attention(q, k, v, bias=None, causal=False, scale=None):
    """Attention in the dtype of its inputs, as plain PyTorch computes it: the yardstick of the
    rule."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bqhd,bkhd->bhqk", q * scale, k)
    if bias is not None:
        scores = (
            scores.masked_fill(~bias, float("-inf"))
            if bias.dtype == torch.bool
            else scores + bias.to(scores.dtype)
        )
    if causal:
        n, m = scores.shape[-2:]
        scores = scores.masked_fill(
            torch.ones(n, m, dtype=torch.bool, device=q.device).triu(1), float("-inf")
        )
    weights = (
        torch.softmax(scores, -1).nan_to_num(0.0) if bias is not None else torch.softmax(scores, -1)
    )
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def eager_group_norm(
    x, groups, weight=None, bias=None, eps=1e-5, silu=True, add=None, scale=None, shift=None
):
    """GroupNorm and its neighbours in the dtype of x, op by op, as a host model computes them."""
    shape = (*x.shape[:2], *(1,) * (x.dim() - 2))
    cast = [t.to(x.dtype) if t is not None else None for t in (weight, bias, add, scale, shift)]
    weight, bias, add, scale, shift = cast
    h = x if add is None else x + add.view(shape)
    h = F.group_norm(h, groups, weight, bias, eps)
    if scale is not None:
        h = h * (1 + scale.view(shape))
    if shift is not None:
        h = h + shift.view(shape)
    return F.silu(h) if silu else h


def eager_layer_norm(x, shift=None, scale=None, weight=None, bias=None, eps=1e-6):
    """LayerNorm and its modulation in the dtype of x, op by op, as a host model computes them."""
    cast = [t.to(x.dtype) if t is not None else None for t in (shift, scale, weight, bias)]
    shift, scale, weight, bias = cast
    h = F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def spread(t):
        return t if t.dim() == x.dim() else t.view(len(x), *(1,) * (x.dim() - 2), x.shape[-1])

    if scale is not None:
        h = h * (1 + spread(scale))
    return h if shift is None else h + spread(shift)


def eager_window_attention(qkv, table, logit_scale, pad, window, shift, scale, padding):
    """As the hosts compute it, op by op in the dtype of qkv: pad, roll, partition, mask."""
    b, h, w, _, heads, d = qkv.shape
    (wh, ww), (sh, sw) = window, shift
    hp, wp = math.ceil(h / wh) * wh, math.ceil(w / ww) * ww
    x = qkv.flatten(3)
    fill = torch.zeros_like(x[:1, :1, :1]) if pad is None else pad.flatten().view(1, 1, 1, -1)

    def padded(x):
        outside = torch.ones(hp, wp, 1, dtype=torch.bool, device=x.device)
        outside[:h, :w] = False
        return torch.where(outside, fill.to(x.dtype), F.pad(x, (0, 0, 0, wp - w, 0, hp - h)))

    def partition(x):
        x = x.view(x.shape[0], hp // wh, wh, wp // ww, ww, -1)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, wh * ww, x.shape[-1])

    if padding == "roll_then_pad":
        x = padded(x.roll((-sh, -sw), (1, 2)))
    else:
        x = padded(x).roll((-sh, -sw), (1, 2))
    q, k, v = partition(x).view(-1, wh * ww, 3, heads, d).permute(2, 0, 3, 1, 4)
    if logit_scale is None:
        scores = (q * scale) @ k.transpose(-1, -2)
    else:
        gain = logit_scale.clamp(max=math.log(100.0)).exp().to(q.dtype)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2)
        scores = scores * gain[:, None, None]
    if table is not None:
        y, x = torch.meshgrid(torch.arange(wh), torch.arange(ww), indexing="ij")
        y, x = y.flatten(), x.flatten()
        index = (y[:, None] - y + wh - 1) * (2 * ww - 1) + x[:, None] - x + ww - 1
        scores = scores + table.to(q.dtype)[index.to(q.device)].permute(2, 0, 1)
    region = torch.zeros(1, hp, wp, 1, device=q.device)
    bands = [
        [slice(0, n - size), slice(n - size, n - s), slice(n - s, n)] if s else [slice(None)]
        for n, size, s in ((hp, wh, sh), (wp, ww, sw))
    ]
    for i, rows in enumerate(bands[0]):
        for j, columns in enumerate(bands[1]):
            region[:, rows, columns] = 3 * i + j
    region = partition(region)[..., 0]
    mask = -100.0 * (region[:, :, None] != region[:, None, :]).to(q.dtype)
    scores = (scores.view(b, -1, heads, wh * ww, wh * ww) + mask[:, None]).flatten(0, 1)
    out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, wh, ww, heads * d)
    out = out.view(b, hp // wh, wp // ww, wh, ww, -1).permute(0, 1, 3, 2, 4, 5)
    out = out.reshape(b, hp, wp, heads * d)
    if padding == "roll_then_pad":
        return out[:, :h, :w].roll((sh, sw), (1, 2))
    return out.roll((sh, sw), (1, 2))[:, :h, :w]


def eager_dilated_attention(q, k, v, lengths, ratios, causal, scale, torchscale, detached=True):
    """As the published code computes it, in the dtype of q: pad, cut into segments, thin out by
    heads, attend, spread out again, mix."""
    b, n, heads, d = q.shape
    outs, lses = [], []
    for length, ratio in zip(lengths, ratios, strict=True):
        w = min(length, n)
        segments, slots, group = -(-n // w), -(-w // ratio), -(-heads // ratio)

        def thin(x, w=w, segments=segments, slots=slots, group=group, ratio=ratio):
            x = F.pad(x, (0, 0, 0, 0, 0, segments * w - n)).view(b, segments, w, heads, d)
            x = F.pad(x, (0, 0, 0, group * ratio - heads, 0, slots * ratio - w))
            x = x.view(b, segments, slots, ratio, ratio, group, d)
            return torch.diagonal(x, 0, 3, 4).permute(0, 1, 2, 5, 3, 4)  # ... ratio, group, d

        qs, ks, vs = (thin(x).flatten(3, 4) for x in (q, k, v))  # [b, s, slots, heads', d]
        scores = torch.einsum("bsihd,bsjhd->bshij", qs * scale, ks)
        if causal:
            keep = torch.ones(slots, slots, dtype=torch.bool, device=q.device).tril()
            scores = scores.masked_fill(~keep, -math.inf)
        out = torch.einsum("bshij,bsjhd->bsihd", scores.softmax(-1), vs)
        lse = scores.float().logsumexp(-1).transpose(2, 3)  # [b, s, slots, heads']

        def spread(x, w=w, segments=segments, slots=slots, group=group, ratio=ratio):
            x = x.view(b, segments, slots, ratio, group, -1)
            x = torch.diag_embed(x.movedim(3, -1), 0, 3, 4)  # [b, s, slots, r, r, group, c]
            x = x.reshape(b, segments, slots * ratio, ratio * group, -1)[:, :, :, :heads]
            if not torchscale:
                x = x[:, :, :w]
            return x.flatten(1, 2)[:, :n]

        outs.append(spread(out))
        lse = spread(lse[..., None])[..., 0]
        covered = spread(torch.ones_like(out[..., :1]))[..., 0] > 0
        lses.append(lse.masked_fill(~covered, -1e8))
    lses = torch.stack(lses)
    weights = (lses.detach() if detached else lses).softmax(0)
    out = sum(o * a[..., None].to(o.dtype) for o, a in zip(outs, weights, strict=True))
    lse = lses.logsumexp(0)
    return out, lse.masked_fill((lses == -1e8).all(0), -math.inf).transpose(1, 2)
