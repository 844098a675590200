"""What the tests of swiglu and geglu share: the two are one contract with two activations."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_parity, double, gradients

import vitkit

SHAPES = {
    "vit_tokens": (2, 17, 96),
    "one_column": (5, 1),
    "odd_columns": (3, 7),
    "one_vector_and_a_bit": (2, 2, 33),
    "single_row": (129,),
    "row_longer_than_a_chunk": (2, 4099),
}


def choose(op, request, device):
    """The backend a test runs on, by the parameter "native", "triton" or "reference"."""
    name = device if request == "native" else request
    reason = vitkit.explain(op, torch.zeros(2, 4, device=device)).reasons[name]
    if reason is not None:
        pytest.skip(reason)
    return name


def make(device, dtype, shape, packed):
    """(x, gate), gate None for a packed x."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *s: torch.randn(*s, generator=generator).to(device, dtype)  # noqa: E731
    if packed:
        return [3 * draw(*shape[:-1], 2 * shape[-1]), None]
    return [draw(*shape), 3 * draw(*shape)]


def check(public, eager, tensors, gate_last, backend, **options):
    """Output and gradients by the tolerance rule. ``eager(value, gate)`` is the host's line."""
    x = tensors[0]

    def host(x, gate):
        if gate is None:
            first, second = x.chunk(2, -1)
            x, gate = (first, second) if gate_last else (second, first)
        return eager(x, gate)

    def ours(x, gate, backend=backend):
        return public(x, gate, gate_last=gate_last, backend=backend, **options)

    shape = host(*tensors).shape
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(shape, generator=generator).to(x)
    got = gradients(ours, tensors, [cotangent])
    truth = gradients(host, double(*tensors), [cotangent])
    plain = gradients(host, tensors, [cotangent])
    assert got[0][0].dtype == x.dtype and got[0][0].is_contiguous()
    assert_parity("y", got[0][0], plain[0][0], truth[0][0])
    for name, a, e, t in zip(("dx", "dgate"), got[1], plain[1], truth[1], strict=False):
        assert_parity(name, a, e, t)
    specified = gradients(lambda x, g: ours(x, g, "reference"), double(*tensors), [cotangent])
    torch.testing.assert_close(specified[0][0], truth[0][0], rtol=1e-12, atol=1e-12)
    return got


def strided(device, dtype):
    """(why, x, gate) of views that the kernels read in place, or after a copy."""
    packed = torch.randn(3, 5, 24, device=device).to(dtype)
    first, second = packed.chunk(2, -1)
    wide = torch.randn(5, 40, device=device).to(dtype)
    return [
        ("halves_of_one_projection", first, second),
        ("misaligned", wide[:, 1:23], None),
        ("every_second_row", wide[::2, :20], None),
        ("every_second_sample", packed[:, ::2], None),
        ("transposed", wide[:4].t(), None),
        ("expanded", wide[0].expand(3, 4, 40), None),
        ("every_second_column", wide[:, ::2], None),
        ("sliced_batch_and_tokens", packed[1:, 1:4], None),
    ]


def assert_same(got, want, backend, why=""):
    """Outputs and gradients equal bit by bit; PyTorch's own kernels, behind the reference, round by
    the strides they see."""
    for a, b in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        if backend == "reference":
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b), why


def far_rows(tmp_path, columns):
    """[20, columns] bfloat16 whose rows are 2**27 elements apart, and a near copy, in a sparse
    file: no memory but that of the rows is touched."""
    rows, pitch = 20, 1 << 27
    assert (rows - 1) * pitch > 2**31
    size = (rows - 1) * pitch + columns
    file = torch.from_file(str(tmp_path / "x"), shared=True, size=size, dtype=torch.bfloat16)
    far = file.as_strided((rows, columns), (pitch, 1))
    near = torch.randn(rows, columns).bfloat16()
    return far.copy_(near), near


SPECIAL = torch.tensor(
    [0.0, -0.0, 1e-30, -1e-30, 60.0, -60.0, 1e4, -1e4, float("inf"), float("-inf"), float("nan")]
)


def check_special_values(public, eager, device, backend, dtype):
    """Infinities and NaN where PyTorch has them, zeros where it has zeros, in full vectors and in
    the rest of a row alike."""
    for repeats in (1, 8):
        gate = SPECIAL.repeat(repeats).to(device, dtype)
        value = torch.full_like(gate, 0.75)
        got = public(value, gate, backend=backend)
        exact = eager(value.double(), gate.double())
        # In ranges of its own: beside 1e4 nothing else would count.
        for small in (gate.abs() <= 100, gate.abs() > 100, ~(gate.abs() <= 1e30)):
            assert_parity("y", got[small], eager(value, gate)[small], exact[small])


def bad_calls():
    x = torch.zeros(2, 6)
    return [
        ("a_list", dict(x=[1.0]), TypeError, "x must be a tensor, got list"),
        ("integers", dict(x=x.long()), TypeError, "x must be one of float32"),
        ("scalar", dict(x=x[0, 0]), ValueError, r"x must have at least one dimension"),
        ("odd", dict(x=x[:, :5]), ValueError, r"x must have an even last .* got \(2, 5\)"),
        ("gate_shape", dict(x=x, gate=x[:, :3]), ValueError, "gate must have shape of x"),
        ("gate_broadcasts", dict(x=x, gate=x[:1]), ValueError, "gate must have shape of x"),
        ("gate_dtype", dict(x=x, gate=x.half()), TypeError, "gate must have the dtype of x"),
        ("gate_list", dict(x=x, gate=[1]), TypeError, "gate must be a tensor, got list"),
        (
            "gate_device",
            dict(x=x, gate=x.to("meta")),
            ValueError,
            "gate must be on the device of x",
        ),
        ("gate_last", dict(x=x, gate_last=1), TypeError, "gate_last must be a bool, got int"),
        ("backend", dict(x=x, backend="gpu"), ValueError, "backend must be one of .* got 'gpu'"),
    ]
