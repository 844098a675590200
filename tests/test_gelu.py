"""vitkit.gelu on every backend: parity with float64, layouts, the error over all of float32."""

from __future__ import annotations

import gated
import pytest
import torch
import torch.nn.functional as F
from numerics import DTYPES, assert_parity, gradients
from refusals import check_bad_call

import vitkit

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
every_form = pytest.mark.parametrize("approximate", ["none", "tanh"], ids=["erf", "tanh"])


@pytest.fixture(params=["native", "triton", "reference"])
def backend(request, device):
    return gated.choose("gelu", request.param, device)


@every_dtype
@every_form
@pytest.mark.parametrize(
    "shape", [(2, 17, 96), (7,), (), (3, 4099)], ids=["vit_mlp", "odd", "scalar", "chunks"]
)
def test_parity(device, backend, dtype, approximate, shape):
    torch.manual_seed(0)
    x, cotangent = (3 * torch.randn(2, *shape, device=device)).to(dtype)
    run = lambda x: vitkit.gelu(x, approximate=approximate, backend=backend)  # noqa: E731
    host = lambda x: F.gelu(x, approximate=approximate)  # noqa: E731
    got, plain = gradients(run, [x], [cotangent]), gradients(host, [x], [cotangent])
    truth = gradients(host, [x.double()], [cotangent])
    assert got[0][0].dtype == dtype and got[0][0].shape == shape
    assert_parity("y", got[0][0], plain[0][0], truth[0][0])
    assert_parity("dx", got[1][0], plain[1][0], truth[1][0])


def every_float(dtype, limit):
    """Floats of both signs up to ``limit``: all of a 16-bit dtype, one in 4099 of float32."""
    bits = torch.arange(0, 1 << 16) if dtype != torch.float32 else torch.arange(0, 2**31, 4099)
    kind = torch.int16 if dtype != torch.float32 else torch.int32
    positive = bits.to(kind).view(dtype)
    positive = positive[(positive >= 0) & (positive <= limit)]
    return torch.cat([positive, -positive])


# Largest error of y over |x|, and of dy / dx, beyond the rounding of the result: the fits of
# csrc/core/gate_fits.h with the exponential and the reciprocal of the dtype.
LIMITS = {torch.float32: (1.5e-7, 3e-7), torch.bfloat16: (4e-6, 8e-5), torch.float16: (2e-7, 5e-6)}


@every_dtype
@every_form
def test_error_over_all_floats(dtype, approximate):
    x = every_float(dtype, 60.0)
    exact = x.double().requires_grad_()
    truth = F.gelu(exact, approximate=approximate)
    (slope,) = torch.autograd.grad(truth.sum(), exact)
    leaf = x.clone().requires_grad_()
    y = vitkit.gelu(leaf, approximate=approximate, backend="cpu")
    y.backward(torch.ones_like(y))
    info = torch.finfo(dtype)

    def beyond_rounding(got, want):
        return (got.double() - want).abs() - want.abs() * info.eps / 2 - info.tiny * info.eps

    error = beyond_rounding(y.detach(), truth.detach())
    assert (error <= LIMITS[dtype][0] * x.double().abs()).all(), error.max()
    error = beyond_rounding(leaf.grad, slope)
    assert error.max() <= LIMITS[dtype][1], error.max()


def test_tails_keep_their_digits():
    """Where 1 + erf(x) has lost all of them."""
    x = torch.linspace(-9, -1, 1001)
    exact = x.double() * 0.5 * torch.erfc(-x.double() * 0.5**0.5)
    ours = ((vitkit.gelu(x, backend="cpu").double() - exact) / exact).abs()
    assert ours[x >= -4].max() < 2e-3 and ours[x >= -3].max() < 2e-4


@every_form
@every_dtype
def test_special_values(device, backend, dtype, approximate):
    for repeats in (1, 8):
        x = gated.SPECIAL.repeat(repeats).to(device, dtype)
        got = vitkit.gelu(x, approximate=approximate, backend=backend)
        exact = F.gelu(x.double(), approximate=approximate)
        for part in (x.abs() <= 100, x.abs() > 100, ~(x.abs() <= 1e30)):
            host = F.gelu(x, approximate=approximate)
            assert_parity("y", got[part], host[part], exact[part])


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 4, 2, 3, 2)], ids=["map", "volume"])
def test_channels_last_stays_channels_last(device, backend, shape):
    x = torch.randn(shape, device=device).movedim(1, -1).contiguous().movedim(-1, 1)
    x.requires_grad_()
    y = vitkit.gelu(x, backend=backend)
    assert y.stride() == x.stride()
    torch.testing.assert_close(y, F.gelu(x))
    cotangent = torch.randn(shape, device=device)  # contiguous: another layout than x
    (got,) = torch.autograd.grad(y, x, cotangent)
    (want,) = torch.autograd.grad(F.gelu(x), x, cotangent)
    torch.testing.assert_close(got, want)


def test_other_strides_are_copied_first(device, backend):
    x = torch.randn(6, 8, 10, device=device)
    for view in (x.transpose(0, 2), x[..., ::2], x[:1].expand(3, -1, -1), x[:, 1:, 1:]):
        y = vitkit.gelu(view, backend=backend)
        assert y.is_contiguous()
        torch.testing.assert_close(y, F.gelu(view))


def test_empty(device, backend):
    x = torch.zeros(2, 0, 3, device=device, requires_grad=True)
    vitkit.gelu(x, backend=backend).sum().backward()
    assert x.grad.shape == (2, 0, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(x=[1.0]), TypeError, "x must be a tensor, got list"),
        (dict(x=torch.zeros(2).long()), TypeError, "x must be one of float32"),
        (
            dict(x=torch.zeros(2), approximate="sigmoid"),
            ValueError,
            "approximate must be 'none' or 'tanh', got 'sigmoid'",
        ),
    ],
    ids=["a_list", "integers", "approximate"],
)
def test_bad_input(arguments, error, message, device):
    check_bad_call("gelu", arguments, error, message, device)
