"""Registration of vitkit's operators with PyTorch, and loading of the native libraries.

Every kernel operator is defined here once: ``vitkit::<op>_fwd`` and ``vitkit::<op>_bwd`` are
implemented in C++ for the CPU and CUDA dispatch keys, their ``.triton`` overloads in Python. Both
overloads share one schema and one fake.
Nothing is loaded or probed at import: the first call that needs a library loads it.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

LIB = torch.library.Library("vitkit", "DEF")
NATIVE_OF_DEVICE = {"cpu": "_C_cpu", "cuda": "_C_cuda"}

_flops: dict[str, Callable[..., int]] = {}
_native_errors: dict[str, str | None] = {}
_triton_errors: dict[str, str | None] = {}


def _constant_when_traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """What ``torch.compiler.assume_constant_result`` does, without importing torch._dynamo for it
    (over a second at ``import vitkit``)."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def native_path(name: str) -> Path | None:
    """The file of the native library ``name`` (``_C_cpu`` or ``_C_cuda``), None if it was not
    built."""
    folder = Path(__file__).parent
    candidates = (folder / f"{name}{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.exists()), None)


@_constant_when_traced
def native_error(name: str) -> str | None:
    """Loads the native library ``name`` once; None if it is loaded, otherwise the reason it is
    not."""
    if name not in _native_errors:
        path = native_path(name)
        if path is None:
            _native_errors[name] = f"{name} is not built (run `vitkit doctor`)"
        else:
            try:
                torch.ops.load_library(str(path))
                _native_errors[name] = None
            except OSError as error:
                _native_errors[name] = f"{name} could not be loaded: {error}"
    return _native_errors[name]


def cpu_isa() -> str | None:
    """The instruction set the native CPU kernels use here, None if they are not built."""
    path = native_path("_C_cpu")
    if path is None or native_error("_C_cpu"):
        return None
    function = ctypes.CDLL(str(path)).vitkit_cpu_isa
    function.restype = ctypes.c_char_p
    return function().decode()  # type: ignore[no-any-return]


@_constant_when_traced
def native_kernel_error(op: str, device_type: str) -> str | None:
    """None if the native forward kernel of ``op`` can be called on ``device_type``, otherwise the
    reason it cannot."""
    library = NATIVE_OF_DEVICE[device_type]
    error = native_error(library)
    if error is None and not _has_kernel(f"{op}_fwd", device_type):
        error = f"there is no C++ {op} kernel for {device_type} in {library}"
    if error is None and device_type == "cuda" and torch.cuda.is_available():
        error = _gpu_error()
    return error


def _gpu_error() -> str | None:
    """The reason the CUDA kernels cannot run on the current GPU, None if they can."""
    if importlib.util.find_spec("vitkit._runtime") is None:
        return None
    archs = importlib.import_module("vitkit._runtime").build_facts()["cuda_archs"]
    capability = torch.cuda.get_device_capability()
    if any(arch_runs_on(arch, capability) for arch in archs):
        return None
    return (
        f"its kernels are built for {', '.join(archs)}, this GPU is sm_{capability[0]}"
        f"{capability[1]} (build with TORCH_CUDA_ARCH_LIST)"
    )


def kernel_attributes() -> list[dict[str, Any]]:
    """What the compiler made of the CUDA kernels of this build; empty without them."""
    if importlib.util.find_spec("vitkit._runtime") is None:
        return []
    return importlib.import_module("vitkit._runtime").kernel_attributes()


def arch_runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``arch`` ("sm_80", "sm_90a") runs on a GPU: one of the same major version
    that is no older, and the very same one where the name ends in a letter."""
    number = arch.removeprefix("sm_")
    digits = number.rstrip("af")
    major, minor = int(digits[:-1]), int(digits[-1])
    exact = digits != number
    return major == capability[0] and (minor == capability[1] if exact else minor <= capability[1])


def _has_kernel(name: str, device_type: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"vitkit::{name}", device_type.upper())


@_constant_when_traced
def triton_error(device_type: str) -> str | None:
    """None if Triton kernels can run on ``device_type`` tensors, otherwise the reason they
    cannot."""
    if device_type not in _triton_errors:
        if importlib.util.find_spec("triton") is None:
            error = "triton is not installed (pip install triton)"
        elif device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            error = (
                "triton runs on CPU tensors only in its interpreter"
                " (set TRITON_INTERPRET=1 before the first import)"
            )
        elif device_type == "meta":
            error = "triton cannot run on meta tensors"
        else:
            error = None
        _triton_errors[device_type] = error
    return _triton_errors[device_type]


def _same_device(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """``fake``, refusing mixed devices: one meta tensor among real ones would dispatch here."""

    def checked(*args: Any) -> Any:
        devices = {a.device for a in args if isinstance(a, torch.Tensor)}
        if len(devices) > 1:
            raise ValueError(f"vitkit::{name}: tensors must be on one device, got {devices}")
        return fake(*args)

    return checked


def _load_then_redispatch(name: str) -> Callable[..., Any]:
    """The kernel seen by a device whose native library is not loaded yet: loads it and calls the
    operator again.

    Programs saved by ``torch.export`` call the operator directly, without vitkit's public function
    before it.
    """

    def kernel(*args: Any) -> Any:
        device = next(a.device.type for a in args if isinstance(a, torch.Tensor))
        library = NATIVE_OF_DEVICE.get(device)
        error = (
            native_error(library) if library else f"there is no native kernel for {device} tensors"
        )
        if error:
            raise NotImplementedError(f"vitkit::{name}: {error}")
        if not _has_kernel(name, device):
            raise NotImplementedError(
                f"vitkit::{name}: there is no C++ kernel for {device} in {library}"
            )
        return getattr(torch.ops.vitkit, name).default(*args)

    return kernel


def define(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    triton: Callable[..., Any] | None,
    flops: Callable[..., int],
    any_strides: bool = False,
) -> None:
    """Defines ``vitkit::name`` (native) and, with a launcher, ``vitkit::name.triton``; one schema,
    one fake and one FLOP formula.

    Args:
        name: operator name without namespace.
        schema: ``"(Tensor x, ...) -> ..."``; the C++ files do not repeat it.
        fake: output shapes, dtypes and strides for FakeTensor and meta tensors.
        triton: launcher; it imports its Triton kernel when it is called, not before. None without
            one.
        flops: FLOPs from the shapes of the arguments, for ``torch.utils.flop_counter``.
        any_strides: the operator takes every tensor as it lies. torch.compile then hands it what
            the operator before it made; else it restores the strides that were traced, which
            between convolutions (they want channels_last) means two copies.
    """
    tags = [torch.Tag.pt2_compliant_tag]
    if any_strides:
        tags.append(torch.Tag.flexible_layout)
    for overload in ("",) if triton is None else ("", "triton"):
        qualified = f"{name}.{overload}" if overload else name
        LIB.define(qualified + schema, tags=tuple(tags))
        torch.library.register_fake(f"vitkit::{qualified}", _same_device(name, fake), lib=LIB)
    LIB.impl(name, _load_then_redispatch(name), "CompositeExplicitAutograd")
    if triton is not None:
        LIB.impl(f"{name}.triton", triton, "CompositeExplicitAutograd")
    _flops[name] = flops


@_constant_when_traced
def register_flops() -> None:
    """Hands the FLOP formulas to ``torch.utils.flop_counter`` once somebody uses it: importing it
    would import Triton. The ops ask on every call, which costs a set lookup."""
    if _flops and "torch.utils.flop_counter" in sys.modules:
        from torch.utils import flop_counter
        from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

        while _flops:
            name, formula = _flops.popitem()
            flop_counter.register_flop_formula(getattr(torch.ops.vitkit, name))(formula)
        # A counter copies the formulas when it is made, and this may be the first call within one.
        for mode in _get_current_dispatch_mode_stack():
            known = getattr(getattr(mode, "counter", None), "flop_registry", None)
            if known is not None:
                known |= {k: v for k, v in flop_counter.flop_registry.items() if k not in known}


def is_plain_cpu_call(x: torch.Tensor) -> bool:
    """Whether a call on x needs nothing but its operator: no tracing, no autocast, CPU.

    Such calls go straight to the C++ operator, whose own checks cost nanoseconds where those in
    Python cost microseconds. If it refuses, the Python checks run and say why.
    """
    if torch.compiler.is_compiling() or not x.is_cpu or torch._C._is_any_autocast_enabled():
        return False
    if in_forward_mode():
        return False
    register_flops()
    return True


@_constant_when_traced
def in_forward_mode() -> bool:
    """Whether forward-mode derivatives are being computed (``torch.func.jvp``, ``jacfwd``,
    ``hessian``, dual tensors). Operators have none, and would give a zero in silence: every op is
    its reference then."""
    return torch.autograd.forward_ad._current_level >= 0


def differentiated(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd wants to hear of a call on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def layout_key(*values: Any) -> Any:
    """All that validation and backend choice depend on; None while tracing, and for arguments of
    types that no check will let pass."""
    if torch.compiler.is_compiling() or in_forward_mode():
        return None
    key = tuple(
        (v.shape, v.stride(), v.dtype, v.device) if isinstance(v, torch.Tensor) else v
        for v in values
    )
    return key if all(v.__hash__ is not None for v in values) else None


class Memo:
    """Remembers what the checks found for calls of known layout, so that they cost one dictionary
    lookup from the second call on. Bounded: inputs of ever new sizes must not grow it for ever."""

    def __init__(self, limit: int = 4096) -> None:
        self._plans: dict[Any, Any] = {}
        self._limit = limit

    def get(self, key: Any) -> Any:
        return None if key is None else self._plans.get(key)

    def put(self, key: Any, plan: Any) -> None:
        if key is None:
            return
        if len(self._plans) >= self._limit:
            self._plans.clear()
        self._plans[key] = plan


def differentiable_backward(
    reference: Callable[..., Sequence[torch.Tensor]],
    inputs: Sequence[torch.Tensor | None],
    grads: Sequence[torch.Tensor | None],
    needed: Sequence[bool],
) -> list[torch.Tensor | None]:
    """Gradients through the plain PyTorch reference, themselves differentiable.

    The backward of every op takes this path when gradients of gradients are asked for
    (``create_graph=True``).

    Args:
        reference: called with ``inputs``, returns the outputs.
        grads: one per output, None for an output without gradient.
        needed: one per input.
    """
    with torch.enable_grad():
        # A view of each input: an input passed twice (q is k) still gets two separate gradients.
        aliases = [
            t.view_as(t) if t is not None and n else t for t, n in zip(inputs, needed, strict=True)
        ]
        outputs = [(o, g) for o, g in zip(reference(*aliases), grads, strict=True) if g is not None]
        wanted = [t for t, n in zip(aliases, needed, strict=True) if t is not None and n]
        if not outputs or not wanted:
            return [None] * len(inputs)
        results = iter(
            torch.autograd.grad(
                [o for o, _ in outputs],
                wanted,
                [g for _, g in outputs],
                create_graph=True,
                allow_unused=True,
            )
        )
    return [
        next(results) if t is not None and n else None for t, n in zip(aliases, needed, strict=True)
    ]


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Casts as autocast casts the inputs of scaled_dot_product_attention: float64 stays."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t.to(dtype)
        if isinstance(t, torch.Tensor) and t.is_floating_point() and t.dtype != torch.float64
        else t
        for t in tensors
    )


def distinct(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """The same tensors, a view in place of each repeated one: Dynamo cannot trace an
    autograd.Function that is given one tensor twice (q is k in self-attention without projections,
    one cu_seqlens for both sides)."""
    seen: list[torch.Tensor] = []
    result: list[torch.Tensor | None] = []
    for t in tensors:
        if t is not None and any(t is other for other in seen):
            t = t.view_as(t)
        elif t is not None:
            seen.append(t)
        result.append(t)
    return tuple(result)


def rows_are_readable(t: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether kernels read the modulation t of x as it is: dense rows one stride apart and, where
    it has a value per token, in float32 or the dtype of x."""
    dense = t.shape[-1] == 1 or t.stride(-1) == 1
    outer = [(t.shape[d], t.stride(d)) for d in range(t.dim() - 1) if t.shape[d] != 1]
    regular = all(a[1] == b[0] * b[1] for a, b in itertools.pairwise(outer))
    return dense and regular and (t.dim() < x.dim() or t.dtype in (x.dtype, torch.float32))


def readable_rows(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """t as :func:`rows_are_readable` wants it."""
    return (t if t.dtype in (x.dtype, torch.float32) else t.float()).contiguous()


def apply(function: type, *args: Any) -> Any:
    """``function.apply(*args)`` of an ``autograd.Function`` that keeps ``forward`` and
    ``setup_context`` apart, as functorch's transforms and Dynamo want it.

    Outside of those torch binds the arguments of every such call to the signature of ``forward``,
    which costs more than a small kernel; a twin that does both at once is spared that.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)  # type: ignore[attr-defined]
    twin = _eager_twins.get(function)
    if twin is None:
        twin = _eager_twins[function] = _eager_twin(function)
    return twin.apply(*args)


_eager_twins: dict[type, Any] = {}


def _eager_twin(function: Any) -> Any:
    def forward(ctx: Any, *args: Any) -> Any:
        output = function.forward(*args)
        function.setup_context(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    return type(function.__name__, (torch.autograd.Function,), methods)


def vmap_by_loop(
    apply: Callable[..., Any], info: Any, in_dims: Sequence[int | None], args: Sequence[Any]
) -> Any:
    """The vmap rule of every op: one call per element of the mapped dimension, results stacked at
    dimension 0."""
    if info.batch_size == 0:
        raise ValueError("vmap over an empty dimension is not supported by vitkit ops")
    slices = []
    for i in range(info.batch_size):
        slices.append(
            apply(
                *(
                    a.select(d, i) if isinstance(a, torch.Tensor) and d is not None else a
                    for a, d in zip(args, in_dims, strict=True)
                )
            )
        )
    if isinstance(slices[0], tuple):
        stacked = tuple(torch.stack(parts) for parts in zip(*slices, strict=True))
        return stacked, (0,) * len(stacked)
    return torch.stack(slices), 0
