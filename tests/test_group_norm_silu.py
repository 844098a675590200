"""vitkit.group_norm_silu on every backend: parity with float64, layouts, statistics, bad input."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import DTYPES, assert_parity, double, eager_group_norm, gradients
from refusals import check_bad_call

import vitkit
from vitkit.ops.group_norm_silu import reference

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(params=["native", "triton", "reference"])
def backend(request, device):
    name = device if request.param == "native" else request.param
    x = torch.zeros(1, 2, 1, device=device)
    reason = vitkit.explain("group_norm_silu", x, 1).reasons[name]
    if reason is not None:
        pytest.skip(reason)
    return name


def make(
    device, dtype, shape, affine=True, modulated=(), parameter_dtype=None, channels_last=False
):
    """x, weight, bias, add, scale, shift"""
    torch.manual_seed(0)
    n, c = shape[:2]
    parameter_dtype = parameter_dtype or dtype
    x = torch.randn(shape, device=device).to(dtype)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    weight, bias = (
        torch.randn(c, device=device).to(parameter_dtype) if affine else None for _ in range(2)
    )
    extra = [
        torch.randn(n, c, device=device).to(parameter_dtype) if name in modulated else None
        for name in ("add", "scale", "shift")
    ]
    return [x, weight, bias, *extra]


def check(tensors, groups, backend, silu=True, eps=1e-5):
    """Output and every gradient by the tolerance rule; layout and dtype of the output."""
    x = tensors[0]
    cotangent = torch.randn(x.shape, device=x.device).to(x.dtype)

    def ours(x, weight, bias, add, scale, shift):
        return vitkit.group_norm_silu(
            x,
            groups,
            weight,
            bias,
            eps,
            activation="silu" if silu else None,
            add=add,
            scale=scale,
            shift=shift,
            backend=backend,
        )

    def truth(x, weight, bias, add, scale, shift):
        return reference(x, groups, weight, bias, eps, silu, add, scale, shift)

    def eager(x, *rest):
        return eager_group_norm(x, groups, *rest[:2], eps, silu, *rest[2:])

    got = gradients(ours, tensors, [cotangent])
    want = gradients(truth, double(*tensors), [cotangent])
    yardstick = gradients(eager, tensors, [cotangent])
    y = got[0][0]
    assert y.dtype == x.dtype and y.is_contiguous() == x.is_contiguous()
    assert y.movedim(1, -1).is_contiguous() == x.movedim(1, -1).is_contiguous()
    per_group = x[0].numel() // groups
    assert_parity("y", got[0][0], yardstick[0][0], want[0][0], terms=per_group)
    present = [n for n, t in zip(NAMES, tensors, strict=True) if t is not None]
    for name, a, e, w in zip(present, got[1], yardstick[1], want[1], strict=True):
        terms = per_group if name == "x" else x.numel() // x.shape[1]
        assert_parity(f"d{name}", a, e, w, dtype=x.dtype, terms=terms)


NAMES = ("x", "weight", "bias", "add", "scale", "shift")
SHAPES = {
    "unet_corner": ((2, 64, 8, 8), 32),
    "one_channel_per_group": ((2, 6, 5, 3), 6),
    "one_group": ((2, 6, 5, 3), 1),
    "odd_channels": ((1, 21, 7, 5), 7),
    "one_position": ((3, 32, 1, 1), 4),
    "vector": ((3, 32), 4),
    "sequence": ((2, 12, 17), 3),
    "volume": ((1, 16, 3, 4, 5), 4),
    "long_rows": ((1, 4, 33, 67), 2),
}
every_shape = pytest.mark.parametrize(("shape", "groups"), SHAPES.values(), ids=SHAPES.keys())


@every_dtype
@every_shape
def test_contiguous(device, backend, dtype, shape, groups):
    check(make(device, dtype, shape), groups, backend)


@every_dtype
@pytest.mark.parametrize(
    ("shape", "groups"),
    [s for s in SHAPES.values() if len(s[0]) > 3],
    ids=[n for n, s in SHAPES.items() if len(s[0]) > 3],
)
def test_channels_last(device, backend, dtype, shape, groups):
    check(make(device, dtype, shape, channels_last=True), groups, backend)


@every_dtype
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("silu", [True, False], ids=["silu", "no_activation"])
@pytest.mark.parametrize(
    "modulated",
    [("add",), ("scale", "shift"), ("add", "scale", "shift"), ("shift",)],
    ids=["time_embedding", "scale_shift", "all", "shift_only"],
)
def test_neighbours(device, backend, dtype, modulated, silu, channels_last):
    tensors = make(device, dtype, (2, 24, 5, 3), True, modulated, channels_last=channels_last)
    check(tensors, 4, backend, silu)


@every_dtype
def test_without_affine(device, backend, dtype):
    check(make(device, dtype, (2, 24, 5, 3), affine=False), 4, backend)
    check(make(device, dtype, (2, 24, 5, 3), affine=False, modulated=("scale",)), 4, backend)


@every_dtype
def test_float32_parameters_beside_lower_precision_inputs(device, backend, dtype):
    tensors = make(device, dtype, (2, 24, 5, 3), True, ("add", "scale"), torch.float32)
    check(tensors, 4, backend)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("offset", [100.0, 10000.0])
def test_large_mean_keeps_its_variance(device, backend, offset, channels_last):
    """E[x^2] - E[x]^2 in float32 would have nothing left here."""
    x = make(device, torch.float32, (2, 16, 24, 24), channels_last=channels_last)[0] + offset
    got = vitkit.group_norm_silu(x, 4, backend=backend)
    want = reference(x.double(), 4, None, None, 1e-5, True, None, None, None)
    # float32 holds x itself to eps * offset, and a mean of many such values no better than that.
    assert (got - want).abs().max() < 8 * torch.finfo(torch.float32).eps * offset + 1e-5


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_nan_stays_in_its_group(device, backend, channels_last):
    x = make(device, torch.float32, (2, 16, 4, 4), channels_last=channels_last)[0]
    clean = vitkit.group_norm_silu(x, 4, backend=backend)
    x[1, 5, 2, 2] = math.nan
    y = vitkit.group_norm_silu(x, 4, backend=backend)
    assert y[1, 4:8].isnan().all()
    y[1, 4:8] = clean[1, 4:8]
    torch.testing.assert_close(y, clean)


def test_large_activations_do_not_overflow(device, backend):
    x = make(device, torch.float32, (1, 8, 4, 4))[0]
    weight = torch.full((8,), 200.0, device=device)
    y = vitkit.group_norm_silu(x, 2, weight, backend=backend)
    want = reference(x.double(), 2, weight.double(), None, 1e-5, True, None, None, None)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "shape",
    [(0, 8, 4, 4), (2, 8, 0, 4), (0, 8), (2, 8, 0)],
    ids=["batch", "map", "rows", "sequence"],
)
def test_empty(device, backend, shape):
    tensors = make(device, torch.float32, shape, True, ("add", "scale", "shift"))
    leaves = [t.requires_grad_() for t in tensors]
    x, weight, bias, add, scale, shift = leaves
    y = vitkit.group_norm_silu(
        x, 4, weight, bias, add=add, scale=scale, shift=shift, backend=backend
    )
    assert y.shape == x.shape
    y.sum().backward()
    assert all(t.grad.shape == t.shape and torch.all(t.grad == 0) for t in leaves)


def test_other_strides_are_copied_first(device, backend):
    x = torch.randn(2, 8, 6, 10, device=device)
    for view in (x.transpose(2, 3), x[..., ::2], x[:1].expand(3, -1, -1, -1), x.flip(1)):
        y = vitkit.group_norm_silu(view, 4, backend=backend)
        assert y.is_contiguous()
        torch.testing.assert_close(y, F.silu(F.group_norm(view, 4)), rtol=1e-4, atol=1e-5)


def test_gradient_in_another_layout(device, backend):
    x = make(device, torch.float32, (2, 8, 4, 6), channels_last=True)[0].requires_grad_()
    y = vitkit.group_norm_silu(x, 4, backend=backend)
    cotangent = torch.randn(2, 8, 4, 6, device=device)
    for layout in (torch.contiguous_format, torch.channels_last):
        (got,) = torch.autograd.grad(
            y, x, cotangent.contiguous(memory_format=layout), retain_graph=True
        )
        (want,) = torch.autograd.grad(F.silu(F.group_norm(x, 4)), x, cotangent)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_operators_take_any_strides(device, backend):
    """What torch.compile hands them may lie otherwise than what was traced."""
    if backend == "reference":
        pytest.skip("not an operator")
    overload = "triton" if backend == "triton" else "default"
    fwd = getattr(torch.ops.vitkit.group_norm_silu_fwd, overload)
    bwd = getattr(torch.ops.vitkit.group_norm_silu_bwd, overload)
    torch.manual_seed(0)
    values, weight = torch.randn(2, 8, 6, 10, device=device), torch.randn(8, device=device)
    rest = (4, weight, None, 1e-5, True, None, None, None)
    y, mean, rstd = fwd(values, *rest)
    cotangent = torch.randn_like(values)
    small = (mean, rstd, 4, weight, None, True, None, None, None)
    dx, dweight, *_ = bwd(cotangent, values, *small)

    def layouts(t):
        last = t.contiguous(memory_format=torch.channels_last)
        transposed = t.transpose(2, 3).contiguous().transpose(2, 3)
        apart = torch.cat([t, t], 3)[..., : t.shape[3]]
        return [t, last, transposed, apart]

    for x in layouts(values):
        found = fwd(x, *rest)
        torch.testing.assert_close(found[0], y)
        last = x.is_contiguous(memory_format=torch.channels_last)
        kept = torch.channels_last if last else torch.contiguous_format
        assert found[0].is_contiguous(memory_format=kept)
        torch.library.opcheck(fwd, (x, *rest))
        for grad in layouts(cotangent):
            found = bwd(grad, x, *small)
            torch.testing.assert_close(found[:2], (dx, dweight))
            assert found[0].is_contiguous(memory_format=kept)
        torch.library.opcheck(bwd, (grad, x, *small))


def test_compiled_convolutions_hand_it_what_they_made(device):
    """Their channels_last output, without a copy to the strides that were traced."""
    from torch._inductor.utils import run_and_get_code

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (torch.nn.Conv2d(64, 64, 3, padding=1) for _ in range(2))

        def forward(self, x):
            return self.second(vitkit.group_norm_silu(self.first(x), 4))

    torch.manual_seed(0)
    torch._dynamo.reset()
    block, x = Block().to(device).requires_grad_(False), torch.randn(2, 64, 16, 16, device=device)
    with torch._inductor.config.patch(force_disable_caches=True):
        found, (code,) = run_and_get_code(torch.compile(block, fullgraph=True), x)
    torch.testing.assert_close(found, block(x), rtol=1e-4, atol=1e-5)
    made, used = r"(\w+) = extern_kernels\.convolution\(", r"group_norm_silu_fwd\.\w+\((\w+),"
    assert re.search(made, code)[1] == re.search(used, code)[1]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_calls_agree_with_the_reference(data):
    groups, per_group = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    spatial = data.draw(st.lists(st.integers(1, 20), min_size=0, max_size=3))
    shape = (data.draw(st.integers(1, 3)), groups * per_group, *spatial)
    if math.prod(spatial) * per_group < 3:
        return  # two values per group: the sign of their difference is all that is left
    modulated = data.draw(st.sets(st.sampled_from(["add", "scale", "shift"])))
    channels_last = data.draw(st.booleans()) and len(shape) in (4, 5)
    tensors = make(
        "cpu", data.draw(st.sampled_from(DTYPES)), shape, data.draw(st.booleans()), modulated,
        channels_last=channels_last,
    )  # fmt: skip
    check(tensors, groups, "cpu", data.draw(st.booleans()), eps=1e-3)


X = torch.zeros(2, 8, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(x=[1.0], num_groups=2), TypeError, "x must be a tensor, got list"),
        (dict(x=X.long(), num_groups=2), TypeError, "x must be one of float32"),
        (
            dict(x=X[0, :, 0, 0], num_groups=2),
            ValueError,
            r"x must have shape \[N, C, \*\], got \(8,\)",
        ),
        (
            dict(x=X, num_groups=3),
            ValueError,
            "num_groups must be at least 1 and divide C = 8, got 3",
        ),
        (dict(x=X, num_groups=0), ValueError, "num_groups must be at least 1 .* got 0"),
        (dict(x=X, num_groups=-2), ValueError, "num_groups must be at least 1 .* got -2"),
        (dict(x=X, num_groups=2.0), TypeError, "num_groups must be an int, got float"),
        (dict(x=X[:, :0], num_groups=1), ValueError, "divide C = 0, got 1"),
        (dict(x=X, num_groups=2, eps=-1.0), ValueError, "eps must be a number >= 0, got -1.0"),
        (
            dict(x=X, num_groups=2, eps=float("nan")),
            ValueError,
            "eps must be a number >= 0, got nan",
        ),
        (
            dict(x=X, num_groups=2, activation="relu"),
            ValueError,
            "activation must be 'silu' or None",
        ),
        (
            dict(x=X, num_groups=2, weight=torch.zeros(4)),
            ValueError,
            r"weight must have shape \[C\]",
        ),
        (dict(x=X, num_groups=2, bias=torch.zeros(8).long()), TypeError, "bias must be one of"),
        (dict(x=X, num_groups=2, add=torch.zeros(8)), ValueError, r"add must have shape \[N, C\]"),
        (
            dict(x=X, num_groups=2, scale=torch.zeros(1, 8)),
            ValueError,
            r"scale must .* got \(1, 8\)",
        ),
        (
            dict(x=X, num_groups=2, shift=torch.zeros(2, 8, device="meta")),
            ValueError,
            "shift must be on the device of x",
        ),
        (dict(x=X, num_groups=2, backend="gpu"), ValueError, "backend must be one of .* got 'gpu'"),
    ],
)
def test_bad_input(arguments, error, message, device):
    check_bad_call("group_norm_silu", arguments, error, message, device)


def test_float64_runs_on_the_reference_only(device):
    x = X.double().to(device)
    assert vitkit.explain("group_norm_silu", x, 2).backend == "reference"
    with pytest.raises(ValueError, match="take float32, bfloat16 and float16, got float64"):
        vitkit.group_norm_silu(x, 2, backend=device)
