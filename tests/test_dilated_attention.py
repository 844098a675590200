"""vitkit.dilated_attention on every backend: parity with float64, the published semantics, memory,
bad input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import DTYPES, assert_parity, double, eager_dilated_attention, gradients

import vitkit
import vitkit.nn
from vitkit._memory import peak_bytes
from vitkit.ops.dilated_attention import reference

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
# (segment lengths, dilation ratios)
BRANCHES = {
    "one_dense_branch": ([64], [1]),
    "gigapath_like": ([8, 24, 64], [1, 2, 4]),
    "ratio_does_not_divide": ([5, 9, 13], [1, 2, 4]),
    "rows_no_branch_covers": ([12, 20], [2, 3]),
    "ratio_above_heads": ([16, 32], [1, 8]),
    "ratio_above_segment": ([3, 16], [5, 1]),
    "the_same_twice": ([16, 16], [1, 1]),
}


@pytest.fixture(params=["native", "triton", "reference"])
def backend(request, device):
    return choose(request.param, device)


def choose(kind, device):
    name = device if kind == "native" else kind
    q = torch.zeros(1, 1, 1, 8, device=device)
    call = {"segment_lengths": [1], "dilation_ratios": [1]}
    reason = vitkit.explain("dilated_attention", q, q, q, **call).reasons[name]
    if reason is not None:
        pytest.skip(reason)
    return name


def make(device, dtype, batch=1, n=37, heads=3, head_dim=16):
    torch.manual_seed(0)
    return [torch.randn(batch, n, heads, head_dim, device=device).to(dtype) for _ in range(3)]


def check(
    tensors, backend, lengths, ratios, causal=False, torchscale=False, scale=None, together=False
):
    """Forward, lse and every gradient by the tolerance rule. ``together`` measures the gradients as
    one vector: with a few slots all but rounding may cancel in dq and dk."""
    q = tensors[0]
    factor = scale or q.shape[-1] ** -0.5
    options = (lengths, ratios, causal, factor, torchscale)
    cotangents = [
        torch.randn(q.shape, device=q.device),
        torch.randn(q.shape[0], q.shape[2], q.shape[1], device=q.device),
    ]

    def run(function, tensors):
        return gradients(function, tensors, cotangents)

    def ours(q, k, v):
        return vitkit.dilated_attention(
            q, k, v, segment_lengths=lengths, dilation_ratios=ratios, causal=causal, scale=scale,
            alignment="torchscale" if torchscale else "segment", return_lse=True, backend=backend,
        )  # fmt: skip

    got = run(ours, tensors)
    want = run(lambda *t: reference(*t, *options), double(*tensors))
    yardstick = run(lambda *t: eager_dilated_attention(*t, *options), tensors)
    terms = sum(min(w, q.shape[1]) for w in lengths) * q.shape[-1]
    empty = want[0][1] == -math.inf
    assert torch.equal(got[0][1] == -math.inf, empty)
    assert not got[0][0].transpose(1, 2)[empty].any()
    for name, a, e, x in zip(("out", "lse"), got[0], yardstick[0], want[0], strict=True):
        a, e, x = (t.masked_fill(empty, 0) if name == "lse" else t for t in (a, e, x))
        assert_parity(name, a, e, x, dtype=q.dtype, terms=terms)
    names, grads = ("dq", "dk", "dv"), [got[1], yardstick[1], want[1]]
    if together:
        names, grads = ("gradients",), [[torch.stack(g)] for g in grads]
    for name, a, e, x in zip(names, *grads, strict=True):
        assert_parity(name, a, e, x, dtype=q.dtype, terms=terms * len(lengths))


@pytest.mark.parametrize("torchscale", [False, True], ids=["segment", "torchscale"])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("name", BRANCHES)
def test_branches(device, backend, name, causal, torchscale):
    check(make(device, torch.float32), backend, *BRANCHES[name], causal, torchscale)


@pytest.mark.parametrize("torchscale", [False, True], ids=["segment", "torchscale"])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_segments_longer_than_a_tile(device, backend, causal, torchscale):
    tensors = make(device, torch.float32, n=180)
    check(tensors, backend, [75, 110], [1, 3], causal, torchscale)


@every_dtype
@pytest.mark.parametrize("head_dim", [8, 16, 24, 48, 64, 96], ids=lambda d: f"head_dim_{d}")
def test_head_dims(device, backend, dtype, head_dim):
    tensors = make(device, dtype, batch=2, n=21, heads=4, head_dim=head_dim)
    check(tensors, backend, *BRANCHES["gigapath_like"])


# All but the largest: Triton's interpreter takes ten seconds for each.
@pytest.mark.parametrize(
    ("n", "heads"),
    [
        pytest.param(n, heads, id=f"tokens_{n}-heads_{heads}")
        for n in (1, 7, 16, 63, 64, 65)
        for heads in (1, 3, 4, 5, 16)
        if n * heads < 320
    ],
)
def test_tokens_and_heads(device, backend, n, heads):
    tensors = make(device, torch.float32, n=n, heads=heads, head_dim=8)
    if n == 1:  # one key: grad . v cancels in the gradient of its score, what counts is that of lse
        tensors[2] /= 8
        check(tensors, backend, [4, 8], [1, 2], scale=0.5)
    else:
        check(tensors, backend, *BRANCHES["gigapath_like"])


@every_dtype
def test_scale_may_be_negative(device, backend, dtype):
    check(make(device, dtype), backend, *BRANCHES["gigapath_like"], scale=-0.4)


def test_scores_far_below_zero_leave_the_zeros(device, backend):
    """All real scores of the segment with zeros near -400: the zeros have all the weight, and
    nothing overflows. (Without zeros, a float32 lse of -400 is too coarse for gradients.)"""
    q, k, v = make(device, torch.float32, n=21)
    q[:, 16:], k[:, 16:] = 5.0, -5.0
    check([q, k, v], backend, [16], [1], scale=1.0)


def test_weights_are_detached(device):
    """The gradient is that of the published code, not that of the function computed."""
    tensors = make(device, torch.float64)
    options = (*BRANCHES["gigapath_like"], False, 0.25, False)
    cotangents = [torch.randn_like(tensors[0]), None]
    ours = gradients(lambda *t: reference(*t, *options), tensors, cotangents)[1]
    same = gradients(lambda *t: eager_dilated_attention(*t, *options), tensors, cotangents)[1]
    full = gradients(
        lambda *t: eager_dilated_attention(*t, *options, detached=False), tensors, cotangents
    )[1]
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(ours, same, strict=True))
    assert (ours[0] - full[0]).abs().max() > 1e-3 and (ours[1] - full[1]).abs().max() > 1e-3
    assert torch.allclose(ours[2], full[2], rtol=1e-5, atol=1e-6)


def test_zeros_are_attended(device):
    """The last segment of 21 tokens in segments of 16 holds 11 zeros, which count."""
    q, k, v = make(device, torch.float64, n=21)
    padded = reference(q, k, v, [16], [1], False, 0.25, False)[0]
    without = torch.cat([reference(*(t[:, s] for t in (q, k, v)), [16], [1], False, 0.25, False)[0]
                         for s in (slice(0, 16), slice(16, 21))], 1)  # fmt: skip
    assert torch.allclose(padded[:, :16], without[:, :16])
    assert (padded[:, 16:] - without[:, 16:]).abs().max() > 1e-2


def test_alignments_differ_only_where_a_ratio_does_not_divide(device, backend):
    q, k, v = make(device, torch.float32, heads=4)

    def run(lengths, ratios, alignment):
        return vitkit.dilated_attention(
            q, k, v, segment_lengths=lengths, dilation_ratios=ratios, alignment=alignment,
            backend=backend,
        )  # fmt: skip

    same = run([8, 16], [1, 4], "segment"), run([8, 16], [1, 4], "torchscale")
    assert torch.equal(*same)
    drift = run([8, 13], [1, 4], "segment"), run([8, 13], [1, 4], "torchscale")
    assert torch.equal(drift[0][:, :13], drift[1][:, :13])
    assert (drift[0][:, 16:] - drift[1][:, 16:]).abs().max() > 1e-2


def test_strides_are_read_in_place(device, backend):
    torch.manual_seed(0)
    qkv = torch.randn(2, 21, 3, 4, 40, device=device)[..., 8:24]
    q, k, v = qkv.unbind(2)
    call = {"segment_lengths": [8, 16], "dilation_ratios": [1, 2], "backend": backend}
    got = vitkit.dilated_attention(q, k, v, **call)
    same = vitkit.dilated_attention(*(t.contiguous() for t in (q, k, v)), **call)
    assert torch.equal(got, same)
    last = [t.contiguous().transpose(1, 3).contiguous().transpose(1, 3) for t in (q, k, v)]
    assert last[0].stride(-1) != 1
    assert torch.equal(vitkit.dilated_attention(*last, **call), same)


def test_offsets_beyond_32_bits(device, backend, tmp_path):
    """Rows 2**26 elements apart in a sparse file: no memory but that of the rows is touched."""
    if device != "cpu":
        pytest.skip("a file is CPU memory")
    n, heads, d, pitch = 40, 2, 8, 1 << 26
    assert (n - 1) * pitch > 2**31
    size = (n - 1) * pitch + 3 * heads * d
    file = torch.from_file(str(tmp_path / "qkv"), shared=True, size=size, dtype=torch.bfloat16)
    qkv = file.as_strided((1, n, 3, heads, d), (0, pitch, heads * d, d, 1))
    dense = torch.stack(make("cpu", torch.bfloat16, n=n, heads=heads, head_dim=d), 2)
    qkv.copy_(dense)

    def run(qkv):
        return gradients(
            lambda *t: vitkit.dilated_attention(
                *t, segment_lengths=[8, 32], dilation_ratios=[1, 2], backend=backend
            ),
            qkv.unbind(2),
            [torch.ones(1, n, heads, d)],
        )

    (far, far_grads), (near, near_grads) = run(qkv), run(dense)
    assert torch.equal(far[0], near[0])
    assert all(torch.equal(a, b) for a, b in zip(far_grads, near_grads, strict=True))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "bfloat16"])
def test_memory_is_a_small_multiple_of_the_input(device, dtype):
    """Beyond the results, at most three times q, results of the branches included."""
    backend = choose("native", device)
    q, k, v = make(device, dtype, n=6000, heads=16, head_dim=48)
    call = {
        "segment_lengths": [1024, 5792, 32768, 185363, 1048576],
        "dilation_ratios": [1, 2, 4, 8, 16],
        "backend": backend,
    }
    unit = q.numel() * q.element_size()
    assert peak_bytes(lambda: vitkit.dilated_attention(q, k, v, **call), device) <= 4 * unit

    leaves = [t.requires_grad_() for t in (q, k, v)]
    grad = torch.ones_like(q)

    def train():
        return torch.autograd.grad(vitkit.dilated_attention(*leaves, **call), leaves, grad)

    assert 4 * unit < peak_bytes(train, device) <= 7 * unit


def test_the_module_frees_what_it_has_used():
    """At its peak there are q, k, v and the result, and what the op needs."""
    layer = vitkit.nn.DilatedAttention(96, 4, segment_lengths=[1024, 5792], dilation_ratios=[1, 2])
    norm, x = vitkit.nn.LayerNorm(96), torch.randn(1, 6000, 96)
    with torch.no_grad():
        assert torch.equal(layer(x, norm), layer(norm(x)))
        assert peak_bytes(lambda: layer(x, norm), "cpu") <= 5.7 * x.nbytes


def test_nan_stays_in_the_rows_that_see_it(device, backend):
    q, k, v = make(device, torch.float32, n=32)
    q[0, 3, 1, 0] = math.nan
    out = vitkit.dilated_attention(
        q, k, v, segment_lengths=[8, 32], dilation_ratios=[1, 2], backend=backend
    )
    bad = out.isnan().any(-1)[0].nonzero().tolist()
    assert bad == [[3, 1]]


def test_deterministic(device, backend):
    tensors = make(device, torch.float32, n=200, heads=4)

    def run():
        return gradients(
            lambda q, k, v: vitkit.dilated_attention(
                q, k, v, segment_lengths=[32, 100], dilation_ratios=[1, 2], backend=backend
            ),
            tensors,
            [torch.ones_like(tensors[0])],
        )

    first, second = run(), run()
    assert torch.equal(first[0][0], second[0][0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_number_of_threads_does_not_change_a_bit(device):
    if device != "cpu":
        pytest.skip("threads of the CPU")
    tensors = make(device, torch.float32, n=200, heads=4)
    results, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(
                gradients(
                    lambda q, k, v: vitkit.dilated_attention(
                        q, k, v, segment_lengths=[32, 150], dilation_ratios=[1, 2],
                        backend=choose("native", device),
                    ),
                    tensors,
                    [torch.ones_like(tensors[0])],
                )
            )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(results[0][0][0], other[0][0])
        assert all(torch.equal(a, b) for a, b in zip(results[0][1], other[1], strict=True))


@pytest.mark.parametrize("shape", [(0, 8, 2, 8), (2, 0, 2, 8)], ids=str)
def test_empty(device, backend, shape):
    q = torch.zeros(shape, device=device, requires_grad=True)
    out, lse = vitkit.dilated_attention(
        q, q, q, segment_lengths=[4], dilation_ratios=[1], return_lse=True, backend=backend
    )
    assert out.shape == shape and lse.shape == (shape[0], shape[2], shape[1])
    assert torch.autograd.grad(out.sum(), q)[0].shape == shape


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_segments_and_ratios(device, data):
    draw = data.draw
    name = draw(st.sampled_from(["native", "triton"]))
    count = draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(1, 60), min_size=count, max_size=count))
    ratios = draw(st.lists(st.integers(1, 7), min_size=count, max_size=count))
    tensors = make(
        device, draw(st.sampled_from(DTYPES)), draw(st.integers(1, 2)), draw(st.integers(2, 70)),
        draw(st.integers(1, 6)), draw(st.sampled_from([8, 16, 24])),
    )  # fmt: skip
    check(
        tensors, choose(name, device), lengths, ratios, draw(st.booleans()), draw(st.booleans()),
        together=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 8, 8)}, "q must have shape"),
        ({"k": torch.zeros(1, 9, 2, 8)}, "k must have shape"),
        ({"v": torch.zeros(1, 8, 2, 8).half()}, "v must have the dtype of q"),
        ({"q": torch.zeros(1, 8, 2, 8).int()}, "q must be one of"),
        ({"segment_lengths": [0]}, "segment_lengths must be a list of integers of at least 1"),
        ({"segment_lengths": 4}, "segment_lengths must be a list of integers of at least 1"),
        ({"dilation_ratios": [0]}, "dilation_ratios must be a list of integers of at least 1"),
        ({"dilation_ratios": [1, 2]}, "dilation_ratios must have one ratio per segment length"),
        ({"segment_lengths": [], "dilation_ratios": []}, "segment_lengths must not be empty"),
        ({"scale": math.nan}, "scale must be a finite number"),
        ({"alignment": "aligned"}, "alignment must be one of"),
    ],
    ids=lambda c: "-".join(c) if isinstance(c, dict) else "",
)
def test_bad_input(device, backend, change, message):
    zeros = torch.zeros(1, 8, 2, 8)
    call = {"q": zeros, "k": zeros, "v": zeros, "segment_lengths": [4], "dilation_ratios": [1]}
    call = {
        n: t.to(device) if isinstance(t, torch.Tensor) else t for n, t in (call | change).items()
    }
    with pytest.raises((TypeError, ValueError), match=message) as error:
        vitkit.dilated_attention(**call, backend=backend)
    assert str(error.value).startswith("dilated_attention: ")


def test_what_only_the_cuda_kernels_refuse():
    q = torch.zeros(1, 4, 1, 8)

    def reason(branches):
        options = {"segment_lengths": [2] * branches, "dilation_ratios": [1] * branches}
        return vitkit.explain("dilated_attention", q, q, q, **options).reasons["cuda"]

    assert "up to 32 branches, got 33" in reason(33)
    assert "branches" not in reason(32)
