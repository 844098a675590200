"""DecomposedBias and DistanceBias of flash_attention on every backend: parity with float64, the
models they come from, layouts, memory."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import DTYPES, assert_parity, double, eager_attention, gradients

import vitkit
from vitkit import DecomposedBias, DistanceBias
from vitkit.ops.flash_attention import reference

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(params=["native", "triton", "reference"])
def backend(request, device):
    name = device if request.param == "native" else request.param
    q = torch.zeros(1, 1, 1, 8, device=device)
    one = torch.zeros(1, 1, 1, 1, device=device)
    biases = (DecomposedBias(one, one), DistanceBias(one[0, 0, 0], q[:, 0, :, :2], q[:, 0, :, :2]))
    for bias in biases:
        reason = vitkit.explain("flash_attention", q, q, q, bias=bias).reasons[name]
        if reason is not None:
            pytest.skip(reason)
    return name


def make(device, dtype, batch=1, nq=9, nk=9, heads=2, head_dim=16):
    shapes = [(batch, n, heads, head_dim) for n in (nq, nk, nk)]
    return [torch.randn(*s, device=device).to(dtype) for s in shapes]


def decomposed(device, dtype, height, width, batch=1, nq=9, heads=2, head_dim=16):
    """(q, k, v, rel_h, rel_w) and the bias as a function of the last two."""
    torch.manual_seed(0)
    tensors = make(device, dtype, batch, nq, height * width, heads, head_dim)
    for size in (height, width):
        tensors.append(torch.randn(batch, heads, nq, size, device=device).to(dtype))
    return tensors, DecomposedBias


def distance(device, dtype, nk, batch=1, nq=9, heads=2, head_dim=16, shared=True):
    """(q, k, v, slopes) and the bias as a function of slopes: places on a grid of ten, two tokens
    without a place."""
    torch.manual_seed(0)
    tensors = make(device, dtype, batch, nq, nk, heads, head_dim)
    tensors.append(torch.tensor([2.0 ** -(i + 1) for i in range(heads)], device=device).to(dtype))
    sets = 1 if shared else batch
    places = [torch.randint(0, 10, (sets, n, 2), device=device).float() for n in (nq, nk)]
    for coords, token in zip(places, (0, nk // 2), strict=True):
        coords[:, token] = math.nan

    def bias(slopes):
        wide = slopes.dtype == torch.float64
        return DistanceBias(slopes, *(c.double() if wide else c for c in places))

    return tensors, bias


def check(tensors, bias, backend, causal=False, scale=None):
    """Forward, lse and every gradient by the tolerance rule."""
    q, k, *_ = tensors
    cotangent = torch.randn(q.shape, device=q.device).to(q.dtype)
    lse_cotangent = torch.randn(q.shape[0], q.shape[2], q.shape[1], device=q.device)
    factor = q.shape[-1] ** -0.5 if scale is None else scale

    def run(function, values):
        return gradients(function, values, [cotangent.to(values[0].dtype), lse_cotangent])

    def ours(q, k, v, *term):
        options = dict(causal=causal, scale=scale, return_lse=True, backend=backend)
        return vitkit.flash_attention(q, k, v, bias=bias(*term), **options)

    def truth(q, k, v, *term):
        return reference(q, k, v, bias(*term), None, None, causal, factor)

    def eager(q, k, v, *term):
        dense = bias(*term).dense(q.dtype)
        return eager_attention(q, k, v, dense, causal, scale), truth(q, k, v, *term)[1]

    got, want, yardstick = run(ours, tensors), run(truth, double(*tensors)), run(eager, tensors)
    terms = k.shape[1] * q.shape[-1]
    for name, a, e, x in zip(("out", "lse"), got[0], yardstick[0], want[0], strict=True):
        assert_parity(name, a, e, x, dtype=q.dtype, terms=terms)
    names = ("dq", "dk", "dv", "drel_h or dslopes", "drel_w")
    for name, a, e, x in zip(names, got[1], yardstick[1], want[1], strict=False):
        # A slope is summed over all queries, rel_h and rel_w over some keys.
        count = terms * q.shape[0] * (q.shape[1] if len(tensors) == 4 else 1)
        assert_parity(name, a, e, x, dtype=q.dtype, terms=count)
    return got


# ---- parity


@every_dtype
@pytest.mark.parametrize(
    ("height", "width"),
    [(3, 5), (1, 13), (13, 2), (2, 1), (4, 16), (2, 32), (3, 33), (2, 70)],
    ids=[
        "odd_grid",
        "one_row",
        "narrow",
        "one_column",
        "tile_is_a_row",
        "whole_tiles",
        "row_spills",
        "columns_in_tiles",
    ],
)
def test_decomposed_grids(device, backend, dtype, height, width):
    tensors, bias = decomposed(device, dtype, height, width, batch=2)
    check(tensors, bias, backend)


@every_dtype
@pytest.mark.parametrize("head_dim", [8, 64, 72], ids=lambda d: f"head_dim_{d}")
def test_head_dims(device, backend, dtype, head_dim):
    check(*decomposed(device, dtype, 3, 6, nq=7, head_dim=head_dim), backend)
    check(*distance(device, dtype, 18, nq=7, head_dim=head_dim), backend)


@every_dtype
@pytest.mark.parametrize("nq", [1, 40], ids=["one_query", "several_query_tiles"])
def test_other_numbers_of_queries(device, backend, dtype, nq):
    check(*decomposed(device, dtype, 5, 4, nq=nq), backend)
    check(*distance(device, dtype, 20, nq=nq), backend)


@every_dtype
@pytest.mark.parametrize("shared", [True, False], ids=["one_set_of_places", "places_per_batch"])
@pytest.mark.parametrize("nk", [2, 33, 70])
def test_distances(device, backend, dtype, nk, shared):
    check(*distance(device, dtype, nk, batch=2, shared=shared), backend)


@every_dtype
def test_causal_and_scale(device, backend, dtype):
    check(*decomposed(device, dtype, 4, 9, nq=36), backend, causal=True, scale=0.3)
    check(*decomposed(device, dtype, 2, 5, nq=20), backend, causal=True)
    check(*distance(device, dtype, 36, nq=36), backend, causal=True, scale=-0.3)


@every_dtype
def test_float32_terms_on_lower_precision_inputs(device, backend, dtype):
    (q, k, v, *rel), _ = decomposed(device, torch.float32, 3, 5)
    slopes = torch.tensor([0.3, 0.7], dtype=torch.float64, device=device)
    places = torch.rand(1, 15, 2, device=device)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    biases = (DecomposedBias(*rel), DecomposedBias(*(r.double() for r in rel)))
    for bias in (*biases, DistanceBias(slopes, places[:, :9], places)):
        got = vitkit.flash_attention(q, k, v, bias=bias, backend=backend)
        dense = bias.dense(torch.float64)
        want = reference(*double(q, k, v), dense, None, None, False, 0.25)[0]
        assert_parity("out", got, eager_attention(q, k, v, dense), want, terms=240)


def test_long_rows_cross_every_chunk(device):
    """More keys than one chunk of the kernels, and cells of the gradient in both directions."""
    for dtype in (torch.float32, torch.bfloat16):
        check(*decomposed(device, dtype, 30, 41, nq=300, heads=1, head_dim=8), device)
        check(*distance(device, dtype, 1230, nq=300, heads=1, head_dim=8), device)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_calls_agree_with_the_reference(data):
    # At least a few dozen numbers in every gradient: the eager error of one or two is luck.
    height, width = data.draw(st.integers(2, 12)), data.draw(st.integers(2, 24))
    nq, batch, heads = (data.draw(st.integers(*n)) for n in ((12, 50), (1, 2), (1, 3)))
    dtype = data.draw(st.sampled_from(DTYPES))
    sizes = dict(batch=batch, nq=nq, heads=heads, head_dim=8 * data.draw(st.integers(1, 5)))
    check(*decomposed("cpu", dtype, height, width, **sizes), "cpu")
    shared = data.draw(st.booleans())
    check(*distance("cpu", dtype, height * width, shared=shared, **sizes), "cpu")


# ---- the models


def test_segment_anything(device, backend):
    """ViTDet's and SAM's decomposed relative positions, as their code adds them to the scores."""
    torch.manual_seed(0)
    height, width, heads, head_dim = 3, 5, 2, 16
    n = height * width
    q, k, v = (torch.randn(2, n, heads, head_dim, device=device) for _ in range(3))
    tables = [torch.randn(2 * size - 1, head_dim, device=device) for size in (height, width)]

    def around(table, size):
        i = torch.arange(size, device=device)
        return table[i[:, None] - i[None, :] + size - 1]

    r_q = q.transpose(1, 2).reshape(2 * heads, height, width, head_dim)
    rel_h = torch.einsum("bhwc,hkc->bhwk", r_q, around(tables[0], height))
    rel_w = torch.einsum("bhwc,wkc->bhwk", r_q, around(tables[1], width))
    attn = (q.transpose(1, 2) * head_dim**-0.5 @ k.transpose(1, 2).mT).flatten(0, 1)
    attn = attn.view(-1, height, width, height, width)
    attn = (attn + rel_h[:, :, :, :, None] + rel_w[:, :, :, None, :]).view(2, heads, n, n)
    want = (attn.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)

    bias = DecomposedBias(rel_h.reshape(2, heads, n, height), rel_w.reshape(2, heads, n, width))
    got = vitkit.flash_attention(q, k, v, bias=bias, backend=backend)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_transformers_segment_anything(device):
    """The bias and the attention of a SAM layer as transformers computes them."""
    sam = pytest.importorskip("transformers.models.sam.modeling_sam")
    from transformers import SamVisionConfig

    torch.manual_seed(0)
    config = SamVisionConfig(hidden_size=32, num_attention_heads=2, image_size=64, patch_size=16)
    config._attn_implementation = "eager"
    layer = sam.SamVisionAttention(config, window_size=0).to(device).eval()
    for table in (layer.rel_pos_h, layer.rel_pos_w):
        torch.nn.init.normal_(table)
    x = torch.randn(2, 4, 4, 32, device=device)
    want = layer(x)[0]
    q, k, v = layer.qkv(x).view(2, 16, 3, 2, 16).unbind(2)
    rows = q.transpose(1, 2).reshape(4, 4, 4, 16)
    around = [layer.get_rel_pos(4, 4, t) for t in (layer.rel_pos_h, layer.rel_pos_w)]
    rel_h = torch.einsum("bhwc,hkc->bhwk", rows, around[0]).reshape(2, 2, 16, 4)
    rel_w = torch.einsum("bhwc,wkc->bhwk", rows, around[1]).reshape(2, 2, 16, 4)
    out = vitkit.flash_attention(q, k, v, bias=DecomposedBias(rel_h, rel_w), backend=device)
    got = layer.proj(out.reshape(2, 4, 4, 32))
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_titan(device, backend):
    """TITAN's 2-D ALiBi for 12 heads: slopes of the next lower power of two, then every second
    one between them; no bias in the row and column of the class token."""
    torch.manual_seed(0)
    slopes = [2.0**-i for i in range(1, 9)] + [2.0 ** -(i + 0.5) for i in range(4)]
    grid = torch.tensor([(i, j) for i in range(4) for j in range(3)], dtype=torch.float64)
    want_bias = torch.zeros(12, 13, 13, dtype=torch.float64)
    for t in range(12):
        for u in range(12):
            far = math.hypot(*(grid[t] - grid[u]).tolist())
            want_bias[:, t + 1, u + 1] = -torch.tensor(slopes, dtype=torch.float64) * far
    coords = torch.cat([torch.full((1, 2), math.nan), grid.float()])[None].to(device)
    bias = DistanceBias(torch.tensor(slopes, device=device), coords, coords)
    torch.testing.assert_close(bias.dense(torch.float64)[0].cpu(), want_bias, rtol=1e-7, atol=0)
    q, k, v = make(device, torch.float32, nq=13, nk=13, heads=12)
    got = vitkit.flash_attention(q, k, v, bias=bias, backend=backend)
    want = reference(*double(q, k, v), want_bias.to(device), None, None, False, 0.25)[0]
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)


# ---- layouts, odd values


def test_strides(device, backend):
    """Expanded, sliced, transposed and not dense."""
    torch.manual_seed(0)
    q, k, v = make(device, torch.float32, batch=2, nq=6, nk=15)
    rel_h = torch.randn(1, 6, 1, 9, device=device).transpose(1, 2)[..., 2:5].expand(2, 2, 6, 3)
    rel_w = torch.randn(2, 2, 5, 6, device=device).mT  # [2, 2, 6, 5], last dimension not dense
    places = torch.randn(2, 2, 15, device=device).mT
    slopes = torch.randn(2, 3, device=device)[:, 1]
    for bias in (DecomposedBias(rel_h, rel_w), DistanceBias(slopes, places[:1, 3:9], places)):
        got = vitkit.flash_attention(q, k, v, bias=bias, backend=backend)
        want = reference(*double(q, k, v), bias.dense(torch.float64), None, None, False, 0.25)[0]
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_gradients_of_expanded_tensors(device, backend):
    """What is shared by batch and heads gets the sum, and rows that are not dense get theirs."""
    torch.manual_seed(0)
    q, k, v = make(device, torch.float32, batch=2, nq=6, nk=15)
    rel_h = torch.randn(6, 3, device=device, requires_grad=True)
    rel_w = torch.randn(2, 2, 5, 6, device=device, requires_grad=True)

    def run(backend, q, k, v, rel_h, rel_w):
        bias = DecomposedBias(rel_h.expand(2, 2, 6, 3), rel_w.mT)
        out = vitkit.flash_attention(q, k, v, bias=bias, backend=backend)
        return torch.autograd.grad((out * out.detach().cos()).sum(), (rel_h, rel_w))

    wide = [t.detach().double().requires_grad_() for t in (rel_h, rel_w)]
    want = run("reference", *double(q, k, v), *wide)
    for got, x in zip(run(backend, q, k, v, rel_h, rel_w), want, strict=True):
        torch.testing.assert_close(got.double(), x, rtol=1e-4, atol=1e-5)


def test_nan_stays_in_its_row(device, backend):
    (q, k, v, rel_h, rel_w), bias = decomposed(device, torch.float32, 3, 5)
    clean = vitkit.flash_attention(q, k, v, bias=bias(rel_h, rel_w), backend=backend)
    rel_h[0, 1, 4, 2] = math.nan
    out = vitkit.flash_attention(q, k, v, bias=bias(rel_h, rel_w), backend=backend)
    assert out[0, 4, 1].isnan().all()
    out[0, 4, 1] = clean[0, 4, 1]
    torch.testing.assert_close(out, clean)


def test_minus_infinity_masks_whole_rows_and_columns_of_the_grid(device, backend):
    (q, k, v, rel_h, rel_w), bias = decomposed(device, torch.float32, 3, 5)
    rel_h[..., 1] = -math.inf
    rel_w[..., 4] = -math.inf
    rel_h[0, 0, 7] = -math.inf  # a query that attends nothing
    leaves = [t.requires_grad_() for t in (q, k, v, rel_h, rel_w)]
    out = vitkit.flash_attention(q, k, v, bias=bias(rel_h, rel_w), backend=backend)
    keep = (torch.arange(15, device=device) // 5 != 1) & (torch.arange(15, device=device) % 5 != 4)
    mask = keep.expand(1, 2, 9, 15).clone()
    mask[0, 0, 7] = False
    finite = bias(rel_h, rel_w).dense().detach().nan_to_num(neginf=0).masked_fill(~mask, -math.inf)
    want = vitkit.flash_attention(q, k, v, bias=finite, backend="reference")
    torch.testing.assert_close(out, want)
    assert torch.all(out[0, 7, 0] == 0)
    out.square().sum().backward()
    assert all(t.grad.isfinite().all() for t in leaves)
    assert torch.all(rel_h.grad[0, 0, 7] == 0) and torch.all(rel_w.grad[..., 4] == 0)


def test_tokens_without_a_place_have_no_bias(device, backend):
    q, k, v = make(device, torch.float32)
    nowhere = torch.full((1, 9, 2), math.nan, device=device)
    nowhere[0, 3, 0] = 1.0  # one coordinate is not enough
    slopes = torch.ones(2, device=device, requires_grad=True)
    bias = DistanceBias(slopes, nowhere, nowhere)
    out = vitkit.flash_attention(q, k, v, bias=bias, backend=backend)
    torch.testing.assert_close(out, vitkit.flash_attention(q, k, v, backend=backend))
    out.sum().backward()
    assert torch.all(slopes.grad == 0)


@pytest.mark.parametrize(
    ("batch", "nq", "height", "heads"),
    [(0, 4, 2, 2), (2, 0, 2, 2), (2, 4, 0, 2), (2, 4, 2, 0)],
    ids=["empty_batch", "no_queries", "no_keys", "no_heads"],
)
def test_empty(device, backend, batch, nq, height, heads):
    sizes = dict(batch=batch, nq=nq, heads=heads)
    shared = batch == 0
    for tensors, bias in (
        decomposed(device, torch.float32, height, 3, **sizes),
        _no_places(device, 3 * height, shared, **sizes),
    ):
        leaves = [t.requires_grad_() for t in tensors]
        q, k, v, *term = leaves
        out, lse = vitkit.flash_attention(
            q, k, v, bias=bias(*term), return_lse=True, backend=backend
        )
        assert out.shape == q.shape and lse.shape == (batch, heads, nq)
        assert torch.all(out == 0) and torch.all(lse == -math.inf)
        out.sum().backward()
        for t in leaves:
            assert t.grad.shape == t.shape and torch.all(t.grad == 0)


def _no_places(device, nk, shared, batch, nq, heads):
    tensors = make(device, torch.float32, batch, nq, nk, heads)
    coords = [torch.zeros(1 if shared else batch, n, 2, device=device) for n in (nq, nk)]
    return [*tensors, torch.ones(heads, device=device)], lambda slopes: DistanceBias(
        slopes, *coords
    )


def test_threads_do_not_change_a_bit(device):
    if device != "cpu":
        pytest.skip("torch's threads run the CPU kernels")
    calls = (
        decomposed(device, torch.float32, 20, 21, nq=300, heads=1),
        distance(device, torch.float32, 420, nq=300, heads=1, batch=2),
    )
    for tensors, bias in calls:

        def run(tensors=tensors, bias=bias):
            leaves = [t.detach().clone().requires_grad_() for t in tensors]
            out = vitkit.flash_attention(*leaves[:3], bias=bias(*leaves[3:]), backend="cpu")
            return [out, *torch.autograd.grad(out.square().sum(), leaves)]

        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            one = run()
            torch.set_num_threads(3)
            three = run()
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


# ---- memory


def peak_bytes(call):
    """Most memory allocated at once, beyond what was there."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "with_gradients"])
def test_distances_cost_no_memory(device, backend, backward):
    """TITAN's bias against attention without one: the difference is of the size of the inputs."""
    if backend == "reference" or device != "cpu":
        pytest.skip("the reference is the formula; the profiler's events are those of the CPU")
    n, heads = (128, 2) if backend == "triton" else (2000, 12)
    torch.manual_seed(0)
    q, k, v = make(device, torch.float32, nq=n, nk=n, heads=heads, head_dim=8)
    slopes = torch.rand(heads)
    coords = torch.rand(1, n, 2)

    def call(bias):
        leaves = [t.detach().requires_grad_(backward) for t in (q, k, v)]
        out = vitkit.flash_attention(*leaves, bias=bias, backend=backend)
        if backward:
            out.backward(torch.ones_like(out))

    def with_bias():
        s = slopes.detach().requires_grad_(backward)
        call(DistanceBias(s, coords, coords))

    for warm_up in (lambda: call(None), with_bias):
        warm_up()
    small = 2 * coords.nbytes + slopes.nbytes
    if backward:
        small += heads * n * 4  # a number per query, as lse
    without = peak_bytes(lambda: call(None))
    assert without > 0
    assert peak_bytes(with_bias) <= without + small + 4096


def test_decomposed_bias_needs_nothing_but_its_tables(device, backend):
    if backend == "reference" or device != "cpu":
        pytest.skip("the reference is the formula; the profiler's events are those of the CPU")
    side = 16 if backend == "triton" else 30
    n = side * side
    tensors, bias = decomposed(device, torch.bfloat16, side, side, nq=n, heads=1, head_dim=8)

    def call(bias, count):
        leaves = [t.detach().requires_grad_() for t in tensors]
        term = None if bias is None else bias(*leaves[3:])
        vitkit.flash_attention(*leaves[:3], bias=term, backend=backend).sum().backward()

    call(None, 3)
    call(bias, 5)
    tables = sum(t.nbytes for t in tensors[3:])
    limit = peak_bytes(lambda: call(None, 3)) + 4 * tables + 4096  # gradients, float32 sums
    assert limit < n * n * 2
    assert peak_bytes(lambda: call(bias, 5)) <= limit
