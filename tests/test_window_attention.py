"""vitkit.window_attention on every backend: parity with float64, maps, shifts, padding, Swin V2,
bad input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import DTYPES, assert_parity, double, eager_window_attention, gradients

import vitkit
from vitkit.ops.window_attention import reference

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
PADDINGS = ("pad_then_roll", "roll_then_pad")
SMALLEST = torch.finfo(torch.float32).tiny


@pytest.fixture(params=["native", "triton", "reference"])
def backend(request, device):
    return choose(request.param, device)


def choose(kind, device):
    name = device if kind == "native" else kind
    qkv = torch.zeros(1, 2, 2, 3, 1, 8, device=device)
    reason = vitkit.explain("window_attention", qkv, window_size=2).reasons[name]
    if reason is not None:
        pytest.skip(reason)
    return name


def make(device, dtype, height=14, width=14, window=(7, 7), batch=2, heads=2, head_dim=16,
         table=True, cosine=False, pad=True, log_gain=2.3):  # fmt: skip
    """qkv, bias_table, logit_scale, pad_value"""
    torch.manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    return [
        randn(batch, height, width, 3, heads, head_dim),
        randn((2 * window[0] - 1) * (2 * window[1] - 1), heads) if table else None,
        randn(heads) * 0.3 + log_gain if cosine else None,
        randn(3, heads, head_dim) if pad else None,
    ]


def check(
    tensors, backend, window, shift=(0, 0), padding="pad_then_roll", scale=None, together=False
):
    """Forward and every gradient by the tolerance rule. ``together`` measures the gradients as one
    vector: in a map of a few tokens all but rounding may cancel in one of them."""
    qkv, _, logit_scale, _ = tensors
    factor = 1.0 if logit_scale is not None else scale or qkv.shape[-1] ** -0.5
    cotangent = torch.randn(*qkv.shape[:3], qkv.shape[4] * qkv.shape[5], device=qkv.device)

    def run(function, tensors):
        return gradients(function, tensors, [cotangent.to(tensors[0].dtype)])

    def ours(qkv, table, logit_scale, pad):
        return vitkit.window_attention(
            qkv, window_size=window, shift_size=shift, bias_table=table, logit_scale=logit_scale,
            scale=scale, pad_value=pad, padding=padding, backend=backend,
        )  # fmt: skip

    def truth(*inputs):
        return reference(*inputs, window, shift, factor, padding == "roll_then_pad")[0]

    def eager(*inputs):
        return eager_window_attention(*inputs, window, shift, factor, padding)

    got, want, yardstick = run(ours, tensors), run(truth, double(*tensors)), run(eager, tensors)
    terms = window[0] * window[1] * qkv.shape[-1]
    assert_parity("out", got[0][0], yardstick[0][0], want[0][0], dtype=qkv.dtype, terms=terms)
    names = ("qkv", "bias_table", "logit_scale", "pad_value")
    present = [n for n, t in zip(names, tensors, strict=True) if t is not None]
    rows = qkv[..., 0, 0, 0].numel()
    parts, most = [], 1
    for name, a, e, x in zip(present, got[1], yardstick[1], want[1], strict=True):
        # Where every pair with a place without a token is masked, exp(-100) is what is left of it.
        if x is None or (name == "pad_value" and x.abs().max() < SMALLEST):
            assert a is None or a.double().abs().max() < SMALLEST
            continue
        e = torch.zeros_like(a) if e is None else e
        more = 1 if name == "qkv" else rows
        if together:
            parts.append([t.double().flatten() for t in (a, e, x)])
            most = max(most, more)
        else:
            assert_parity(f"d{name}", a, e, x, dtype=qkv.dtype, terms=terms * more)
    if parts:
        a, e, x = (torch.cat(t) for t in zip(*parts, strict=True))
        assert_parity("gradients", a, e, x, dtype=qkv.dtype, terms=terms * most)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("shift", [(0, 0), (3, 3), (0, 2), (5, 1)], ids=str)
@pytest.mark.parametrize(
    ("height", "width", "window"),
    [(14, 14, (7, 7)), (10, 13, (7, 7)), (5, 4, (7, 7)), (16, 8, (8, 8)), (9, 20, (6, 10))],
    ids=["divisible", "ragged", "window_larger_than_map", "one_row_of_windows", "rectangular"],
)
def test_maps_and_shifts(device, backend, height, width, window, shift, padding):
    tensors = make(device, torch.float32, height, width, window, batch=1)
    check(tensors, backend, window, shift, padding)


@every_dtype
@pytest.mark.parametrize("cosine", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("head_dim", [8, 16, 24, 32, 64], ids=lambda d: f"head_dim_{d}")
def test_head_dims(device, backend, dtype, cosine, head_dim):
    tensors = make(device, dtype, 10, 7, batch=1, head_dim=head_dim, cosine=cosine)
    check(tensors, backend, (7, 7), (3, 3))


@every_dtype
@pytest.mark.parametrize(
    ("window", "cosine"), [(8, True), (12, False), (16, True), (24, False)], ids=str
)
def test_windows(device, backend, dtype, window, cosine):
    if backend == "triton" and device == "cpu" and window == 24 and dtype != torch.bfloat16:
        pytest.skip("the interpreter takes minutes; bfloat16 covers the code")
    tensors = make(
        device, dtype, window, window, (window,) * 2, batch=1, heads=1, head_dim=32, cosine=cosine
    )
    check(tensors, backend, (window,) * 2, (window // 2,) * 2)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("cosine", [False, True], ids=["v1", "v2"])
def test_padded_windows_of_several_tiles(device, backend, cosine, padding):
    """81 tokens are more than a tile of 64; the pads are spread over both tiles."""
    tensors = make(device, torch.float32, 10, 8, (9, 9), batch=1, heads=1, cosine=cosine)
    check(tensors, backend, (9, 9), (4, 2), padding)


@pytest.mark.parametrize("table", [False, True], ids=["no_table", "table"])
@pytest.mark.parametrize("pad", [False, True], ids=["zeros", "pad_value"])
@pytest.mark.parametrize("cosine", [False, True], ids=["v1", "v2"])
def test_options(device, backend, table, pad, cosine):
    tensors = make(device, torch.float32, 6, 9, (4, 4), table=table, pad=pad, cosine=cosine)
    check(tensors, backend, (4, 4), (1, 2), "roll_then_pad")


def test_scale(device, backend):
    check(make(device, torch.float32, 8, 8, (4, 4)), backend, (4, 4), scale=-0.7)


def test_logit_scale_is_clamped(device, backend):
    """Above ln 100 the gain stays 100 and the gradient is 0, below it is not."""
    qkv, table, _, pad = make(device, torch.float32, 8, 8, (4, 4))
    logit_scale = torch.tensor([9.0, 1.0], device=device)
    check([qkv, table, logit_scale, pad], backend, (4, 4), (2, 2))
    logit_scale.requires_grad_()
    out = vitkit.window_attention(qkv, window_size=4, logit_scale=logit_scale, backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), logit_scale)
    assert grad[0] == 0 and grad[1] != 0


@every_dtype
def test_zero_rows_have_a_direction_of_zero(device, backend, dtype):
    """|q| = |k| = 0 in cosine attention: scores 0, no NaN (a host in float16 makes one)."""
    qkv, table, logit_scale, _ = make(device, dtype, 5, 5, (4, 4), cosine=True, pad=False)
    qkv[:, 1, 2] = 0
    qkv.requires_grad_()
    out = vitkit.window_attention(
        qkv, window_size=4, shift_size=2, bias_table=table, logit_scale=logit_scale,
        backend=backend,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(out.float().sum(), qkv)
    assert out.isfinite().all() and not grad.isnan().any()
    grad[:, 1, 2, :2] = 0  # divided by the smallest norm, 1e-12: infinity in float16
    assert grad.isfinite().all()
    exact = reference(qkv.double(), table, logit_scale, None, (4, 4), (2, 2), 1.0, False)[0]
    assert_parity("out", out, exact.to(dtype), exact, dtype=dtype, terms=16 * 16)


def test_strides_are_read_in_place(device, backend):
    """A channels-first host's permuted view, and a slice of a wider tensor."""
    torch.manual_seed(0)
    wide = torch.randn(2, 8, 3, 9, 2, 40, device=device)
    qkv = wide[..., 8:24].permute(0, 1, 3, 2, 4, 5)
    assert not qkv.is_contiguous() and qkv.stride(-1) == 1
    got = vitkit.window_attention(qkv, window_size=4, shift_size=1, backend=backend)
    same = vitkit.window_attention(qkv.contiguous(), window_size=4, shift_size=1, backend=backend)
    assert torch.equal(got, same)
    dense_rows = torch.randn(1, 4, 4, 3, 16, 2, device=device).transpose(-1, -2)
    got = vitkit.window_attention(dense_rows, window_size=4, backend=backend)
    same = vitkit.window_attention(dense_rows.contiguous(), window_size=4, backend=backend)
    assert torch.equal(got, same)


def test_nan_stays_in_its_window(device, backend):
    qkv = make(device, torch.float32, 8, 8, (4, 4), batch=1)[0]
    qkv[0, 1, 1, 1, 0, 3] = math.nan
    out = vitkit.window_attention(qkv, window_size=4, backend=backend)
    bad = out.isnan().any(-1)[0]
    assert bad[:4, :4].all() and not bad[4:].any() and not bad[:, 4:].any()


def test_table_gradient_is_deterministic(device, backend):
    interpreted = backend == "triton" and device == "cpu"
    height, batch, heads = (14, 2, 2) if interpreted else (28, 3, 3)
    qkv, table, _, _ = make(device, torch.float32, height, 21, batch=batch, heads=heads)
    table.requires_grad_()

    def gradient():
        out = vitkit.window_attention(
            qkv, window_size=7, shift_size=3, bias_table=table, backend=backend
        )
        return torch.autograd.grad(out.sin().sum(), table)[0]

    first = gradient()
    assert all(torch.equal(first, gradient()) for _ in range(3))


def test_number_of_threads_does_not_change_a_bit(device):
    if device != "cpu":
        pytest.skip("threads of the CPU")
    tensors = make(device, torch.float32, 28, 20, batch=3, heads=3)
    results, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(
                gradients(
                    lambda qkv, table, _, pad: vitkit.window_attention(
                        qkv, window_size=7, shift_size=3, bias_table=table, pad_value=pad,
                        backend=choose("native", device),
                    ),
                    tensors,
                    [torch.ones(3, 28, 20, 48)],
                )
            )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(results[0][0][0], other[0][0])
        assert all(torch.equal(a, b) for a, b in zip(results[0][1], other[1], strict=True))


@pytest.mark.parametrize("shape", [(0, 8, 8), (2, 0, 8), (2, 8, 0)], ids=str)
def test_empty(device, backend, shape):
    qkv = torch.zeros(*shape, 3, 2, 8, device=device, requires_grad=True)
    table = torch.zeros(49, 2, device=device, requires_grad=True)
    out = vitkit.window_attention(qkv, window_size=4, bias_table=table, backend=backend)
    assert out.shape == (*shape, 16)
    grads = torch.autograd.grad(out.sum(), (qkv, table), allow_unused=True)
    assert grads[0].shape == qkv.shape


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_map_window_and_shift(device, data):
    draw = data.draw
    backend = draw(st.sampled_from(["native", "triton"]))
    window = (draw(st.integers(1, 6)), draw(st.integers(1, 6)))
    shift = (draw(st.integers(0, window[0] - 1)), draw(st.integers(0, window[1] - 1)))
    tensors = make(
        device, draw(st.sampled_from(DTYPES)), draw(st.integers(1, 11)), draw(st.integers(1, 11)),
        window, batch=draw(st.integers(1, 2)), heads=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([8, 16, 24])), table=draw(st.booleans()),
        cosine=draw(st.booleans()), pad=draw(st.booleans()),
        log_gain=2.3 if backend == "native" else 0.5,
    )  # fmt: skip
    name = device if backend == "native" else backend
    check(tensors, name, window, shift, draw(st.sampled_from(PADDINGS)), together=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(2, 8, 8, 48)}, "qkv must have shape"),
        ({"qkv": torch.zeros(2, 8, 8, 3, 2, 8, dtype=torch.int32)}, "qkv must be one of"),
        ({"window_size": 0}, "window_size must be an integer of at least 1"),
        ({"window_size": (4, 4, 4)}, "window_size must be an integer of at least 1"),
        ({"shift_size": 4}, "shift_size must be smaller than window_size"),
        ({"shift_size": -1}, "shift_size must be an integer of at least 0"),
        ({"bias_table": torch.zeros(48, 2)}, "bias_table must have shape"),
        ({"bias_table": torch.zeros(49, 2).int()}, "bias_table must be one of"),
        ({"logit_scale": torch.zeros(3)}, "logit_scale must have shape"),
        ({"logit_scale": torch.zeros(2), "scale": 1.0}, "scale must be a finite number"),
        ({"scale": math.inf}, "scale must be a finite number"),
        ({"pad_value": torch.zeros(3, 16)}, "pad_value must have shape"),
        ({"padding": "reflect"}, "padding must be one of"),
        ({"bias_table": torch.zeros(49, 2, device="meta")}, "must be on the device of qkv"),
    ],
    ids=lambda c: "-".join(c) if isinstance(c, dict) else "",
)
def test_bad_input(device, backend, change, message):
    call = {"qkv": torch.zeros(2, 8, 8, 3, 2, 8), "window_size": 4, **change}
    call = {
        n: t.to(device) if isinstance(t, torch.Tensor) and t.device.type != "meta" else t
        for n, t in call.items()
    }
    with pytest.raises((TypeError, ValueError), match=message) as error:
        vitkit.window_attention(**call, backend=backend)
    assert str(error.value).startswith("window_attention: ")


def test_what_only_the_cuda_kernels_refuse():
    def reasons(dtype, head_dim, logit_scale=None):
        qkv = torch.zeros(1, 2, 2, 3, 1, head_dim, dtype=dtype)
        call = vitkit.explain("window_attention", qkv, window_size=2, logit_scale=logit_scale)
        return call.reasons["cuda"]

    gain = torch.zeros(1)
    assert "head dims of up to 128, got 136" in reasons(torch.bfloat16, 136)
    assert "up to 64 with logit_scale, got 72" in reasons(torch.float32, 72, gain)
    for allowed in ((torch.float32, 128), (torch.float16, 64, gain)):
        assert "head dim" not in reasons(*allowed)
