"""vitkit.swiglu on every backend: parity with float64, strides, special values, bad input."""

from __future__ import annotations

import gated
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import DTYPES, double, gradients
from refusals import check_bad_call

import vitkit

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def eager(value, gate):
    return F.silu(gate) * value


@pytest.fixture(params=["native", "triton", "reference"])
def backend(request, device):
    return gated.choose("swiglu", request.param, device)


@every_dtype
@pytest.mark.parametrize("form", ["gate_first", "gate_last", "separate"])
@pytest.mark.parametrize("shape", gated.SHAPES.values(), ids=gated.SHAPES)
def test_parity(device, backend, dtype, form, shape):
    tensors = gated.make(device, dtype, shape, form != "separate")
    gated.check(vitkit.swiglu, eager, tensors, form == "gate_last", backend)


def test_default_is_the_gate_of_dinov2_and_timm(device, backend):
    x = torch.randn(3, 8, device=device)
    gate, value = x.chunk(2, -1)
    torch.testing.assert_close(vitkit.swiglu(x, backend=backend), F.silu(gate) * value)


def test_strided_views(device, backend):
    for why, x, gate in gated.strided(device, torch.float32):
        dense = [t if t is None else t.contiguous() for t in (x, gate)]
        cotangent = torch.randn_like(vitkit.swiglu(*dense)).expand_as(vitkit.swiglu(*dense))
        run = lambda x, g: vitkit.swiglu(x, g, backend=backend)  # noqa: E731
        got, want = (gradients(run, t, [cotangent]) for t in ([x, gate], dense))
        gated.assert_same(got, want, backend, why)


def test_gradient_of_a_sum_is_expanded(device, backend):
    x = torch.randn(3, 10, device=device, requires_grad=True)
    vitkit.swiglu(x, backend=backend).sum().backward()
    exact = x.detach().double().requires_grad_()
    vitkit.swiglu(exact, backend="reference").sum().backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_offsets_beyond_32_bits(device, backend, tmp_path):
    if device != "cpu":
        pytest.skip("a file is CPU memory")
    far, near = gated.far_rows(tmp_path, 66)
    run = lambda *t, **options: [vitkit.swiglu(*t, backend=backend, **options)]  # noqa: E731
    gated.assert_same((run(far), ()), (run(near), ()), backend)
    separate = run(*far.chunk(2, -1))
    gated.assert_same((separate, ()), (run(near, gate_last=True), ()), backend)


@every_dtype
def test_special_values(device, backend, dtype):
    gated.check_special_values(vitkit.swiglu, eager, device, backend, dtype)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0), (2, 0, 8)], ids=["batch", "columns", "tokens"])
def test_empty(device, backend, shape):
    x = torch.zeros(shape, device=device, requires_grad=True)
    y = vitkit.swiglu(x, backend=backend)
    assert y.shape == (*shape[:-1], shape[-1] // 2)
    y.sum().backward()
    assert x.grad.shape == shape
    assert vitkit.swiglu(x, x, backend=backend).shape == shape


def test_autocast_takes_the_wider_of_two_dtypes(device):
    x, gate = torch.randn(2, 4, device=device), torch.randn(2, 4, device=device).bfloat16()
    with torch.autocast(device, dtype=torch.bfloat16):
        assert vitkit.swiglu(x, gate).dtype == eager(x, gate).dtype == torch.float32


def test_any_number_of_threads_gives_the_same_bits():
    x = torch.randn(37, 5000)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = vitkit.swiglu(x)
        torch.set_num_threads(3)
        assert torch.equal(vitkit.swiglu(x), one)
    finally:
        torch.set_num_threads(before)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_calls_agree_with_the_host(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), max_size=2))) + (
        data.draw(st.integers(1, 300)),
    )
    dtype = data.draw(st.sampled_from(DTYPES))
    tensors = gated.make("cpu", dtype, shape, data.draw(st.booleans()))
    gated.check(vitkit.swiglu, eager, tensors, data.draw(st.booleans()), "cpu")


BAD = {why: rest for why, *rest in gated.bad_calls()}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(arguments, error, message, device):
    check_bad_call("swiglu", arguments, error, message, device)


def test_float64_runs_on_the_reference_only(device):
    x = double(torch.zeros(2, 4, device=device))[0]
    assert vitkit.explain("swiglu", x).backend == "reference"
    with pytest.raises(ValueError, match="take float32, bfloat16 and float16, got float64"):
        vitkit.swiglu(x, backend=device)
