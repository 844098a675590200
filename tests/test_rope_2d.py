"""vitkit.rope_2d on every backend: the hosts' own functions, layouts, strides, gradients, bad
input."""

from __future__ import annotations

import gated
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import DTYPES, assert_parity, double, gradients
from refusals import check_bad_call

import vitkit

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(params=["native", "triton", "reference"])
def backend(request, device):
    name = device if request.param == "native" else request.param
    x, table = torch.zeros(1, 1, 1, 2, device=device), torch.zeros(1, 2, device=device)
    reason = vitkit.explain("rope_2d", x, None, table, table).reasons[name]
    if reason is not None:
        pytest.skip(reason)
    return name


def make(device, dtype, b=2, n=7, heads=3, d=16, k_heads=3, table=None):
    """q, k, cos, sin"""
    torch.manual_seed(0)
    q, k = (torch.randn(b, n, h, d, device=device).to(dtype) for h in (heads, k_heads))
    cos, sin = torch.randn(2, *(table or (n - 1, d)), device=device)
    return [q, k, cos, sin]


def host(q, k, cos, sin, layout):
    """As models write it, in the dtype they are in; tables of one value per element."""
    if cos.dim() == 2:
        cos, sin = cos[None, :, None], sin[None, :, None]
    if cos.shape[-1] != q.shape[-1]:
        cos, sin = (
            torch.cat([t, t], -1) if layout == "half" else t.repeat_interleave(2, -1)
            for t in (cos, sin)
        )

    def turned(x):
        if layout == "half":
            a, b = x.chunk(2, -1)
            return torch.cat([-b, a], -1)
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)

    prefix = q.shape[1] - cos.shape[1]
    cos, sin = cos.to(q.dtype), sin.to(q.dtype)
    return tuple(
        torch.cat([x[:, :prefix], x[:, prefix:] * cos + turned(x[:, prefix:]) * sin], 1)
        for x in (q, k)
    )


def check(tensors, layout, backend):
    cotangents = [torch.randn_like(t) for t in tensors[:2]]

    def ours(*t):
        return vitkit.rope_2d(*t, layout=layout, backend=backend)

    def plain(*t):
        return host(*t, layout)

    got = gradients(ours, tensors, cotangents)
    eager = gradients(plain, tensors, cotangents)
    truth = gradients(plain, double(*tensors), cotangents)
    heads = tensors[0].shape[0] * (tensors[0].shape[2] + tensors[1].shape[2])
    for kind, names, terms in ((0, ("q", "k"), 2), (1, ("dq", "dk", "dcos", "dsin"), heads)):
        for name, a, e, t in zip(names, got[kind], eager[kind], truth[kind], strict=True):
            assert_parity(name, a, e, t, dtype=tensors[0].dtype, terms=terms)
    assert all(o.is_contiguous() and o.dtype == tensors[0].dtype for o in got[0])


TABLES = {
    "prefix_of_one": {},
    "all_tokens": dict(table=(7, 16)),
    "one_value_per_pair": dict(table=(6, 8)),
    "per_sample": dict(table=(2, 5, 1, 16)),
    "per_head": dict(table=(1, 7, 3, 16)),
    "per_sample_and_head": dict(table=(2, 7, 3, 8)),
    "grouped_queries": dict(heads=4, k_heads=2),
    "head_dim_2": dict(d=2),
    "head_dim_36_odd_half": dict(d=36),
    "head_dim_72": dict(d=72, heads=1, k_heads=1),
    "one_token": dict(n=1, table=(1, 16)),
    "only_prefix": dict(table=(0, 16)),
}


@every_dtype
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("case", TABLES.values(), ids=TABLES)
def test_parity(device, backend, dtype, layout, case):
    check(make(device, dtype, **case), layout, backend)


def test_agrees_with_dinov3(device, backend):
    dinov3 = pytest.importorskip("transformers.models.dinov3_vit.modeling_dinov3_vit")
    q, k, *_ = make(device, torch.float32, n=13, d=32)
    angles = torch.randn(9, 32, device=device)[:, :16].repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    want = dinov3.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    got = vitkit.rope_2d(q, k, cos, sin, backend=backend)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.transpose(1, 2))


@pytest.mark.parametrize("half", [False, True], ids=["interleaved", "half"])
def test_agrees_with_timm(device, backend, half):
    timm = pytest.importorskip("timm.layers")
    q, *_ = make(device, torch.float32, n=9, d=32)
    emb = timm.RotaryEmbeddingCat(32, in_pixels=False, feat_shape=[3, 3]).get_embed().to(device)
    if half:  # timm's models with rotate_half bring tables in that order
        emb = torch.randn(9, 64, device=device)
    want = timm.apply_rot_embed_cat(q.transpose(1, 2), emb, half=half).transpose(1, 2)
    sin, cos = emb.chunk(2, -1)
    layout = "half" if half else "interleaved"
    got = vitkit.rope_2d(q, None, cos, sin, layout=layout, backend=backend)
    torch.testing.assert_close(got, want)


def test_agrees_with_flux(device, backend):
    flux = pytest.importorskip("diffusers.models.transformers.transformer_flux")
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    ids = torch.randint(0, 9, (11, 3)).float()
    tables = flux.FluxPosEmbed(theta=10000, axes_dim=[4, 14, 14])(ids)
    cos, sin = (t.to(device) for t in tables)
    q, *_ = make(device, torch.bfloat16, n=11, d=32)
    want = embeddings.apply_rotary_emb(q, (cos, sin), sequence_dim=1)
    got = vitkit.rope_2d(q, None, cos, sin, layout="interleaved", backend=backend)
    torch.testing.assert_close(got, want, rtol=2**-7, atol=0)


def test_turning_back_is_the_gradient(device, backend):
    """With true angles the rotation is orthogonal: its gradient undoes it."""
    q, _, angles, _ = make(device, torch.float32, table=(7, 8))
    q.requires_grad_()
    for layout in ("half", "interleaved"):
        y = vitkit.rope_2d(q, None, angles.cos(), angles.sin(), layout=layout, backend=backend)
        torch.testing.assert_close(y.norm(), q.norm())
        (back,) = torch.autograd.grad(y, q, y.detach())
        torch.testing.assert_close(back, q.detach())


def test_strided_views_are_read_in_place(device, backend):
    torch.manual_seed(0)
    qkv = torch.randn(2, 7, 3, 3, 16, device=device)
    emb = torch.randn(6, 32, device=device)
    sin, cos = emb.chunk(2, -1)
    q, k, _ = qkv.unbind(2)
    heads_first = qkv.permute(2, 0, 3, 1, 4).contiguous()[0].transpose(1, 2)
    views = (
        q,
        heads_first,
        q.flip(1),
        q[:, :1].expand(2, 7, 3, 16),
        qkv[:, :, 1, :1].expand(2, 7, 3, 16),
    )
    for x in (*views, torch.randn(2, 7, 3, 32, device=device)[..., ::2]):
        for layout in ("half", "interleaved"):
            run = lambda x: vitkit.rope_2d(x, None, cos, sin, layout=layout, backend=backend)  # noqa: B023, E731
            grad = torch.randn(2, 7, 3, 16, device=device)
            got = gradients(run, [x], [grad.transpose(1, 2).contiguous().transpose(1, 2)])
            want = gradients(run, [x.contiguous()], [grad])
            gated.assert_same(got, want, backend)


def test_offsets_beyond_32_bits(device, backend, tmp_path):
    """Rows 2**26 elements apart in a sparse file: no memory but that of the rows is touched."""
    if device != "cpu":
        pytest.skip("a file is CPU memory")
    n, pitch = 40, 1 << 26
    size = (n - 1) * pitch + 32
    file = torch.from_file(str(tmp_path / "q"), shared=True, size=size, dtype=torch.bfloat16)
    far = file.as_strided((1, n, 2, 16), (0, pitch, 16, 1))
    q, _, cos, sin = make("cpu", torch.bfloat16, b=1, n=n, heads=2)
    far.copy_(q)
    run = lambda x: vitkit.rope_2d(x, None, cos, sin, backend=backend)  # noqa: E731
    assert torch.equal(run(far), run(q))


@every_dtype
def test_nan_and_infinity_stay_in_their_pair(device, backend, dtype):
    q, _, angles, _ = make(device, dtype, n=4, table=(3, 8))
    cos, sin = angles.cos(), angles.sin()
    clean = vitkit.rope_2d(q, None, cos, sin, backend=backend)
    q[0, 0, 0, 3] = float("inf")  # of the prefix: copied
    q[0, 2, 1, 3] = float("nan")
    y = vitkit.rope_2d(q, None, cos, sin, backend=backend)
    touched = torch.zeros_like(y, dtype=torch.bool)
    touched[0, 0, 0, 3] = touched[0, 2, 1, 3] = touched[0, 2, 1, 11] = True
    assert torch.equal(y[~touched], clean[~touched])
    assert y[0, 0, 0, 3] == float("inf") and y[0, 2, 1, [3, 11]].isnan().all()


@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8), (2, 5, 0, 8), (2, 5, 2, 0)])
def test_empty(device, backend, shape):
    q = torch.zeros(shape, device=device, requires_grad=True)
    table = torch.zeros(shape[1], shape[3], device=device)
    y, k = vitkit.rope_2d(q, q, table, table, backend=backend)
    (y.sum() + k.sum()).backward()
    assert y.shape == k.shape == q.grad.shape == shape


def test_tables_without_gradient_keep_nothing_but_themselves(device):
    """Unlike q and k, which a rotation does not need."""
    q, k, cos, sin = make(device, torch.float32)
    kept = []
    pack = lambda t: kept.append(t.numel()) or t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        vitkit.rope_2d(q.requires_grad_(), k.requires_grad_(), cos, sin, backend=device)
    assert sorted(kept) == [cos.numel(), sin.numel()]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_calls_agree_with_the_host(data):
    b, n, heads = (data.draw(st.integers(1, 4)) for _ in range(3))
    d = 2 * data.draw(st.integers(1, 40))
    width = data.draw(st.sampled_from([d, d // 2]))
    positions = data.draw(st.integers(1, n))
    shape = data.draw(
        st.sampled_from(
            [(positions, width), (b, positions, 1, width), (1, positions, heads, width)]
        )
    )
    dtype = data.draw(st.sampled_from(DTYPES))
    tensors = make("cpu", dtype, b, n, heads, d, heads, shape)
    check(tensors, data.draw(st.sampled_from(["half", "interleaved"])), "cpu")


Q, T = torch.zeros(2, 5, 3, 8), torch.zeros(4, 8)
BAD = {
    "a_list": (dict(q=[1]), TypeError, "q must be a tensor, got list"),
    "integers": (dict(q=Q.long()), TypeError, "q must be one of float32"),
    "rank": (dict(q=Q[0]), ValueError, r"q must have shape \[B, N, H, D\]"),
    "odd_head_dim": (dict(q=Q[..., :7]), ValueError, "with an even D, got"),
    "k_dtype": (dict(k=Q.half()), TypeError, "k must have the dtype of q"),
    "k_tokens": (dict(k=Q[:, :4]), ValueError, "k must have shape .* N and D of q"),
    "k_device": (dict(k=Q.to("meta")), ValueError, "k must be on the device of q"),
    "cos_integers": (dict(cos=T.long()), TypeError, "cos must be one of float32"),
    "cos_width": (dict(cos=T[:, :3]), ValueError, r"cos must have shape \[N', D\]"),
    "too_many_positions": (
        dict(cos=torch.zeros(6, 8), sin=torch.zeros(6, 8)),
        ValueError,
        "cos must have at most as many positions as q has tokens, 5",
    ),
    "sin_shape": (dict(sin=T[:, :4]), ValueError, "sin must have the shape of cos"),
    "table_rank": (dict(cos=T[None], sin=T[None]), ValueError, "cos must have shape"),
    "table_batch": (
        dict(cos=torch.zeros(3, 4, 1, 8), sin=torch.zeros(3, 4, 1, 8)),
        ValueError,
        "cos must have batch 1 or 2",
    ),
    "table_heads": (
        dict(cos=torch.zeros(1, 4, 2, 8), sin=torch.zeros(1, 4, 2, 8)),
        ValueError,
        "cos must have 1 head or those of q and k",
    ),
    "layout": (dict(layout="pairs"), ValueError, "layout must be one of"),
    "backend": (dict(backend="gpu"), ValueError, "backend must be one of .* got 'gpu'"),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(changes, error, message, device):
    given = {"q": Q, "k": Q, "cos": T, "sin": T} | changes
    check_bad_call("rope_2d", given, error, message, device)


def test_float64_runs_on_the_reference_only(device):
    q, table = Q.double().to(device), T.to(device)
    assert vitkit.explain("rope_2d", q, None, table, table).backend == "reference"
    with pytest.raises(ValueError, match="take float32, bfloat16 and float16, got float64"):
        vitkit.rope_2d(q, None, table, table, backend=device)
