"""Rows of the attention matrix against the whole of it."""

from __future__ import annotations

import pytest
import torch

import vitkit


def qk(nq=7, nk=9, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(2, nq, 3, 16, dtype=dtype), torch.randn(2, nk, 3, 16, dtype=dtype)


def whole(q, k, bias=None, causal=False, scale=None):
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double())
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = (
            scores.masked_fill(~bias, float("-inf")) if bias.dtype == torch.bool else scores + bias
        )
    if causal:
        scores = scores + torch.full(scores.shape[-2:], float("-inf")).triu(1)
    return scores.softmax(-1).nan_to_num(0.0)


BIAS = torch.linspace(-2, 2, 3 * 7 * 9).view(1, 3, 7, 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"scale": 0.1}, {"bias": BIAS}, {"bias": BIAS > -0.5}],
    ids=["plain", "causal", "scale", "bias", "mask"],
)
def test_rows_are_those_of_the_matrix(options, dtype):
    q, k = qk(dtype=dtype)
    found = vitkit.attention_map(q, k, [0, 5, -1], **options)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        found.double(), whole(q, k, **options)[:, :, [0, 5, 6]], atol=1e-6, rtol=1e-5
    )


def test_they_weigh_the_values_as_flash_attention_does():
    q, k = qk()
    v = torch.randn_like(k)
    rows = vitkit.attention_map(q, k, 3)
    out = torch.einsum("bhrn,bnhd->brhd", rows, v)
    torch.testing.assert_close(out[:, 0], vitkit.flash_attention(q, k, v)[:, 3])


def test_a_row_without_keys_is_zero_and_has_no_gradient():
    q, k = qk()
    q.requires_grad_()
    mask = torch.ones(7, 9, dtype=torch.bool)
    mask[2] = False
    found = vitkit.attention_map(q, k, [1, 2], bias=mask)
    assert found[:, :, 1].eq(0).all() and found[:, :, 0].sum(-1).allclose(torch.ones(2, 3))
    found.square().sum().backward()
    assert q.grad[:, 2].eq(0).all() and q.grad[:, 1].abs().sum() > 0 and q.grad.isfinite().all()


def test_memory_is_that_of_the_rows():
    """100,000 tokens: the matrix would have 1e10 elements."""
    q = torch.randn(1, 100_000, 1, 8)
    assert vitkit.attention_map(q, q, 0).shape == (1, 1, 1, 100_000)


def test_no_rows_and_one_row():
    q, k = qk()
    assert vitkit.attention_map(q, k, []).shape == (2, 3, 0, 9)
    assert vitkit.attention_map(q, k, torch.tensor(6)).shape == (2, 3, 1, 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 7}, "rows must lie in -7..6, got .7."),
        ({"rows": [0.5]}, "rows must be an integer"),
        ({"rows": [[0]]}, "rows must be an integer"),
        ({"q": torch.randn(7, 3, 16)}, "q must have shape"),
        ({"k": torch.randn(2, 9, 2, 16)}, "k must have shape"),
        ({"k": torch.randn(2, 9, 3, 16, dtype=torch.float64)}, "k must have the dtype of q"),
        ({"bias": torch.randn(5, 5)}, "bias must broadcast"),
        ({"bias": 1.0}, "bias must be a tensor, got float"),
        ({"bias": torch.ones(7, 9, dtype=torch.int64)}, "bias must be one of .*, got int64"),
        ({"bias": torch.ones(7, 9, device="meta")}, "bias must be on the device of q"),
        ({"rows": torch.ones(7, dtype=torch.bool)}, "rows must be an integer"),
    ],
)
def test_bad_input(change, message):
    q, k = qk()
    with pytest.raises((TypeError, ValueError), match=message):
        vitkit.attention_map(**({"q": q, "k": k, "rows": 0} | change))
