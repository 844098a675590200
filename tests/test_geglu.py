"""vitkit.geglu on every backend: parity with float64, strides, special values, bad input."""

from __future__ import annotations

import functools

import gated
import pytest
import torch
import torch.nn.functional as F
from numerics import DTYPES, gradients
from refusals import check_bad_call

import vitkit

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
every_form = pytest.mark.parametrize("approximate", ["none", "tanh"], ids=["erf", "tanh"])


def eager(value, gate, approximate="none"):
    return value * F.gelu(gate, approximate=approximate)


@pytest.fixture(params=["native", "triton", "reference"])
def backend(request, device):
    return gated.choose("geglu", request.param, device)


@every_dtype
@every_form
@pytest.mark.parametrize("form", ["gate_first", "separate"])
@pytest.mark.parametrize("shape", ["odd_columns", "row_longer_than_a_chunk"])
def test_parity(device, backend, dtype, approximate, form, shape):
    tensors = gated.make(device, dtype, gated.SHAPES[shape], form != "separate")
    host = functools.partial(eager, approximate=approximate)
    last = form == "gate_last"
    gated.check(vitkit.geglu, host, tensors, last, backend, approximate=approximate)


def test_default_is_the_gate_of_diffusers(device, backend):
    x = torch.randn(3, 8, device=device)
    value, gate = x.chunk(2, -1)
    torch.testing.assert_close(vitkit.geglu(x, backend=backend), value * F.gelu(gate))


def test_strided_views(device, backend):
    for why, x, gate in gated.strided(device, torch.float32):
        dense = [t if t is None else t.contiguous() for t in (x, gate)]
        cotangent = torch.randn_like(vitkit.geglu(*dense))
        run = lambda x, g: vitkit.geglu(x, g, backend=backend)  # noqa: E731
        got, want = (gradients(run, t, [cotangent]) for t in ([x, gate], dense))
        gated.assert_same(got, want, backend, why)


@every_dtype
@every_form
def test_special_values(device, backend, dtype, approximate):
    public = functools.partial(vitkit.geglu, approximate=approximate)
    host = functools.partial(eager, approximate=approximate)
    gated.check_special_values(public, host, device, backend, dtype)


def test_empty(device, backend):
    x = torch.zeros(0, 8, device=device, requires_grad=True)
    vitkit.geglu(x, backend=backend).sum().backward()
    assert x.grad.shape == (0, 8)


BAD = {why: rest for why, *rest in gated.bad_calls()}
BAD["approximate"] = (
    dict(x=torch.zeros(2, 6), approximate="erf"),
    ValueError,
    "approximate must be 'none' or 'tanh', got 'erf'",
)


@pytest.mark.parametrize(("arguments", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(arguments, error, message, device):
    check_bad_call("geglu", arguments, error, message, device)


def test_a_call_that_was_right_once_does_not_excuse_a_wrong_one(device):
    x = torch.zeros(2, 6, device=device)
    vitkit.geglu(x, backend="reference")
    with pytest.raises(ValueError, match="approximate must be"):
        vitkit.geglu(x, approximate="erf", backend="reference")
    with pytest.raises(TypeError, match="gate_last must be a bool, got int"):
        vitkit.geglu(x, gate_last=1, backend="reference")
