"""xformers' functions and mask classes: every mask against its materialised self in float64."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from numerics import assert_parity

from vitkit.compat import xformers
from vitkit.compat.xformers import fmha, memory_efficient_attention
from vitkit.compat.xformers.fmha import attn_bias as masks
from vitkit.verify import KernelCalls


def plain(q, k, v, bias):
    """[B, M, H, K] by the formula; rows without keys are 0."""
    scores = torch.einsum("bmhk,bnhk->bhmn", q, k) * q.shape[-1] ** -0.5 + bias.to(q.dtype)
    without_keys = bias.isneginf().all(-1, keepdim=True)
    weights = scores.masked_fill(without_keys, 0.0).softmax(-1).masked_fill(without_keys, 0.0)
    return torch.einsum("bhmn,bnhk->bmhk", weights, v)


LENGTHS = [5, 1, 11]
MASKS = {
    "causal": (lambda: masks.LowerTriangularMask(), 17, 17),
    "causal_cross": (lambda: masks.LowerTriangularMask(), 9, 17),
    "causal_with_bias": (
        lambda: masks.LowerTriangularMask().add_bias(torch.linspace(-1, 1, 289).view(1, 1, 17, 17)),
        17, 17,
    ),
    "bottom_right": (lambda: masks.LowerTriangularFromBottomRightMask(), 9, 17),
    "bottom_right_more_queries": (lambda: masks.LowerTriangularFromBottomRightMask(), 17, 9),
    "bottom_right_local": (
        lambda: masks.LowerTriangularFromBottomRightMask().make_local_attention(4), 17, 17,
    ),
    "local": (lambda: masks.LocalAttentionFromBottomRightMask(3, 2), 17, 17),
    "blocks": (lambda: masks.BlockDiagonalMask.from_seqlens(LENGTHS), 17, 17),
    "blocks_cross": (lambda: masks.BlockDiagonalMask.from_seqlens(LENGTHS, [3, 7, 2]), 17, 12),
    "blocks_one_without_keys": (
        lambda: masks.BlockDiagonalMask.from_seqlens(LENGTHS, [3, 0, 2]), 17, 5,
    ),
    "blocks_causal": (lambda: masks.BlockDiagonalMask.from_seqlens(LENGTHS).make_causal(), 17, 17),
    "blocks_bottom_right": (
        lambda: masks.BlockDiagonalMask.from_seqlens(
            LENGTHS, [6, 4, 11]
        ).make_causal_from_bottomright(),
        17, 21,
    ),
    "blocks_local": (
        lambda: masks.BlockDiagonalMask.from_seqlens(LENGTHS).make_local_attention(3), 17, 17,
    ),
    "blocks_local_bottom_right": (
        lambda: masks.BlockDiagonalMask.from_seqlens(
            LENGTHS, [6, 4, 11]
        ).make_local_attention_from_bottomright(3),
        17, 21,
    ),
    "padded_keys": (
        lambda: masks.BlockDiagonalPaddedKeysMask.from_seqlens(LENGTHS, 8, [3, 8, 1]), 17, 24,
    ),
    "padded_keys_with_offset": (
        lambda: masks.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
            [2, 1, 3], 8, [3, 8, 6]
        ),
        6, 24,
    ),
    "padded_keys_local": (
        lambda: masks.BlockDiagonalLocalAttentionPaddedKeysMask.from_seqlens_local(
            [2, 1, 3], 8, [3, 8, 6], 2, 1
        ),
        6, 24,
    ),
    "padded_keys_causal_local": (
        lambda: masks.BlockDiagonalCausalLocalAttentionPaddedKeysMask.from_seqlens_local(
            [2, 1, 3], 8, [3, 8, 6], 2
        ),
        6, 24,
    ),
    "gappy_keys": (
        lambda: masks.BlockDiagonalGappyKeysMask.from_seqlens([2, 3], [1, 9, 17], [4, 6]), 5, 17,
    ),
    "gappy_keys_with_offset": (
        lambda: masks.BlockDiagonalCausalWithOffsetGappyKeysMask.from_seqlens(
            [2, 3], [1, 9, 17], [4, 6]
        ),
        5, 17,
    ),
}  # fmt: skip


def tensors(queries, keys, batch=1, dtype=torch.float32):
    torch.manual_seed(0)
    sizes = (queries, keys, keys)
    return [torch.randn(batch, n, 3, 16).to(dtype) for n in sizes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MASKS)
def test_every_mask(name, dtype):
    make, queries, keys = MASKS[name]
    mask = make()
    given = tensors(queries, keys, dtype=dtype)
    bias = mask.materialize((1, 1, queries, keys), torch.float64)
    results = []
    for function, cast in (
        (lambda q, k, v: memory_efficient_attention(q, k, v, attn_bias=mask), dtype),
        (lambda q, k, v: plain(q, k, v, bias), dtype),
        (lambda q, k, v: plain(q, k, v, bias), torch.float64),
    ):
        leaves = [t.to(cast).requires_grad_() for t in given]
        out = function(*leaves)
        results.append([out.detach(), *torch.autograd.grad((out * out).sum(), leaves)])
    for mine, eager, exact in zip(*results, strict=True):
        assert_parity(name, mine, eager, exact, terms=16 * keys)


def test_the_table_names_every_class():
    base = masks.AttentionBias
    classes = [c for c in vars(masks).values() if isinstance(c, type) and issubclass(c, base)]
    assert {c.__name__ for c in classes if c is not base} == set(masks.BANDS)


def test_sequences_never_meet_in_one_matrix():
    """1,000 sequences of 50 tokens: one matrix would have 2.5e9 scores per head."""
    from vitkit._memory import peak_bytes

    lengths = [50] * 1000
    mask = masks.BlockDiagonalMask.from_seqlens(lengths)
    q = torch.randn(1, 50_000, 1, 16)
    with torch.no_grad():
        assert peak_bytes(lambda: memory_efficient_attention(q, q, q, attn_bias=mask), "cpu") < (
            3 * q.nbytes
        )
    with KernelCalls() as calls:
        memory_efficient_attention(q, q, q, attn_bias=mask)
    assert calls.counts == {"flash_attention_fwd": {"cpu": 1}}


def test_layouts_and_widths():
    q, k, v = tensors(7, 5, batch=2)
    out = memory_efficient_attention(q, k, v)
    assert memory_efficient_attention(q[:, :, 0], k[:, :, 0], v[:, :, 0]).equal(out[:, :, 0])
    grouped = [t.unflatten(2, (3, 1)) for t in (q, k, v)]
    assert memory_efficient_attention(*grouped).equal(out.unflatten(2, (3, 1)))
    narrow = memory_efficient_attention(q, k, v[..., :8])
    torch.testing.assert_close(narrow, out[..., :8])
    wide = memory_efficient_attention(q[..., :8], k[..., :8], v, scale=0.25)
    assert wide.shape == out.shape
    assert memory_efficient_attention(q, k, v, output_dtype=torch.float64).dtype == torch.float64


def test_tensor_bias_has_a_gradient():
    q, k, v = tensors(7, 5, batch=2)
    bias = torch.randn(2, 3, 7, 5, requires_grad=True)
    memory_efficient_attention(q, k, v, attn_bias=bias).sum().backward()
    assert bias.grad is not None and bias.grad.abs().sum() > 0


def test_lse():
    q, k, v = tensors(7, 5, batch=2)
    out, lse = xformers.memory_efficient_attention_forward_requires_grad(q, k, v)
    scores = torch.einsum("bmhk,bnhk->bhmn", q, k) / 4
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    assert out.equal(xformers.memory_efficient_attention_forward(q, k, v))


def test_tensor_lists_come_back():
    parts = [torch.randn(2, 5, 3, 16), torch.randn(1, 7, 3, 16)]
    mask, joined = fmha.BlockDiagonalMask.from_tensor_list(parts)
    for part, back in zip(parts, mask.split(joined), strict=True):
        assert part.equal(back)
    out = memory_efficient_attention(joined, joined, joined, attn_bias=mask)
    for part, back in zip(parts, mask.split(out), strict=True):
        torch.testing.assert_close(back, memory_efficient_attention(part, part, part))
    keys = [torch.randn(2, 4, 3, 16), torch.randn(1, 2, 3, 16)]
    mask, q, k, v = masks.BlockDiagonalMask.from_tensor_lists_qkv(parts, keys, keys)
    assert (q.shape[1], k.shape[1], v.shape[1]) == (17, 10, 10)
    assert [t.shape[:2] for t in mask.split_kv(k)] == [(2, 4), (1, 2)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p": 0.1}, "p must be 0"),
        ({"query": torch.randn(4, 4)}, "query must be"),
        ({"value": [1]}, "value must be a tensor, got list"),
        ({"attn_bias": "mask"}, "attn_bias must be a tensor or one of .* got str"),
        ({"attn_bias": masks.BlockDiagonalMask.from_seqlens([3, 4])}, "query must be .1, 7, H, K"),
        ({"attn_bias": torch.randn(4, 4, 4, 4)}, "bias must broadcast"),
    ],
    ids=["dropout", "rank", "no_tensor", "unknown_mask", "mask_of_a_batch", "bias_shape"],
)
def test_bad_input(change, message):
    q, k, v = tensors(7, 7, batch=2)
    with pytest.raises((TypeError, ValueError), match=message):
        memory_efficient_attention(**({"query": q, "key": k, "value": v} | change))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: masks.LocalAttentionFromBottomRightMask(-1, 0), "window_left must be at least 0"),
        (lambda: masks.BlockDiagonalMask.from_seqlens([3, -1]), "lengths must be at least 0"),
        (lambda: masks.BlockDiagonalMask.from_seqlens([3], [1, 2]), "kv_seqlen must have 1"),
        (
            lambda: masks.BlockDiagonalMask.from_seqlens([3]).make_local_attention(0),
            "window_size must be at least 1",
        ),
        (
            lambda: masks.BlockDiagonalPaddedKeysMask.from_seqlens([3], 4, [5]),
            "kv_padding must hold the longest",
        ),
    ],
)
def test_bad_masks(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_object_of_xformers_is_understood_by_its_name():
    """A stranger with the attributes of xformers' class."""
    ours = masks.BlockDiagonalMask.from_seqlens(LENGTHS)
    stranger = type("BlockDiagonalMask", (), {})()
    stranger.q_seqinfo = types.SimpleNamespace(**vars(ours.q_seqinfo))
    stranger.k_seqinfo = types.SimpleNamespace(**vars(ours.k_seqinfo))
    q, k, v = tensors(17, 17)
    found = memory_efficient_attention(q, k, v, attn_bias=stranger)
    assert found.equal(memory_efficient_attention(q, k, v, attn_bias=ours))


def test_helpers_of_dinov2():
    x = torch.randn(4, 3, 8)
    index = torch.tensor([2, 0])
    assert all(a.equal(b) for a, b in zip(xformers.unbind(x, 1), x.unbind(1), strict=True))
    picked = xformers.index_select_cat([x, x], [index, index])
    assert picked.equal(torch.cat([x[index].flatten()] * 2))
    source, scaling = torch.randn(2, 3, 8), torch.randn(8)
    expected = x.clone()
    expected[index] += 0.5 * source * scaling
    leaf = x.clone().requires_grad_()
    found = xformers.scaled_index_add(leaf, index, source, scaling, alpha=0.5)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert leaf.grad is not None and leaf.grad.equal(torch.ones_like(x))
    with torch.no_grad():
        assert xformers.scaled_index_add(x, index, source, scaling, 0.5) is x
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("packed", [True, False])
def test_swiglu(packed):
    torch.manual_seed(0)
    layer = xformers.SwiGLU(8, 12, bias=False, _pack_weights=packed)
    names = {"w12.weight", "w3.weight"} if packed else {"w1.weight", "w2.weight", "w3.weight"}
    assert set(layer.state_dict()) == names
    x = torch.randn(5, 8)
    one, two = layer.w12(x).chunk(2, -1) if packed else (layer.w1(x), layer.w2(x))
    expected = layer.w3(torch.nn.functional.silu(one) * two)
    torch.testing.assert_close(layer(x), expected)


def test_install_serves_import_xformers():
    assert "xformers" not in sys.modules
    xformers.install()
    try:
        import xformers.ops as installed
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask

        assert installed.memory_efficient_attention is memory_efficient_attention
        assert BlockDiagonalMask is masks.BlockDiagonalMask
        xformers.install()  # twice is once
    finally:
        xformers.uninstall()
    assert "xformers" not in sys.modules and "xformers.ops" not in sys.modules
