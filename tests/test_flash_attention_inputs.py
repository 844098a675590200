"""What vitkit.flash_attention refuses, with the same message from every backend and before anything
runs, and which kernel it takes."""

from __future__ import annotations

import pytest
import torch
from refusals import check_bad_call

import vitkit
from vitkit import backends
from vitkit.ops.flash_attention import cuda_path


def q4(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


OFFSETS = torch.tensor([0, 3, 7], dtype=torch.int32)
PACKED = dict(q=q4(7, 2, 8), k=q4(7, 2, 8), v=q4(7, 2, 8))
DENSE = dict(q=q4(2, 5, 2, 8), k=q4(2, 7, 2, 8), v=q4(2, 7, 2, 8))


def offsets(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (DENSE | dict(q=[1.0]), TypeError, "q must be a tensor, got list"),
        (DENSE | dict(q=q4(2, 5, 2, 8, dtype=torch.int32)), TypeError, "q must be one of float32"),
        (
            DENSE | dict(q=q4(5, 2, 8)),
            ValueError,
            r"q must have shape \[B, N, H, D\].*got \(5, 2, 8\)",
        ),
        (DENSE | dict(k=q4(2, 7, 2, 16)), ValueError, r"k must match .* got \(2, 7, 2, 16\)"),
        (DENSE | dict(k=q4(2, 7, 3, 8)), ValueError, r"k must match .* got \(2, 7, 3, 8\)"),
        (DENSE | dict(k=q4(3, 7, 2, 8)), ValueError, r"k must match .* got \(3, 7, 2, 8\)"),
        (DENSE | dict(v=q4(2, 6, 2, 8)), ValueError, r"v must have the shape of k \(2, 7, 2, 8\)"),
        (
            DENSE | dict(v=q4(2, 7, 2, 8, dtype=torch.float16)),
            TypeError,
            "v must have the dtype of q",
        ),
        (
            DENSE | dict(k=torch.zeros(2, 7, 2, 8, device="meta")),
            ValueError,
            "k must be on the device",
        ),
        (
            DENSE | dict(q=q4(2, 5, 2, 0), k=q4(2, 7, 2, 0), v=q4(2, 7, 2, 0)),
            ValueError,
            "head dim",
        ),
        (DENSE | dict(bias=q4(2, 2, 5, 6)), ValueError, r"bias must broadcast to .*\(2, 2, 5, 7\)"),
        (DENSE | dict(bias=q4(1, 2, 2, 5, 7)), ValueError, "bias must broadcast"),
        (DENSE | dict(bias=torch.zeros(7, dtype=torch.int64)), TypeError, "bias must be one of"),
        (
            DENSE | dict(scale=float("nan")),
            ValueError,
            "scale must be a finite number or None, got nan",
        ),
        (DENSE | dict(backend="gpu"), ValueError, "backend must be one of .* got 'gpu'"),
        (DENSE | dict(cu_seqlens_q=OFFSETS), ValueError, r"q must have shape \[T, H, D\]"),
        (PACKED, ValueError, "3-D tensors need cu_seqlens_q and cu_seqlens_k"),
        (PACKED | dict(cu_seqlens_q=OFFSETS), ValueError, "cu_seqlens_k must be given together"),
        (
            PACKED | dict(cu_seqlens_q=OFFSETS, cu_seqlens_k=OFFSETS.long()),
            TypeError,
            "cu_seqlens_k must be int32, got int64",
        ),
        (
            PACKED | dict(cu_seqlens_q=OFFSETS, cu_seqlens_k=offsets(0, 7)),
            ValueError,
            "cu_seqlens_k must have shape",
        ),
        (
            PACKED | dict(cu_seqlens_q=offsets(0, 5, 3, 7), cu_seqlens_k=offsets(0, 3, 5, 7)),
            ValueError,
            r"cu_seqlens_q must start at 0, never decrease .* got \[0, 5, 3, 7\]",
        ),
        (
            PACKED | dict(cu_seqlens_q=offsets(0, 3, 9), cu_seqlens_k=OFFSETS),
            ValueError,
            r"cu_seqlens_q must start at 0.* tokens 7, got \[0, 3, 9\]",
        ),
        (
            PACKED | dict(cu_seqlens_q=OFFSETS, cu_seqlens_k=OFFSETS, bias=q4(7, 7)),
            ValueError,
            "bias must be None for packed sequences",
        ),
    ],
)
def test_bad_input(arguments, error, message, device):
    check_bad_call("flash_attention", arguments, error, message, device)


def test_offsets_changed_in_place_are_checked_again(device):
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            offsets = OFFSETS.clone().to(device)
            q = torch.zeros(7, 2, 8, device=device)
            vitkit.flash_attention(q, q, q, cu_seqlens_q=offsets, cu_seqlens_k=offsets)
            offsets[1] = 99
            with pytest.raises(ValueError, match="cu_seqlens_q must start at 0"):
                vitkit.flash_attention(q, q, q, cu_seqlens_q=offsets, cu_seqlens_k=offsets)


def test_kernels_refuse_what_only_the_reference_can(device):
    q = torch.zeros(1, 3, 1, 12, device=device)
    assert vitkit.explain("flash_attention", q, q, q).backend == "reference"
    with pytest.raises(ValueError, match="multiple of 8 up to 256, got 12"):
        vitkit.flash_attention(q, q, q, backend=device)
    q = torch.zeros(1, 3, 1, 16, device=device, dtype=torch.float64)
    with pytest.raises(ValueError, match="take float32, bfloat16 and float16, got float64"):
        vitkit.flash_attention(q, q, q, backend=device)


def test_hopper_kernel_is_taken_by_a_rule(monkeypatch):
    """The rule that the C++ launch asks, and what explain says of it."""
    runtime = pytest.importorskip("vitkit._runtime")
    monkeypatch.setattr(runtime, "build_facts", lambda: {"cuda_archs": ["sm_80", "sm_90a"]})
    q = torch.zeros(2, 600, 3, 2, 72, dtype=torch.bfloat16)[:, :, 0]  # views of one qkv tensor

    def path(q, k=None, capability=(9, 0), **options):
        k = q if k is None else k
        return cuda_path(q, k, k, capability=capability, **options)

    assert "sm_90a" in path(q) and "not yet confirmed on hardware" in path(q)
    assert "sm_90a" in path(q.transpose(1, 2).contiguous().transpose(1, 2))
    refused = {
        "compute capability is not 9.0": path(q, capability=(10, 0)),
        "16-bit elements": path(q.float()),
        "there is a bias": path(q, bias=torch.zeros(600, 600)),
        "packed": path(q[0], cu_seqlens_q=torch.tensor([0, 600], dtype=torch.int32)),
        "head dim is not from 64 to 128": path(q[..., :56]),
        "fewer than 512": path(q, q[:, :511]),
        "a tensor is expanded": path(q[:1].expand(2, -1, -1, -1)),
        "no multiple of 16 bytes": path(q.reshape(-1)[4:-140].view(1, -1, 2, 72)),
    }
    for reason, said in refused.items():
        assert "sm_80 and later, because" in said and reason in said, said
    monkeypatch.setattr(runtime, "build_facts", lambda: {"cuda_archs": ["sm_80"]})
    assert "no code for sm_90a" in path(q)
    text = str(backends.Explanation("flash_attention", "cuda", {"cuda": None}, [], path(q)))
    assert "CUDA forward pass: the kernel for sm_80" in text
