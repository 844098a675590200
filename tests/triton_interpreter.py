"""Repairs of Triton's interpreter that the parity tests rely on. ``install()`` once, before the
first launch.

Every fault was probed in 3.6, 3.7, 3.8 and 3.9; ``test_triton_kernels.py`` checks the repairs.

* bfloat16 (all four): numpy has no such type, so the interpreter stores the bits as ``uint16`` and
  then computes on the bits. ``+ * - < where sum cumsum dot`` and casts to integers give garbage
  without an error, and float32 -> bfloat16 truncates where every GPU rounds to nearest even. Here
  operands are widened to float32 and results rounded once.
* Loop bounds and ``if`` on values (3.6 with numpy >= 2.4): one-element arrays no longer convert to
  ``int`` or ``bool``.
* Speed (all four): a call of one jit function by another re-patches ``triton.language`` (1.6 ms),
  each launch copies every storage onto itself, which also touches all pages of tensors larger than
  memory, and 32-bit sums and products are repeated in 64 bits to look for overflow (a third of the
  time of an attention kernel; an overflow is as visible in the results). What a type or a tensor
  knows of its shape, and the table of numpy's types, are made anew for every operation.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
_NAN = np.uint16(0x7FC0)
_installed = False


def _is_bf16(value: Any) -> bool:
    return isinstance(value, Handle) and value.dtype.scalar == tl.bfloat16


def _widen(value: Any) -> Any:
    if not _is_bf16(value):
        return value
    return Handle((value.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrow(data: np.ndarray) -> Any:
    """float32 -> bfloat16 bits, round to nearest even, NaN stays NaN."""
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return Handle(np.where(np.isnan(data), _NAN, rounded).reshape(data.shape), tl.bfloat16)


def _computed_in_float32(method: Any) -> Any:
    """A builder method that sees float32 in place of bfloat16; a float32 result is rounded back, a
    bool is kept."""

    def call(self: Any, *args: Any) -> Any:
        if not any(map(_is_bf16, args)):
            return method(self, *args)
        result = method(self, *map(_widen, args))
        return _narrow(result.data) if result.data.dtype == np.float32 else result

    return call


def _repair_arithmetic(builder: Any) -> None:
    for name in (
        "binary_op",
        "unary_op",
        "create_fma",
        "create_clampf",
        "create_rsqrt",
        "create_erf",
    ):
        setattr(builder, name, _computed_in_float32(getattr(builder, name)))
    builder.get_bf16 = lambda self, value: _narrow(np.array([value], dtype=np.float32))
    upstream_dot = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, acc: Any, *options: Any) -> Any:
        # float16 too: numpy multiplies mixed types without BLAS, an order of magnitude slower.
        if a.dtype.scalar == tl.float16:
            a, b = (Handle(x.data.astype(np.float32), tl.float32) for x in (a, b))
        return upstream_dot(self, _widen(a), _widen(b), acc, *options)

    builder.create_dot = create_dot


def _repair_casts(builder: Any) -> None:
    upstream_cast, upstream_fp = builder.cast_impl, builder.create_fp_to_fp

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        wide = _widen(source)
        if target.scalar == tl.bfloat16:
            return source if _is_bf16(source) else _narrow(wide.data.astype(np.float32))
        return upstream_cast(self, wide, target) if wide.dtype.scalar != target.scalar else wide

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        others = [t.scalar for t in (source.dtype, target) if t.scalar != tl.bfloat16]
        if len(others) == 2 or (others and others[0].primitive_bitwidth == 8):
            return upstream_fp(self, source, target, rounding)
        return cast_impl(self, source, target)

    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp


def _repair_reductions(kind: Any) -> None:
    upstream = kind.apply_impl

    def wide(self: Any, tensor: Any) -> Any:
        return (
            self.to_tensor(_widen(tensor.handle).data, tl.float32)
            if _is_bf16(tensor.handle)
            else tensor
        )

    def back(self: Any, result: Any, source: Any) -> Any:
        if not _is_bf16(source.handle) or result.dtype != tl.float32:
            return result
        bits = _narrow(result.handle.data).data
        return self.to_tensor(bits if result.shape else bits.reshape(-1)[0], tl.bfloat16)

    def apply_impl(self: Any, inputs: Any) -> Any:
        results = upstream(self, tuple(wide(self, t) for t in inputs))
        if isinstance(results, (tuple, list)):
            return type(results)([back(self, r, t) for r, t in zip(results, inputs, strict=True)])
        return back(self, results, inputs[0])

    kind.apply_impl = apply_impl


def _repair_scalars() -> None:
    upstream = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        upstream(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))
        scope.set_attr(
            tensor,
            "__bool__",
            lambda self: (
                bool(self.handle.data.reshape(-1)[0]) if self.handle.data.size == 1 else True
            ),
        )

    interpreter._patch_lang_tensor = patch_lang_tensor


def _skip_needless_work() -> None:
    upstream_restore = interpreter.GridExecutor._restore_args_dev

    modules: dict[Any, list[Any]] = {}

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn not in modules:
            modules[self.fn] = [m for m in self.fn.__globals__.values() if m is tl or m is tl.core]
        if any(tl.core.is_builtin(module.load) for module in modules[self.fn]):
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    def restore(self: Any, args: Any, args_host: Any, kwargs: Any, kwargs_host: Any) -> None:
        tensors = [t for t in (*args, *kwargs.values()) if hasattr(t, "is_cuda")]
        if any(t.is_cuda for t in tensors):
            upstream_restore(self, args, args_host, kwargs, kwargs_host)

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter.InterpretedFunction.__call__ = call
    interpreter.GridExecutor._restore_args_dev = restore


def _remember_types() -> None:
    tensor, block_type = tl.core.tensor, tl.core.block_type
    new_tensor, new_block, np_dtype = (
        tensor.__init__, block_type.__init__, interpreter._get_np_dtype,
    )  # fmt: skip
    tensors: dict[Any, dict[str, Any]] = {}
    blocks: dict[Any, dict[str, Any]] = {}
    np_dtypes: dict[str, np.dtype] = {}

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        shape = tuple(type.shape) if type.is_block() else ()
        if shape not in tensors:
            new_tensor(self, handle, type)
            own = ("handle", "type", "dtype")
            tensors[shape] = {k: v for k, v in vars(self).items() if k not in own}
        else:
            vars(self).update(tensors[shape], handle=handle, type=type, dtype=type.scalar)

    def init_block(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *shape)
        if not all(type(size) is int for size in key[1:]):
            new_block(self, element_ty, shape)
        elif key not in blocks:
            new_block(self, element_ty, shape)
            blocks[key] = {k: v for k, v in vars(self).items() if k != "element_ty"}
        else:
            vars(self).update(blocks[key], element_ty=element_ty)

    def get_np_dtype(dtype: Any) -> np.dtype:
        if dtype.name not in np_dtypes:
            np_dtypes[dtype.name] = np_dtype(dtype)
        return np_dtypes[dtype.name]

    tensor.__init__, block_type.__init__ = init_tensor, init_block
    interpreter._get_np_dtype = get_np_dtype


def install() -> None:
    """Patches ``triton.runtime.interpreter`` in this process; calling it again does nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    _repair_arithmetic(interpreter.InterpreterBuilder)
    _repair_casts(interpreter.InterpreterBuilder)
    _repair_reductions(interpreter.ReduceOps)
    _repair_reductions(interpreter.ScanOps)
    _repair_scalars()
    _skip_needless_work()
    _remember_types()
