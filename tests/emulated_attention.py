"""What the tests of the emulated attention kernels share: their parameters as ctypes, and the
comparison with float64. Field by field as in csrc/attention."""

from __future__ import annotations

import ctypes
import math

import torch
from numerics import DTYPES, assert_parity, double, gradients

P, I64, INT, F32, BOOL, U64 = (
    ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float, ctypes.c_bool, ctypes.c_uint64
)  # fmt: skip
BF16, F16, FLOAT = torch.bfloat16, torch.float16, torch.float32


class Rows(ctypes.Structure):
    _fields_ = [("data", P), ("batch", I64), ("token", I64), ("head", I64)]


class Divisor(ctypes.Structure):
    _fields_ = [("value", INT), ("multiplier", ctypes.c_uint32), ("shift", INT)]

    @classmethod
    def of(cls, d):
        shift = max((d - 1).bit_length() - 1, 0)
        return cls(d, 0 if d == 1 else -(-(2 ** (32 + shift)) // d), shift)


class Tensors(ctypes.Structure):
    """BackwardTensors"""

    _fields_ = [
        *((n, Rows) for n in ("q", "k", "v", "out", "grad", "dq", "dk", "dv")),
        *((n, P) for n in ("lse", "grad_lse", "delta")),
        *((n, I64) for n in ("lse_batch", "lse_head")),
        *((f"grad_lse_{n}", I64) for n in ("batch", "head", "token")),
        ("head_dim", INT),
        ("causal", BOOL),
        ("scale", F32),
    ]

    def set_inputs(self, q, k, v, causal, scale):
        self.q, self.k, self.v = map(rows, (q, k, v))
        self.head_dim, self.causal = q.shape[-1], causal
        self.scale = scale * math.log2(math.e)

    def set_grad_lse(self, grad_lse):
        """[B, H, N] or [H, N]"""
        if grad_lse is not None:
            self.grad_lse = grad_lse.data_ptr()
            self.grad_lse_batch = grad_lse.stride(0) if grad_lse.dim() == 3 else 0
            self.grad_lse_head, self.grad_lse_token = grad_lse.stride()[-2:]


class SequenceMap(ctypes.Structure):
    _fields_ = [
        *((n, INT) for n in ("batch", "heads", "n_q", "n_k", "sequences")),
        ("cu_seqlens_q", P),
        ("cu_seqlens_k", P),
    ]


def params(map_type, term_type):
    """BackwardParams"""

    class Params(ctypes.Structure):
        _anonymous_ = ("tensors",)
        _fields_ = [("tensors", Tensors), ("map", map_type), ("term", term_type)]

    return Params


def load(path, call_type):
    library = ctypes.CDLL(str(path))
    for name in ("emulated_forward", "emulated_backward"):
        getattr(library, name).restype = ctypes.c_char_p
    library.emulated_call_size.restype = ctypes.c_size_t
    assert library.emulated_call_size() == ctypes.sizeof(call_type)
    return library


def launch(function, call):
    error = function(ctypes.byref(call))
    assert error is None, error.decode()


def element(dtype):
    return [*DTYPES, torch.bool].index(dtype)


def rows(t):
    """Rows of [B, N, H, D] or [T, H, D]."""
    assert t.stride(-1) == 1
    return Rows(t.data_ptr(), t.stride(0) if t.dim() == 4 else 0, t.stride(-3), t.stride(-2))


def poisoned(t, dtype=None):
    return torch.full(t.shape, torch.nan, dtype=dtype or t.dtype)


def check_parity(names, found, exact, eager, tensors, cotangents, *, dtype, terms):
    """``found``, outputs and gradients by name, against ``exact`` in float64 and by the yardstick
    of ``eager``."""
    want, want_grads = gradients(exact, double(*tensors), double(*cotangents))
    near, near_grads = gradients(eager, tensors, cotangents)
    pairs = zip(names, found, (*near, *near_grads), (*want, *want_grads), strict=True)
    for name, a, e, w in pairs:
        if w is None:  # nothing depends on it
            e = w = torch.zeros(a.shape, dtype=torch.float64)
        assert_parity(name, a, e, w, dtype=dtype, terms=terms)
