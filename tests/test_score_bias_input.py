"""DecomposedBias and DistanceBias as objects, and what they and flash_attention refuse."""

from __future__ import annotations

import pickle

import pytest
import torch

import vitkit
from vitkit import DecomposedBias, DistanceBias


def test_biases_are_values(device):
    rel = torch.randn(1, 2, 4, 3, device=device)
    bias = DecomposedBias(rel, rel)
    with pytest.raises(AttributeError):
        bias.rel_h = rel
    again = pickle.loads(pickle.dumps(bias))
    assert torch.equal(again.rel_w, rel)
    assert bias.dense().shape == (1, 2, 4, 9)
    places = torch.zeros(1, 4, 2, device=device)
    assert DistanceBias(rel[0, :, 0, 0], places, places).dense().shape == (1, 2, 4, 4)


def t(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(*shape, dtype=dtype, device=device)


META = dict(device="meta")


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "message"),
    [
        (DecomposedBias, ([1.0], t(2, 2, 5, 3)), TypeError, "rel_h must be a tensor, got list"),
        (
            DecomposedBias,
            (t(2, 2, 5, 3, dtype=torch.int64), t(2, 2, 5, 3)),
            TypeError,
            "rel_h must be one of float32.* got int64",
        ),
        (
            DecomposedBias,
            (t(2, 2, 5, 3), t(2, 2, 5, 3, dtype=torch.float16)),
            TypeError,
            "rel_w must have the dtype of rel_h",
        ),
        (
            DecomposedBias,
            (t(2, 2, 5, 3), t(2, 2, 5, 3, **META)),
            ValueError,
            "rel_w must be on the device of rel_h",
        ),
        (DecomposedBias, (t(2, 5, 3), t(2, 5, 3)), ValueError, r"rel_h must have shape \[B, H, Nq"),
        (DecomposedBias, (t(2, 2, 5, 3), t(2, 1, 5, 3)), ValueError, r"rel_w must have .*2, 2, 5"),
        (DistanceBias, (0.5, t(1, 5, 2), t(1, 7, 2)), TypeError, "slopes must be a tensor"),
        (DistanceBias, (t(1, 2), t(1, 5, 2), t(1, 7, 2)), ValueError, r"slopes must have shape \["),
        (
            DistanceBias,
            (t(2), t(1, 5, 2, dtype=torch.int64), t(1, 7, 2)),
            TypeError,
            "coords_q must be one of float32.* got int64",
        ),
        (DistanceBias, (t(2), t(5, 2), t(7, 2)), ValueError, r"coords_q must have .*got \(5, 2\)"),
        (DistanceBias, (t(2), t(1, 5, 2), t(1, 7, 3)), ValueError, r"coords_k .*got \(1, 7, 3\)"),
        (
            DistanceBias,
            (t(2), t(1, 5, 2), t(1, 7, 2, dtype=torch.float64)),
            TypeError,
            "coords_k must have the dtype of coords_q",
        ),
        (
            DistanceBias,
            (t(2), t(1, 5, 2), t(1, 7, 2, **META)),
            ValueError,
            "coords_k must be on the device of slopes",
        ),
    ],
)
def test_bad_tensors(kind, arguments, error, message):
    with pytest.raises(error, match=f"^{kind.__name__}: {message}"):
        kind(*arguments)


OFFSETS = torch.tensor([0, 5, 10], dtype=torch.int32)


@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        (
            DecomposedBias(t(1, 2, 5, 3), t(1, 2, 5, 4)),
            ValueError,
            r"bias.rel_h must have shape \[B, H, Nq, Kh\] = \(2, 2, 5, 3\), got \(1, 2, 5, 3\)",
        ),
        (
            DecomposedBias(t(2, 2, 5, 3), t(2, 2, 5, 4)),
            ValueError,
            r"Kh \* Kw = 7 keys, got 3 \* 4",
        ),
        (DecomposedBias(t(2, 2, 5, 7, **META), t(2, 2, 5, 1, **META)), ValueError, "on the device"),
        (
            DistanceBias(t(3), t(1, 5, 2), t(1, 7, 2)),
            ValueError,
            r"bias.slopes must have shape \[H\] = \(2,\), got \(3,\)",
        ),
        (
            DistanceBias(t(2), t(1, 4, 2), t(1, 7, 2)),
            ValueError,
            r"bias.coords_q must have shape \[1, N, 2\] = \(1, 5, 2\), got \(1, 4, 2\)",
        ),
        (
            DistanceBias(t(2), t(2, 5, 2), t(3, 7, 2)),
            ValueError,
            r"bias.coords_k must have shape \[B, N, 2\] = \(2, 7, 2\), got \(3, 7, 2\)",
        ),
        ("alibi", TypeError, "bias must be a tensor, a DecomposedBias or a DistanceBias, got str"),
    ],
)
def test_bad_input(bias, error, message, device):
    q, k, v = (t(2, n, 2, 8, device=device) for n in (5, 7, 7))
    if not isinstance(bias, str) and not bias.tensors()[0].is_meta:
        bias = type(bias)(*(x.to(device) for x in bias.tensors()))
    for backend in ("auto", device, "triton", "reference"):
        with pytest.raises(error, match=f"^flash_attention: .*{message}"):
            vitkit.flash_attention(q, k, v, bias=bias, backend=backend)


@pytest.mark.parametrize(
    "bias",
    [
        DecomposedBias(t(1, 2, 10, 2), t(1, 2, 10, 5)),
        DistanceBias(t(2), t(1, 10, 2), t(1, 10, 2)),
    ],
    ids=lambda b: type(b).__name__,
)
def test_packed_sequences_take_no_bias(bias, device):
    q = t(10, 2, 8, device=device)
    offsets = OFFSETS.to(device)
    with pytest.raises(ValueError, match=f"bias must be None for packed .*{type(bias).__name__}"):
        vitkit.flash_attention(q, q, q, bias=bias, cu_seqlens_q=offsets, cu_seqlens_k=offsets)


def test_explain_names_the_operator(device):
    q = torch.zeros(1, 4, 1, 12, device=device)
    rel = torch.zeros(1, 1, 4, 2, device=device)
    found = vitkit.explain("flash_attention", q, q, q, bias=DecomposedBias(rel, rel))
    assert found.backend == "reference"
    assert "multiple of 8 up to 256, got 12" in found.reasons[device]


def test_what_only_the_cuda_kernels_refuse():
    def reason(dtype, head_dim):
        q = torch.zeros(1, 4, 1, head_dim, dtype=dtype)
        bias = vitkit.DecomposedBias(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2))
        return vitkit.explain("flash_attention", q, q, q, bias=bias).reasons["cuda"]

    assert "up to 128 with this bias in float32, got 136" in reason(torch.float32, 136)
    for allowed in ((torch.float32, 128), (torch.float16, 256)):
        assert "head dim" not in reason(*allowed)
