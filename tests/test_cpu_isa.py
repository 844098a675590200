"""Every instruction set of the one CPU library, through the public functions."""

from __future__ import annotations

import ctypes

import pytest
import torch
from native_library import cpu_library
from numerics import DTYPES, assert_parity, double, gradients
from samples import SAMPLES


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512", "amx"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_every_sample(cpu_isa, isa, dtype):
    cpu_isa(isa)
    library = cpu_library()
    library.vitkit_cpu_isa.restype = ctypes.c_char_p
    assert library.vitkit_cpu_isa() == isa.encode()
    for sample in SAMPLES:
        function, tensors = sample.differentiable("cpu", dtype)
        outputs = function(*tensors, backend="cpu")
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        cotangents = [torch.randn_like(o) if o.is_floating_point() else None for o in outputs]

        def run(backend, values, function=function, cotangents=cotangents):
            results, grads = gradients(lambda *v: function(*v, backend=backend), values, cotangents)
            return [*results, *grads]

        exact = run("reference", double(*tensors))
        plain = run("reference", tensors)
        for i, (a, e, x) in enumerate(zip(run("cpu", tensors), plain, exact, strict=True)):
            if not x.is_floating_point():
                assert torch.equal(a, x)
                continue
            assert_parity(f"{sample} on {isa}, tensor {i}", a, e, x, dtype=dtype, terms=64)
