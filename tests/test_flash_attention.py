"""vitkit.flash_attention on every backend: parity with float64, layouts, masks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import DTYPES, assert_parity, double, eager_attention, gradients

import vitkit
from vitkit.ops.flash_attention import reference

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(params=["native", "triton", "reference"])
def backend(request, device):
    name = device if request.param == "native" else request.param
    q = torch.zeros(1, 1, 1, 8, device=device)
    reason = vitkit.explain("flash_attention", q, q, q).reasons[name]
    if reason is not None:
        pytest.skip(reason)
    return name


def exact(q, k, v, bias=None, causal=False, scale=None):
    q, k, v, bias = (
        t.double() if t is not None and t.is_floating_point() else t for t in (q, k, v, bias)
    )
    return reference(q, k, v, bias, None, None, causal, scale or q.shape[-1] ** -0.5)


def make(device, dtype, batch=2, nq=9, nk=9, heads=2, head_dim=16):
    torch.manual_seed(0)
    shapes = [(batch, n, heads, head_dim) for n in (nq, nk, nk)]
    return [torch.randn(*s, device=device).to(dtype) for s in shapes]


def check(q, k, v, backend, bias=None, causal=False, scale=None):
    """Forward, lse and every gradient by the tolerance rule."""
    leaves = [q, k, v] if bias is None else [q, k, v, bias]
    cotangent = torch.randn(q.shape, device=q.device).to(q.dtype)
    lse_cotangent = torch.randn(q.shape[0], q.shape[2], q.shape[1], device=q.device)

    def run(function, tensors, with_lse):
        cotangents = [cotangent.to(tensors[0].dtype)]
        return gradients(
            function, tensors, [*cotangents, lse_cotangent] if with_lse else cotangents
        )

    def ours(q, k, v, bias=None):
        return vitkit.flash_attention(
            q, k, v, bias=bias, causal=causal, scale=scale, return_lse=True, backend=backend
        )

    def truth(q, k, v, bias=None):
        return reference(q, k, v, bias, None, None, causal, scale or q.shape[-1] ** -0.5)

    def eager(q, k, v, bias=None):
        out = eager_attention(q, k, v, bias, causal, scale)
        return out, truth(q, k, v, bias)[1]

    got, want, yardstick = (
        run(ours, leaves, True),
        run(truth, double(*leaves), True),
        run(eager, leaves, True),
    )
    terms = k.shape[1] * q.shape[-1]
    for name, a, e, x in zip(("out", "lse"), got[0], yardstick[0], want[0], strict=True):
        assert_parity(name, a, e, x, dtype=q.dtype, terms=terms)
    if k.shape[1] == 1:
        return  # test_one_key_has_no_score_gradient: what is left of dq and dk is rounding
    grads = zip(("dq", "dk", "dv", "dbias"), got[1], yardstick[1], want[1], strict=False)
    for name, a, e, x in grads:
        assert_parity(name, a, e, x, dtype=q.dtype, terms=terms * q.shape[0])


@every_dtype
@pytest.mark.parametrize("head_dim", [8, 24, 64, 72, 88, 128, 256], ids=lambda d: f"head_dim_{d}")
def test_head_dims(device, backend, dtype, head_dim):
    check(*make(device, dtype, batch=1, nq=5, nk=11, head_dim=head_dim), backend)


@every_dtype
@pytest.mark.parametrize(
    ("nq", "nk"),
    [(1, 1), (1, 40), (40, 1), (17, 33), (49, 49), (64, 64), (65, 77), (130, 130)],
    ids=[
        "one_token",
        "one_query",
        "one_key",
        "odd",
        "swin_window",
        "full_tiles",
        "kv_77",
        "cls_spill",
    ],
)
def test_sequence_lengths(device, backend, dtype, nq, nk):
    check(*make(device, dtype, batch=1, nq=nq, nk=nk), backend)


@every_dtype
@pytest.mark.parametrize(
    "shape",
    [
        (2, 2, 9, 13),
        (1, 2, 9, 13),
        (2, 1, 9, 13),
        (1, 1, 1, 13),
        (2, 1, 9, 1),
        (9, 13),
        (2, 1, 1, 13),
    ],
    ids=["full", "over_batch", "over_heads", "key_row", "query_column", "two_dims", "key_padding"],
)
def test_bias_broadcasts_and_so_does_its_gradient(device, backend, dtype, shape):
    q, k, v = make(device, dtype, nq=9, nk=13)
    check(q, k, v, backend, bias=torch.randn(shape, device=device).to(dtype))


@every_dtype
def test_float32_bias_on_lower_precision_inputs(device, backend, dtype):
    q, k, v = make(device, dtype)
    bias = torch.randn(1, 2, 9, 9, device=device)
    got = vitkit.flash_attention(q, k, v, bias=bias, backend=backend)
    assert_parity("out", got, eager_attention(q, k, v, bias), exact(q, k, v, bias)[0], terms=144)


@every_dtype
def test_bool_mask_with_rows_that_attend_nothing(device, backend, dtype):
    q, k, v = make(device, dtype)
    mask = torch.rand(2, 1, 9, 9, device=device) > 0.4
    mask[0, 0, 3] = mask[1, 0, 0] = False
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out, lse = vitkit.flash_attention(*leaves, bias=mask, return_lse=True, backend=backend)
    assert torch.all(out[0, 3] == 0) and torch.all(out[1, 0] == 0)
    assert torch.all(lse[0, :, 3] == -math.inf) and torch.all(lse[1, :, 0] == -math.inf)
    out.sum().backward()
    assert torch.all(leaves[0].grad[0, 3] == 0)
    assert all(t.grad.isfinite().all() for t in leaves)
    assert_parity("out", out, eager_attention(q, k, v, mask), exact(q, k, v, mask)[0], terms=144)


def test_minus_infinity_in_a_float_bias_masks(device, backend):
    q, k, v = make(device, torch.float32)
    mask = torch.rand(2, 2, 9, 9, device=device) > 0.4
    mask[0, 1, 2] = False
    bias = torch.zeros(2, 2, 9, 9, device=device).masked_fill(~mask, -math.inf)
    for a, b in zip(
        vitkit.flash_attention(q, k, v, bias=bias, return_lse=True, backend=backend),
        vitkit.flash_attention(q, k, v, bias=mask, return_lse=True, backend=backend),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@every_dtype
@pytest.mark.parametrize(("nq", "nk"), [(1, 1), (9, 9), (70, 70), (5, 20), (20, 5)])
def test_causal_is_aligned_to_the_first_token(device, backend, dtype, nq, nk):
    check(*make(device, dtype, batch=1, nq=nq, nk=nk), backend, causal=True)


@every_dtype
def test_explicit_scale(device, backend, dtype):
    check(*make(device, dtype), backend, scale=0.37)


@every_dtype
def test_large_scores_do_not_overflow(device, backend, dtype):
    q, k, v = make(device, dtype)
    got = vitkit.flash_attention(q * 30, k * 30, v, backend=backend)
    want = exact(q * 30, k * 30, v)[0]
    assert_parity("out", got, eager_attention(q * 30, k * 30, v), want, terms=144)


@every_dtype
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    "lengths",
    [
        ([4, 5], [4, 5]),
        ([3, 0, 6], [3, 0, 6]),
        ([2, 7], [9, 0]),
        ([5], [5]),
        ([40, 1, 25], [3, 30, 64]),
    ],
    ids=["two", "empty_sequence", "sequence_without_keys", "one", "cross"],
)
def test_packed_equals_one_call_per_sequence(device, backend, dtype, lengths, causal):
    torch.manual_seed(0)
    nq, nk = lengths
    q, k, v = (torch.randn(sum(n), 2, 16, device=device).to(dtype) for n in (nq, nk, nk))
    cu_q, cu_k = (
        torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()], dtype=torch.int32, device=device)
        for n in (nq, nk)
    )
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out, lse = vitkit.flash_attention(
        *leaves,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        causal=causal,
        return_lse=True,
        backend=backend,
    )
    weight = torch.randn_like(q)
    grads = torch.autograd.grad(out, leaves, weight)
    starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
    for i, (lq, lk) in enumerate(zip(nq, nk, strict=True)):
        rows, columns = slice(starts_q[i], starts_q[i] + lq), slice(starts_k[i], starts_k[i] + lk)
        part = [
            t.clone().requires_grad_() for t in (q[rows][None], k[columns][None], v[columns][None])
        ]
        want, want_lse = vitkit.flash_attention(
            *part, causal=causal, return_lse=True, backend="reference"
        )
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(out[rows][None], want, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(lse[None, :, rows], want_lse, rtol=1e-4, atol=1e-4)
        want_grads = torch.autograd.grad(want, part, weight[rows][None])
        for got, w, s in zip(grads, want_grads, (rows, columns, columns), strict=True):
            torch.testing.assert_close(got[s][None], w, rtol=8 * tolerance, atol=8 * tolerance)


def test_strided_inputs_are_read_in_place(device, backend):
    """Views into one qkv projection, a transposed [B, H, N, D] tensor, an expanded batch, an offset
    storage."""
    torch.manual_seed(0)
    qkv = torch.randn(2, 9, 3, 2, 16, device=device)
    heads_first = torch.randn(2, 2, 9, 16, device=device).transpose(1, 2)
    expanded = torch.randn(1, 9, 2, 16, device=device).expand(2, -1, -1, -1)
    offset = torch.randn(2 * 9 * 2 * 16 + 1, device=device)[1:].view(2, 9, 2, 16)
    last_dim_strided = torch.randn(2, 9, 2, 32, device=device)[..., ::2]
    for q, k, v in [
        qkv.unbind(2),
        (heads_first, expanded, offset),
        (last_dim_strided, last_dim_strided, expanded),
    ]:
        got = vitkit.flash_attention(q, k, v, backend=backend)
        torch.testing.assert_close(got.double(), exact(q, k, v)[0], rtol=1e-5, atol=1e-5)


def test_expanded_and_strided_gradients(device, backend):
    q, k, v = (t.requires_grad_() for t in make(device, torch.float32))
    out = vitkit.flash_attention(q, k, v, backend=backend)
    expected = torch.autograd.grad(exact(q, k, v)[0].float(), (q, k, v), torch.ones_like(out))
    got = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    cotangent = torch.randn(*out.shape[:-1], 2 * out.shape[-1], device=device)[..., ::2]
    got = torch.autograd.grad(out, (q, k, v), cotangent, retain_graph=True)
    expected = torch.autograd.grad(out, (q, k, v), cotangent.contiguous())
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@every_dtype
def test_one_key_has_no_score_gradient(device, backend, dtype):
    """softmax of one score is 1: the gradient of the scores is a difference of equal sums, which
    torch's softmax gets to cancel exactly and a kernel that recomputes them to their rounding."""
    q, k, v = (t.requires_grad_() for t in make(device, dtype, nk=1))
    out = vitkit.flash_attention(q, k, v, backend=backend)
    cotangent = torch.randn_like(out)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), cotangent)
    torch.testing.assert_close(dv, cotangent.float().sum(1, keepdim=True).to(dtype))
    size = (cotangent.abs() * v.abs()).sum(-1).max() * q.shape[-1] ** -0.5
    eps = torch.finfo(dtype).eps
    assert dq.abs().max() <= 4 * eps * size * k.abs().max()
    assert dk.abs().max() <= 4 * eps * size * q.abs().max() * q.shape[1]


def test_gradient_of_lse_alone(device, backend):
    q, k, v = (t.requires_grad_() for t in make(device, torch.float32))
    _, lse = vitkit.flash_attention(q, k, v, return_lse=True, backend=backend)
    got = torch.autograd.grad(lse.sum(), (q, k))
    want = torch.autograd.grad(exact(q, k, v)[1].sum(), (q, k))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_nan_stays_in_its_row(device, backend):
    q, k, v = make(device, torch.float32)
    clean = vitkit.flash_attention(q, k, v, backend=backend)
    q[0, 3, 1] = math.nan
    out, lse = vitkit.flash_attention(q, k, v, return_lse=True, backend=backend)
    assert out[0, 3, 1].isnan().all() and lse[0, 1, 3].isnan()
    out[0, 3, 1] = clean[0, 3, 1]
    torch.testing.assert_close(out, clean)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("batch", "nq", "nk", "heads"),
    [(0, 4, 4, 2), (2, 0, 4, 2), (2, 4, 0, 2), (2, 0, 0, 2), (2, 4, 4, 0)],
    ids=["empty_batch", "no_queries", "no_keys", "no_tokens", "no_heads"],
)
def test_empty(device, backend, batch, nq, nk, heads, causal):
    q, k, v = (t.requires_grad_() for t in make(device, torch.float32, batch, nq, nk, heads))
    bias = torch.zeros(1, heads, nq, nk, device=device, requires_grad=True)
    out, lse = vitkit.flash_attention(
        q, k, v, bias=bias, causal=causal, return_lse=True, backend=backend
    )
    assert out.shape == q.shape and lse.shape == (batch, heads, nq)
    assert torch.all(out == 0) and torch.all(lse == -math.inf)
    out.sum().backward()
    for t in (q, k, v, bias):
        assert t.grad.shape == t.shape and torch.all(t.grad == 0)


def test_no_score_sized_memory(device, backend):
    """Neither pass may hold a [B, H, N, N] tensor, with a bias broadcast over the batch or
    without."""
    if backend == "reference":
        pytest.skip("the reference is the formula, scores and all")
    n, heads = (192, 1) if backend == "triton" and device == "cpu" else (512, 2)
    q, k, v = make(device, torch.float32, batch=2, nq=n, nk=n, heads=heads, head_dim=8)
    bias = torch.randn(1, heads, 1, n, device=device, requires_grad=True)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    limit = 2 * heads * n * n * 4

    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(result):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.untyped_storage().nbytes())
            return result

    with torch.profiler.profile(profile_memory=True) as profile, Watch():
        vitkit.flash_attention(*leaves, bias=bias, backend=backend).sum().backward()
    events = profile.profiler.kineto_results.events()
    allocations = [e.nbytes() for e in events if e.name() == "[memory]"]
    assert largest < limit
    assert allocations and max(allocations) < limit


def test_gradient_of_a_bias_shared_by_the_batch_is_of_its_own_size(device, backend):
    """No [B, H, N, N] buffer: what is allocated for the gradient of [1, H, N, N] does not grow with
    the batch."""
    if backend == "reference":
        pytest.skip("the reference is the formula, scores and all")
    n, heads = (40, 1) if backend == "triton" and device == "cpu" else (160, 2)
    batch = 12
    tensors = make(device, torch.float32, batch=batch, nq=n, nk=n, heads=heads, head_dim=8)
    bias = torch.randn(1, heads, n, n, device=device)

    def peak(need_dbias):
        leaves = [t.detach().requires_grad_() for t in tensors]
        term = bias.detach().requires_grad_(need_dbias)
        out = vitkit.flash_attention(*leaves, bias=term, backend=backend)
        with torch.profiler.profile(profile_memory=True) as profile:
            out.backward(out.detach())
        now = most = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                most = max(most, now)
        return most

    peak(True)
    # The gradient, and at most a few partial sums of its size: a quarter of the batch's scores.
    assert 0 < peak(True) - peak(False) <= bias.nbytes * (1 + batch // 4)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_calls_agree_with_the_reference(data):
    """Native kernels of the machine's own device against float64, shapes and options drawn at
    random."""
    device = "cpu"
    batch, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    nq, nk = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 150))
    head_dim = 8 * data.draw(st.integers(1, 16))
    dtype = data.draw(st.sampled_from(DTYPES))
    causal = data.draw(st.booleans())
    kind = data.draw(st.sampled_from(["none", "float", "bool"]))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    q, k, v = make(device, dtype, batch, nq, nk, heads, head_dim)
    bias = None
    if kind != "none":
        sizes = [data.draw(st.sampled_from([1, n])) for n in (batch, heads, nq, nk)]
        bias = torch.rand(sizes) > 0.3 if kind == "bool" else torch.randn(sizes).to(dtype)
    check(q, k, v, "cpu", bias, causal) if kind != "bool" else check_forward(q, k, v, bias, causal)


def check_forward(q, k, v, bias, causal):
    got, lse = vitkit.flash_attention(q, k, v, bias=bias, causal=causal, return_lse=True)
    want, want_lse = exact(q, k, v, bias, causal)
    terms = k.shape[1] * q.shape[-1]
    assert_parity("out", got, eager_attention(q, k, v, bias, causal), want, terms=terms)
    assert_parity("lse", lse, want_lse.float(), want_lse, dtype=q.dtype, terms=terms)


def test_agrees_with_torch(device):
    q, k, v = make(device, torch.float32, nq=33, nk=33, head_dim=64)
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    for causal in (False, True):
        want = F.scaled_dot_product_attention(*heads_first, is_causal=causal).transpose(1, 2)
        torch.testing.assert_close(vitkit.flash_attention(q, k, v, causal=causal), want)
