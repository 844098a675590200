"""Every op with a CUDA kernel, forward and backward, on the shapes of ``tests/samples.py`` and on
full tiles of attention: the program ``make gpu`` runs under compute-sanitizer.

    compute-sanitizer --tool racecheck --kernel-name kns=vitkit python tests/sanitized_ops.py

It checks no numbers, the op tests do. Memory is torch's own allocation per tensor
(PYTORCH_NO_CUDA_MEMORY_CACHING=1), so that a read past a tensor's end is one past an allocation.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

if __name__ == "__main__":
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch
from samples import SAMPLES

import vitkit
from vitkit import backends

DTYPES = (torch.float32, torch.bfloat16)
TILES = {"cls_token": (197, 197, 64), "wide_head": (70, 130, 128), "siglip_head": (144, 144, 72)}


def _run(function: Callable[..., Any], tensors: list[torch.Tensor]) -> None:
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
    torch.autograd.grad(outs, leaves, [torch.ones_like(o) for o in outs], allow_unused=True)


def calls(device: str, backend: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, call) of everything whose op has a kernel of ``backend`` here."""
    for dtype in DTYPES:
        for sample in SAMPLES:
            if backends.why_not_device(sample.op, backend, device) is not None:
                continue
            function, tensors = sample.differentiable(device, dtype)

            def call(function=function, tensors=tensors):
                _run(lambda *values: function(*values, backend=backend), tensors)

            yield f"{sample} {dtype}", call
        for why, (nq, nk, head_dim) in TILES.items():
            shapes = ((1, n, 2, head_dim) for n in (nq, nk, nk))
            qkv = [torch.randn(s, device=device).to(dtype) for s in shapes]

            def call(qkv=qkv):
                _run(lambda q, k, v: vitkit.flash_attention(q, k, v, backend=backend), qkv)

            yield f"flash_attention-{why} {dtype}", call


def main(device: str = "cuda", backend: str = "cuda") -> int:
    count, refused, failed = 0, [], []
    for name, call in calls(device, backend):
        try:
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            count += 1
        except Exception as error:  # the others still run
            kept = refused if "cannot run: " in str(error) else failed
            kept.append(f"{name}: {error}")
    print("\n".join([*refused, *failed]))
    print(f"{count} calls ran, {len(failed)} failed, {len(refused)} were refused")
    return 1 if failed or not count else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
