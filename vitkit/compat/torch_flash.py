"""vitkit as an implementation of torch's own flash attention.

    import torch, vitkit.compat.torch_flash as flash
    flash.register()
    torch.nn.attention.activate_flash_attention_impl("vitkit")

From then on ``F.scaled_dot_product_attention`` runs on vitkit's kernels wherever torch would choose
its flash kernel, forward and backward, on CPUs and GPUs, in every model of the process.
``torch.nn.attention.restore_flash_attention_impl()`` takes it back. Calls without a kernel of ours
(head dims that are no multiple of 8, float64, dropout) go to torch's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.attention

from vitkit import backends
from vitkit.ops.flash_attention import why_not

IMPLEMENTATION = "vitkit"
CPU = "_scaled_dot_product_flash_attention_for_cpu"
CUDA = "_scaled_dot_product_flash_attention"


def register() -> None:
    """Makes the name known to torch; activating it is the user's choice.

    Raises:
        RuntimeError: this torch has no registry of flash attention implementations.
    """
    found = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if found is None:
        raise RuntimeError(
            f"vitkit: torch {torch.__version__} has no register_flash_attention_impl"
        )
    found(IMPLEMENTATION, register_fn=_activate)


class _Handle:
    """Keeps the overrides alive; torch calls ``remove``."""

    def __init__(self, libraries: list[torch.library.Library]) -> None:
        self._libraries = libraries

    def remove(self) -> None:
        for library in self._libraries:
            library._destroy()
        self._libraries = []


def _activate() -> _Handle:
    libraries = []
    for key, name in (("CPU", CPU), ("CUDA", CUDA)):
        if key == "CUDA" and not torch.cuda.is_available():
            continue
        library = torch.library.Library("aten", "IMPL")
        forward, backward = _Forward(key, name), _Backward(key, f"{name}_backward")
        library.impl(name, forward, key, allow_override=True)
        library.impl(backward.name, backward, key, allow_override=True)
        libraries.append(library)
    return _Handle(libraries)


class _Override:
    """One operator of aten: ours where a kernel can run, torch's where none can."""

    def __init__(self, key: str, name: str) -> None:
        self.key, self.name = key, name
        self._torch = torch.library.get_kernel(f"aten::{name}", key)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, self.key))
        return self._torch.call_boxed(keys, *args, **kwargs)

    def backend(self, q: torch.Tensor, tensors: list[torch.Tensor], dropout: float) -> str | None:
        """The backend whose kernel runs the call, None without one."""
        if dropout or any(t.stride(-1) != 1 for t in tensors if t.dim() == 4):
            return None
        return backends.first_kernel(
            q.device.type, lambda candidate: why_not(candidate, tensors, q.shape[-1])
        )


def _operator(direction: str, backend: str) -> Any:
    packet = getattr(torch.ops.vitkit, f"flash_attention_{direction}")
    return packet.triton if backend == "triton" else packet.default


class _Forward(_Override):
    def __call__(self, q, k, v, dropout_p=0.0, is_causal=False, *rest, attn_mask=None, scale=None):
        tensors = [q, k, v, *([] if attn_mask is None else [attn_mask])]
        backend = self.backend(q, tensors, dropout_p) if v.shape == k.shape else None
        if backend is None:
            options = {"scale": scale} | ({"attn_mask": attn_mask} if self.key == "CPU" else {})
            return self.original(q, k, v, dropout_p, is_causal, *rest, **options)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        out, lse = _operator("fwd", backend)(
            *(t.transpose(1, 2) for t in (q, k, v)), attn_mask, None, None, is_causal, scale
        )
        out = out.transpose(1, 2)
        if self.key == "CPU":
            return out, lse
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        empty = torch.empty(0, dtype=q.dtype, device=q.device)
        return out, lse, None, None, q.shape[2], k.shape[2], state, state[:0], empty


class _Backward(_Override):
    def __call__(self, grad, q, k, v, out, lse, *rest, attn_mask=None, scale=None):
        # CPU: dropout_p, is_causal. CUDA: four about packing, dropout_p, is_causal, two of state.
        dropout_p, is_causal = rest[:2] if self.key == "CPU" else rest[4:6]
        tensors = [q, k, v, *([] if attn_mask is None else [attn_mask])]
        backend = self.backend(q, tensors, dropout_p) if v.shape == k.shape else None
        if backend is None:
            options = {"scale": scale} | ({"attn_mask": attn_mask} if self.key == "CPU" else {})
            return self.original(grad, q, k, v, out, lse, *rest, **options)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        grad, q, k, v, out = (t.transpose(1, 2) for t in (grad, q, k, v, out))
        found = _operator("bwd", backend)(
            grad, None, q, k, v, out, lse, attn_mask, None, None, is_causal, scale, False
        )
        return tuple(t.transpose(1, 2) for t in found[:3])
