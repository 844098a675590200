"""vitkit.gated_residual on every backend: parity with float64, kinds of gates, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from numerics import DTYPES, assert_parity, double, gradients
from refusals import check_bad_call

import vitkit
from vitkit.ops.gated_residual import reference

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(params=["native", "triton", "reference"])
def backend(request, device):
    name = device if request.param == "native" else request.param
    x = torch.zeros(1, 2, device=device)
    reason = vitkit.explain("gated_residual", x, x, x).reasons[name]
    if reason is not None:
        pytest.skip(reason)
    return name


def make(device, dtype, shape, gate, gate_dtype=None):
    torch.manual_seed(0)
    x, y = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    return [x, y, torch.randn(gate, device=device).to(gate_dtype or dtype)]


def eager(x, y, gate):
    gate = gate.to(x.dtype)
    if gate.dim() == 2 and x.dim() != 2:
        gate = gate.view(x.shape[0], *(1,) * (x.dim() - 2), x.shape[-1])
    return x + gate * y


def check(tensors, backend):
    x, _, gate = tensors
    cotangent = torch.randn(x.shape, device=x.device).to(x.dtype)
    got = gradients(lambda *t: vitkit.gated_residual(*t, backend=backend), tensors, [cotangent])
    want = gradients(reference, double(*tensors), [cotangent])
    yardstick = gradients(eager, tensors, [cotangent])
    assert got[0][0].dtype == x.dtype and got[0][0].is_contiguous()
    assert_parity("out", got[0][0], yardstick[0][0], want[0][0], terms=2)
    found = (("x", "y", "gate"), tensors, got[1], yardstick[1], want[1])
    for name, t, a, e, w in zip(*found, strict=True):
        assert a.dtype == t.dtype and a.shape == t.shape
        assert_parity(f"d{name}", a, e, w, dtype=x.dtype, terms=max(1, x.numel() // gate.numel()))


GATES = {
    "sample": ((3, 7, 40), (3, 40)),
    "token": ((2, 5, 24), (2, 5, 24)),
    "layer_scale": ((2, 5, 24), (24,)),
    "odd_width": ((2, 9, 77), (2, 77)),
    "one_element": ((2, 3, 1), (2, 1)),
    "one_token": ((3, 1, 16), (3, 16)),
    "vector": ((24,), (24,)),
    "matrix": ((5, 24), (5, 24)),
    "map": ((2, 3, 4, 32), (2, 32)),
    "many_rows": ((1, 300, 20), (1, 20)),
}


@every_dtype
@pytest.mark.parametrize(("shape", "gate"), GATES.values(), ids=GATES)
def test_gates(device, backend, dtype, shape, gate):
    check(make(device, dtype, shape, gate), backend)


@pytest.mark.parametrize("kind", ["sample", "token", "layer_scale"])
def test_gates_of_another_dtype(device, backend, kind):
    for gate_dtype in (torch.float32, torch.float16):
        check(make(device, torch.bfloat16, *GATES[kind], gate_dtype), backend)


@pytest.mark.parametrize("gate", [(0, 8), (8,), (0, 5, 8)], ids=["sample", "all", "token"])
def test_empty_batch(device, backend, gate):
    leaves = [t.requires_grad_() for t in make(device, torch.float32, (0, 5, 8), gate)]
    out = vitkit.gated_residual(*leaves, backend=backend)
    assert out.shape == (0, 5, 8)
    out.sum().backward()
    assert all(t.grad.shape == t.shape and torch.all(t.grad == 0) for t in leaves)


def test_strides(device, backend):
    x, y, table = (torch.randn(3, 10, 24, device=device) for _ in range(3))
    six = torch.randn(3, 6 * 24, device=device).chunk(6, 1)
    assert torch.equal(
        vitkit.gated_residual(x, y, six[2], backend=backend),
        vitkit.gated_residual(x, y, six[2].clone(), backend=backend),
    )
    views = [t.transpose(0, 1) for t in (x, y, table)]
    torch.testing.assert_close(
        vitkit.gated_residual(*views, backend=backend), views[0] + views[1] * views[2]
    )
    column = torch.randn(24, 3, device=device).t()
    torch.testing.assert_close(
        vitkit.gated_residual(x, y, column, backend=backend), x + y * column[:, None]
    )


def test_nan_stays_in_its_place(device, backend):
    x, y, gate = make(device, torch.float32, (2, 5, 33), (2, 33))
    x[0, 1, 32] = math.nan
    y[1, 2, 3] = math.nan
    out = vitkit.gated_residual(x, y, gate, backend=backend)
    assert out.isnan().nonzero().tolist() == [[0, 1, 32], [1, 2, 3]]


def test_frozen_gate_and_branch(device, backend):
    x, y, gate = make(device, torch.float32, (2, 5, 16), (2, 16))
    out = vitkit.gated_residual(x.requires_grad_(), y, gate, backend=backend)
    cotangent = torch.randn_like(out)
    out.backward(cotangent)
    assert torch.equal(x.grad, cotangent)


def test_autocast_widens_as_the_addition_does(device):
    x, y, gate = make(device, torch.float32, (2, 5, 16), (16,))
    with torch.autocast(device, dtype=torch.bfloat16):
        out = vitkit.gated_residual(x, y.bfloat16(), gate)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, x + gate * y.bfloat16().float())


X = torch.zeros(2, 5, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(x=None), TypeError, "x must be a tensor, got NoneType"),
        (dict(x=X.int()), TypeError, "x must be one of float32"),
        (dict(x=X[..., :0]), ValueError, r"x must have shape \[\*, E\] with E >= 1"),
        (dict(y=X[:, :3]), ValueError, r"y must have shape that of x = \(2, 5, 8\), got"),
        (dict(y=X.bfloat16()), TypeError, "y must have the dtype of x"),
        (
            dict(gate=torch.zeros(5, 8)),
            ValueError,
            r"gate must have one of the shapes \[E\] = \(8,\), \[B, E\] = \(2, 8\), that of x",
        ),
        (dict(gate=torch.zeros(8, device="meta")), ValueError, "gate must be on the device of x"),
        (dict(gate=2.0), TypeError, "gate must be a tensor, got float"),
        (dict(backend="gpu"), ValueError, "backend must be one of .* got 'gpu'"),
    ],
)
def test_bad_input(arguments, error, message, device):
    given = {"x": X, "y": X, "gate": X[0, 0], **arguments}
    check_bad_call("gated_residual", given, error, message, device)


def test_float64_runs_on_the_reference_only(device):
    x = X.double().to(device)
    assert vitkit.explain("gated_residual", x, x, x).backend == "reference"
    with pytest.raises(ValueError, match="take float32, bfloat16 and float16, got float64"):
        vitkit.gated_residual(x, x, x, backend=device)
