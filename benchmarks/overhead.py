"""What calling an op costs before its kernel does any work, on CPU tensors of one element.

The yardstick is a plain ``Library.define`` / ``impl`` operator of the same schema that allocates
the same outputs. Ours is the public function, with its checks and its choice of backend.
"""

from __future__ import annotations

import statistics
import timeit

import torch
import torch.nn.functional as F

import vitkit

_lib = torch.library.Library("vitkit_bench", "DEF")
_lib.define(
    "plain(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? cu_q, Tensor? cu_k,"
    " bool causal, float scale) -> (Tensor, Tensor)"
)


def _plain(q, k, v, bias, cu_q, cu_k, causal, scale):
    b, n, h, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((b, h, n), dtype=torch.float32)


_lib.impl("plain", _plain, "CPU")


def measure(repeats: int = 15, number: int = 5000) -> dict[str, float]:
    """Median microseconds per call, the functions taking turns, on one thread."""
    q, k, v = torch.randn(1, 1, 3, 1, 8).unbind(2)
    plain = torch.ops.vitkit_bench.plain.default
    operator = torch.ops.vitkit.flash_attention_fwd.default
    calls = {
        "plain define/impl operator": lambda: plain(q, k, v, None, None, None, False, 1.0),
        "vitkit operator": lambda: operator(q, k, v, None, None, None, False, 1.0),
        "vitkit.flash_attention": lambda: vitkit.flash_attention(q, k, v),
        "F.scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(q, k, v),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            calls["vitkit.flash_attention"]()
            samples: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(repeats):
                for name, call in calls.items():
                    samples[name].append(timeit.timeit(call, number=number) / number * 1e6)
    finally:
        torch.set_num_threads(threads)
    return {name: statistics.median(values) for name, values in samples.items()}
