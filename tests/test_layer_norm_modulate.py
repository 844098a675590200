"""vitkit.layer_norm_modulate on every backend: parity with float64, modulations, bad input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import DTYPES, assert_parity, double, eager_layer_norm, gradients
from refusals import check_bad_call

import vitkit
from vitkit.ops.layer_norm_modulate import MAX_GPU_WIDTH, reference

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
NAMES = ("x", "shift", "scale", "weight", "bias")


@pytest.fixture(params=["native", "triton", "reference"])
def backend(request, device):
    name = device if request.param == "native" else request.param
    x = torch.zeros(1, 2, device=device)
    reason = vitkit.explain("layer_norm_modulate", x).reasons[name]
    if reason is not None:
        pytest.skip(reason)
    return name


def make(device, dtype, shape, modulation=None, affine=False, small=None, given=("shift", "scale")):
    """x, shift, scale, weight, bias; modulation None, "sample" or "token"."""
    torch.manual_seed(0)
    small = small or dtype
    x = torch.randn(shape, device=device).to(dtype)
    of = {None: None, "sample": (shape[0], shape[-1]), "token": shape}[modulation]
    shift, scale = (
        torch.randn(of, device=device).to(small) if of and name in given else None
        for name in ("shift", "scale")
    )
    weight, bias = (
        torch.randn(shape[-1], device=device).to(small) if affine else None for _ in range(2)
    )
    return [x, shift, scale, weight, bias]


def check(tensors, backend, eps=1e-6):
    """Output and every gradient by the tolerance rule."""
    x = tensors[0]
    cotangent = torch.randn(x.shape, device=x.device).to(x.dtype)

    def ours(x, *rest):
        options = dict(zip(NAMES[1:], rest, strict=True))
        return vitkit.layer_norm_modulate(x, **options, eps=eps, backend=backend)

    got = gradients(ours, tensors, [cotangent])
    want = gradients(lambda *t: reference(*t, eps), double(*tensors), [cotangent])
    yardstick = gradients(lambda *t: eager_layer_norm(*t, eps), tensors, [cotangent])
    width, rows = x.shape[-1], x.numel() // x.shape[-1]
    assert got[0][0].dtype == x.dtype and got[0][0].is_contiguous()
    assert_parity("y", got[0][0], yardstick[0][0], want[0][0], terms=width)
    present = [(n, t) for n, t in zip(NAMES, tensors, strict=True) if t is not None]
    for (name, t), a, e, w in zip(present, got[1], yardstick[1], want[1], strict=True):
        assert a.dtype == t.dtype and a.shape == t.shape
        terms = width if name == "x" else rows
        assert_parity(f"d{name}", a, e, w, dtype=x.dtype, terms=terms)


SHAPES = {
    "swin": (2, 9, 96),
    "odd_width": (2, 5, 77),
    "one_element": (3, 2, 1),
    "one_token": (3, 1, 40),
    "vector": (24,),
    "matrix": (7, 33),
    "map": (2, 3, 4, 32),
    "many_rows": (1, 150, 24),
}


@every_dtype
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_plain(device, backend, dtype, shape):
    if shape[-1] > 1:
        check(make(device, dtype, shape, affine=True), backend)
        return
    # One element has no deviation: y is the bias, and the gradient of x is zero.
    x, _, _, weight, bias = make(device, dtype, shape, affine=True)
    x.requires_grad_()
    y = vitkit.layer_norm_modulate(x, weight=weight, bias=bias, backend=backend)
    assert torch.equal(y, bias.expand(shape))
    y.sum().backward()
    assert torch.all(x.grad == 0)


@every_dtype
@pytest.mark.parametrize("affine", [False, True], ids=["no_affine", "affine"])
@pytest.mark.parametrize("modulation", ["sample", "token"])
@pytest.mark.parametrize(
    "given", [("shift", "scale"), ("shift",), ("scale",)], ids=["both", "shift_only", "scale_only"]
)
def test_modulated(device, backend, dtype, modulation, affine, given):
    check(make(device, dtype, (3, 7, 40), modulation, affine, given=given), backend)


@every_dtype
@pytest.mark.parametrize("modulation", ["sample", "token"])
def test_float32_parameters_beside_lower_precision_inputs(device, backend, dtype, modulation):
    check(make(device, dtype, (2, 5, 72), modulation, True, torch.float32), backend)


def test_modulation_in_another_low_precision(device, backend):
    tensors = make(device, torch.bfloat16, (2, 5, 40), "token", small=torch.float16)
    check(tensors, backend)


def test_without_anything(device, backend):
    check(make(device, torch.float32, (4, 50)), backend)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "bfloat16"])
def test_rows_longer_than_a_block(device, backend, dtype):
    """Wider than the native kernel's blocks of rows, and than its chunk of statistics."""
    widths = (2600, 4200) if backend != "triton" else (4200,)
    for width in widths:
        check(make(device, dtype, (5, width), affine=True), backend)


@pytest.mark.parametrize("offset", [100.0, 10000.0])
def test_large_mean_keeps_its_variance(device, backend, offset):
    """E[x^2] - E[x]^2 in float32 would have nothing left here."""
    x = make(device, torch.float32, (9, 576))[0] + offset
    got = vitkit.layer_norm_modulate(x, backend=backend)
    want = reference(x.double(), None, None, None, None, 1e-6)
    # float32 holds x itself to eps * offset, and a mean of many such values no better than that.
    assert (got - want).abs().max() < 8 * torch.finfo(torch.float32).eps * offset + 1e-5


def test_nan_stays_in_its_row(device, backend):
    x = make(device, torch.float32, (2, 9, 40))[0]
    clean = vitkit.layer_norm_modulate(x, backend=backend)
    x[1, 3, 39] = math.nan
    y = vitkit.layer_norm_modulate(x, backend=backend)
    assert y[1, 3].isnan().all()
    y[1, 3] = clean[1, 3]
    torch.testing.assert_close(y, clean)


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (0, 8)], ids=["batch", "tokens", "rows"])
@pytest.mark.parametrize("modulation", ["sample", "token"])
def test_empty(device, backend, shape, modulation):
    leaves = [t.requires_grad_() for t in make(device, torch.float32, shape, modulation, True)]
    y = vitkit.layer_norm_modulate(
        leaves[0], **dict(zip(NAMES[1:], leaves[1:], strict=True)), backend=backend
    )
    assert y.shape == shape
    y.sum().backward()
    assert all(t.grad.shape == t.shape and torch.all(t.grad == 0) for t in leaves)


def test_strides(device, backend):
    """x is copied; rows of a chunk or a slice of the modulation are read where they lie."""
    x = torch.randn(3, 10, 24, device=device)
    for view in (x.transpose(0, 1), x[:, ::2], x[:1].expand(4, -1, -1), x[:, 1:], x.flip(1)):
        y = vitkit.layer_norm_modulate(view, backend=backend)
        assert y.is_contiguous()
        torch.testing.assert_close(y, F.layer_norm(view, (24,), eps=1e-6), rtol=1e-4, atol=1e-5)
    table = torch.randn(3, 10, 6, 24, device=device)
    for options in (table[:, 0], table.flatten(1)[:, :48].unflatten(1, (2, 24))):
        shift, scale = options[:, 0], options[:, 1]
        want = F.layer_norm(x, (24,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        got = vitkit.layer_norm_modulate(x, shift=shift, scale=scale, backend=backend)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    column = torch.randn(24, 3, device=device).t()
    want = F.layer_norm(x, (24,), eps=1e-6) + column[:, None]
    got = vitkit.layer_norm_modulate(x, shift=column, backend=backend)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    shift, scale = table[:, :, 2], table[:, :, 5]
    got = vitkit.layer_norm_modulate(x, shift=shift, scale=scale, backend=backend)
    want = F.layer_norm(x, (24,), eps=1e-6) * (1 + scale) + shift
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_huge_strides(device, backend):
    """Rows of a modulation more than 2^31 elements apart: untouched pages of a large allocation
    cost nothing."""
    if device != "cpu":
        pytest.skip("needs memory that is not there until it is touched")
    apart = 2**31 + 64
    base = torch.empty(0, dtype=torch.float16)
    torch.utils.deterministic.fill_uninitialized_memory = False  # or every page is touched
    base = torch.empty(apart + 16, dtype=torch.float16)
    rows = base.as_strided((2, 16), (apart, 1))
    rows.copy_(torch.randn(2, 16))
    x = torch.randn(2, 3, 16)
    got = vitkit.layer_norm_modulate(x, scale=rows, shift=rows, backend=backend)
    want = vitkit.layer_norm_modulate(x, scale=rows.clone(), shift=rows.clone(), backend=backend)
    assert torch.equal(got, want)


def test_threads_do_not_change_results(device):
    tensors = make("cpu", torch.bfloat16, (3, 200, 96), "sample", True)
    cotangent = torch.randn(3, 200, 96).bfloat16()

    def call(x, *options):
        named = dict(zip(NAMES[1:], options, strict=True))
        return vitkit.layer_norm_modulate(x, **named, backend="cpu")

    def run():
        outputs, grads = gradients(call, tensors, [cotangent])
        return [*outputs, *grads]

    threads = torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(run())
    torch.set_num_threads(threads)
    assert all(
        torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_calls_agree_with_the_reference(data):
    middle = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=2))
    shape = (data.draw(st.integers(1, 4)), *middle, data.draw(st.integers(3, 150)))
    dtype = data.draw(st.sampled_from(DTYPES))
    modulation = data.draw(st.sampled_from([None, "sample", "token"]))
    small = data.draw(st.sampled_from([dtype, torch.float32]))
    names = [("shift", "scale"), ("shift",), ("scale",)]
    given = data.draw(st.sampled_from(names))
    tensors = make("cpu", dtype, shape, modulation, data.draw(st.booleans()), small, given)
    check(tensors, "cpu", eps=1e-3)


X = torch.zeros(2, 5, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(x=[1.0]), TypeError, "x must be a tensor, got list"),
        (dict(x=X.long()), TypeError, "x must be one of float32"),
        (dict(x=X[0, 0, 0]), ValueError, r"x must have shape \[\*, E\] with E >= 1, got \(\)"),
        (dict(x=X[..., :0]), ValueError, r"x must have .* got \(2, 5, 0\)"),
        (dict(x=X, eps=-1.0), ValueError, "eps must be a number >= 0, got -1.0"),
        (dict(x=X, eps=float("nan")), ValueError, "eps must be a number >= 0, got nan"),
        (dict(x=X, weight=torch.zeros(5)), ValueError, r"weight must have shape \[E\] = \(8,\)"),
        (dict(x=X, bias=torch.zeros(8).long()), TypeError, "bias must be one of"),
        (
            dict(x=X, scale=torch.zeros(8)),
            ValueError,
            r"scale must have shape \[B, E\] = \(2, 8\) or that of x = \(2, 5, 8\), got \(8,\)",
        ),
        (dict(x=X, shift=torch.zeros(2, 1, 8)), ValueError, r"shift must .* got \(2, 1, 8\)"),
        (dict(x=X[0, 0], shift=torch.zeros(8)), ValueError, "shift must have shape"),
        (
            dict(x=X, shift=torch.zeros(2, 8), scale=torch.zeros(2, 5, 8)),
            ValueError,
            r"shift must have the shape of scale, \(2, 5, 8\), got \(2, 8\)",
        ),
        (
            dict(x=X, shift=X, scale=X.bfloat16()),
            TypeError,
            "shift must have the dtype of scale .*bfloat16.*, got float32",
        ),
        (
            dict(x=X, shift=torch.zeros(2, 8, device="meta")),
            ValueError,
            "shift must be on the device of x",
        ),
        (dict(x=X, backend="gpu"), ValueError, "backend must be one of .* got 'gpu'"),
    ],
)
def test_bad_input(arguments, error, message, device):
    check_bad_call("layer_norm_modulate", arguments, error, message, device)


def test_reasons(device):
    x = X.double().to(device)
    assert vitkit.explain("layer_norm_modulate", x).backend == "reference"
    with pytest.raises(ValueError, match="take float32, bfloat16 and float16, got float64"):
        vitkit.layer_norm_modulate(x, backend=device)
    wide = torch.zeros(1, MAX_GPU_WIDTH + 1, device=device)
    reasons = vitkit.explain("layer_norm_modulate", wide).reasons
    for name in ("cuda", "triton"):
        assert "rows of up to 8192, got 8193" in reasons[name]
