"""Triton's interpreter, repaired: what the parity tests of the Triton backend stand on."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="checks the interpreter, which does not run here"
)


@triton.jit
def _arithmetic(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(out_ptr + i, x + y)
    tl.store(out_ptr + N + i, x * y)
    tl.store(out_ptr + 2 * N + i, tl.where(x < y, x, -y))
    tl.store(out_ptr + 3 * N + i, tl.maximum(x, y))
    tl.store(out_ptr + 4 * N + i, (x.to(tl.float32) / 3).to(tl.bfloat16))


@triton.jit
def _reduce(x_ptr, out_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(out_ptr, tl.sum(x.to(tl.float32), 0))
    tl.store(out_ptr + 1, tl.max(x, 0).to(tl.float32))
    tl.store(out_ptr + 2, tl.sum(x, 0).to(tl.float32))


@triton.jit
def _product(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    a, b = tl.load(a_ptr + i * N + j), tl.load(b_ptr + i * N + j)
    tl.store(out_ptr + i * N + j, tl.dot(a, tl.trans(b)))


@triton.jit
def _loop(n_ptr, out_ptr):
    total = 0
    for i in range(0, tl.load(n_ptr)):
        if i % 2 == 1:
            total += i
    tl.store(out_ptr, total)


def values(n, seed):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).bfloat16()


def test_bfloat16_arithmetic_rounds_once_to_nearest_even():
    x, y = values(64, 0), values(64, 1)
    out = torch.empty(5 * 64, dtype=torch.bfloat16)
    _arithmetic[(1,)](x, y, out, 64)
    expected = [x + y, x * y, torch.where(x < y, x, -y), torch.maximum(x, y), x.float() / 3]
    assert torch.equal(out.view(5, 64), torch.stack([e.bfloat16() for e in expected]))


def test_bfloat16_reductions():
    x = values(64, 2)
    out = torch.empty(3)
    _reduce[(1,)](x, out, 64)
    assert out[0] == pytest.approx(x.double().sum().item(), abs=1e-4)
    assert out[1] == x.max().float()
    assert out[2] == pytest.approx(x.double().sum().item(), abs=0.1)


def test_bfloat16_products_accumulate_in_float32():
    a, b = values(256, 3).view(16, 16), values(256, 4).view(16, 16)
    out = torch.empty(16, 16)
    _product[(1,)](a, b, out, 16)
    torch.testing.assert_close(out.double(), a.double() @ b.double().T, atol=1e-5, rtol=1e-6)


def test_loops_over_loaded_bounds():
    out = torch.zeros(1, dtype=torch.int32)
    _loop[(1,)](torch.tensor([6], dtype=torch.int32), out)
    assert out.item() == 1 + 3 + 5


def test_without_the_repairs_bfloat16_is_refused_not_wrong():
    code = (
        "import torch, vitkit\n"
        "q, k, v = torch.randn(1, 4, 3, 1, 16).bfloat16().unbind(2)\n"
        "vitkit.flash_attention(q, k, v, backend='triton')\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode != 0
    assert "this version's interpreter computes wrong bfloat16 results" in done.stderr
