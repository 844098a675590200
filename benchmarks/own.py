"""A shape of the user's own, from the command line, as a case and as a call to explain.

One row of ``SHAPES`` per op: the option that gives the sizes, and the function that reads it. The
cases are those of ``cases/<op>.py`` with this shape in place of the models'.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .harness import Case

NAME = "your shape"
Call = tuple[tuple[Any, ...], dict[str, Any]]


class BadShape(SystemExit):
    """An option that is no shape of the op; ends the program with the reason."""

    def __init__(self, rule: str) -> None:
        super().__init__(f"vitkit bench: {rule}")


@dataclass(frozen=True)
class Own:
    """What one op makes of the options: its cases, and the call that ``explain`` looks at."""

    option: str
    cases: Callable[[Any, argparse.Namespace, torch.dtype], Sequence[Case]]
    call: Callable[[argparse.Namespace, torch.dtype], Call]


def sizes(text: str, count: int | None, option: str) -> tuple[int, ...]:
    """``8x197x12x64`` as integers; ``count`` of them, any number of them with None."""
    parts = text.lower().split("x")
    wrong = not all(p.isdigit() and int(p) > 0 for p in parts)
    if wrong or (count is not None and len(parts) != count):
        how_many = "" if count is None else f"{count} "
        raise BadShape(f"--{option} must be {how_many}sizes like 8x197x12x64, got {text!r}")
    return tuple(int(p) for p in parts)


def _empty(o: argparse.Namespace, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=o.device)


# ---- one pair of functions per op ----


def _flash_sizes(o: argparse.Namespace) -> tuple[int, int, int, int, int]:
    b, nq, h, d = sizes(o.q, 4, "q")
    kb, nk, kh, kd = sizes(o.k, 4, "k") if o.k else (b, nq, h, d)
    if (kb, kh, kd) != (b, h, d):
        raise BadShape("--k must have the batch, heads and head dim of --q")
    return b, nq, nk, h, d


def _flash_cases(module: Any, o: argparse.Namespace, dtype: torch.dtype) -> list[Case]:
    return [
        module.make_case(NAME, *_flash_sizes(o), o.bias, dtype, backward, o.device)
        for backward in (False, True)
    ]


def _flash_call(o: argparse.Namespace, dtype: torch.dtype) -> Call:
    b, nq, nk, h, d = _flash_sizes(o)
    shapes = {"none": None, "heads": (1, h, nq, nk), "batch": (b, h, nq, nk), "keys": (b, 1, 1, nk)}
    shape = shapes[o.bias]
    bias = None if shape is None else _empty(o, dtype, *shape)
    k = _empty(o, dtype, b, nk, h, d)
    return (_empty(o, dtype, b, nq, h, d), k, k), {"bias": bias}


def _group_norm_cases(module: Any, o: argparse.Namespace, dtype: torch.dtype) -> list[Case]:
    shape = sizes(o.shape, 4, "shape")
    if shape[1] % o.groups:
        raise BadShape(f"--groups must divide the {shape[1]} channels, got {o.groups}")
    return [
        module.make_case(NAME, shape, o.groups, dtype, o.layout == "nhwc", backward, o.device)
        for backward in (False, True)
    ]


def _group_norm_call(o: argparse.Namespace, dtype: torch.dtype) -> Call:
    return (_empty(o, dtype, *sizes(o.shape, 4, "shape")), o.groups), {}


def _window_cases(module: Any, o: argparse.Namespace, dtype: torch.dtype) -> list[Case]:
    b, height, width, h, d = sizes(o.map, 5, "map")
    if not 0 <= o.shift < o.window:
        raise BadShape(f"--shift must lie in 0..{o.window - 1}, got {o.shift}")
    none = (None,) * 4
    row = module.Shape(NAME, b, height, width, h, d, o.window, o.shift, o.cosine, none, ("own",))
    return [module.make_case(row, dtype, backward, o.device) for backward in (False, True)]


def _window_call(o: argparse.Namespace, dtype: torch.dtype) -> Call:
    b, height, width, h, d = sizes(o.map, 5, "map")
    table = _empty(o, dtype, (2 * o.window - 1) ** 2, h)
    logit_scale = _empty(o, dtype, h) if o.cosine else None
    options = {"window_size": o.window, "shift_size": o.shift, "bias_table": table}
    return (_empty(o, dtype, b, height, width, 3, h, d),), options | {"logit_scale": logit_scale}


def _dilated_sizes(o: argparse.Namespace) -> tuple[int, int, int, int]:
    found = (1, o.tokens, o.heads, o.head_dim)
    if min(found) < 1:
        raise BadShape("--tokens, --heads and --head-dim must be at least 1")
    return found


def _dilated_cases(module: Any, o: argparse.Namespace, dtype: torch.dtype) -> list[Case]:
    modes = (True,) if o.backward else (False,)  # long ones refuse gradients
    return [module.make_case(NAME, *_dilated_sizes(o), dtype, mode, o.device) for mode in modes]


def _dilated_call(o: argparse.Namespace, dtype: torch.dtype) -> Call:
    from .cases.dilated_attention import LENGTHS, RATIOS

    q = _empty(o, dtype, *_dilated_sizes(o))
    return (q, q, q), {"segment_lengths": LENGTHS, "dilation_ratios": RATIOS}


def _patch_shapes(o: argparse.Namespace) -> tuple[tuple[int, ...], tuple[int, ...]]:
    images = sizes(o.images, None, "images")
    if len(images) not in (4, 5):
        raise BadShape(f"--images must be BxCxHxW or BxCxTxHxW, got {o.images!r}")
    patch = sizes(o.patch, None, "patch")
    patch = patch * (len(images) - 2) if len(patch) == 1 else patch
    if len(patch) != len(images) - 2 or any(i % p for i, p in zip(images[2:], patch, strict=False)):
        raise BadShape(f"--patch must divide the images' sizes, got {o.patch!r} for {o.images}")
    return images, (o.embed, images[1], *patch)


def _patch_cases(module: Any, o: argparse.Namespace, dtype: torch.dtype) -> list[Case]:
    images, weight = _patch_shapes(o)
    if o.uint8 and images[1] != len(module.MEAN):
        raise BadShape(f"--uint8 must go with {len(module.MEAN)} channels, got {images[1]}")
    row = module.Shape(NAME, images, weight, 0, False, o.uint8, (None, None), ("own",))
    return [module.make_case(row, dtype, backward, o.device) for backward in (False, True)]


def _patch_call(o: argparse.Namespace, dtype: torch.dtype) -> Call:
    images, weight = _patch_shapes(o)
    pixels = torch.uint8 if o.uint8 else dtype
    return (_empty(o, pixels, *images), _empty(o, dtype, *weight)), {}


def _layer_norm_cases(module: Any, o: argparse.Namespace, dtype: torch.dtype) -> list[Case]:
    shape = sizes(o.shape, 3, "shape")
    return [
        module.make_case(NAME, shape, o.modulation, dtype, backward, o.device)
        for backward in (False, True)
    ]


def _layer_norm_call(o: argparse.Namespace, dtype: torch.dtype) -> Call:
    shape = sizes(o.shape, 3, "shape")
    if o.modulation == "none":
        weight = _empty(o, dtype, shape[-1])
        return (_empty(o, dtype, *shape),), {"weight": weight, "bias": weight}
    small = _empty(o, dtype, *(shape if o.modulation == "token" else (shape[0], shape[-1])))
    return (_empty(o, dtype, *shape),), {"shift": small, "scale": small}


def _gated_residual_cases(module: Any, o: argparse.Namespace, dtype: torch.dtype) -> list[Case]:
    shape = sizes(o.shape, 3, "shape")
    gate = shape if o.modulation == "token" else (shape[0], shape[-1])
    return [
        module.make_case(NAME, shape, gate, dtype, backward, o.device) for backward in (False, True)
    ]


def _gated_residual_call(o: argparse.Namespace, dtype: torch.dtype) -> Call:
    shape = sizes(o.shape, 3, "shape")
    gate = shape if o.modulation == "token" else (shape[0], shape[-1])
    x = _empty(o, dtype, *shape)
    return (x, x, _empty(o, dtype, *gate)), {}


def _rows(row: Callable[[tuple[int, ...]], tuple[Any, ...]], count: int | None) -> Any:
    """Cases of an elementwise op from one row of its own table."""

    def cases(module: Any, o: argparse.Namespace, dtype: torch.dtype) -> list[Case]:
        found = module.cases(o.device, [row(sizes(o.shape, count, "shape"))])
        return [c for c in found if c.dtype == dtype]

    return cases


def _one_tensor(o: argparse.Namespace, dtype: torch.dtype) -> Call:
    return (_empty(o, dtype, *sizes(o.shape, None, "shape")),), {}


def _even(shape: tuple[int, ...]) -> int:
    if shape[-1] % 2:
        raise BadShape(f"--shape must end in an even size, value and gate, got {shape[-1]}")
    return shape[-1] // 2


def _rope_call(o: argparse.Namespace, dtype: torch.dtype) -> Call:
    b, n, h, d = sizes(o.shape, 4, "shape")
    q = _empty(o, dtype, b, n, h, d)
    angles = torch.empty(n, d, device=o.device)
    return (q, q, angles, angles), {"layout": "half"}


OPS = {
    "flash_attention": Own("q", _flash_cases, _flash_call),
    "group_norm_silu": Own("shape", _group_norm_cases, _group_norm_call),
    "window_attention": Own("map", _window_cases, _window_call),
    "dilated_attention": Own("tokens", _dilated_cases, _dilated_call),
    "patch_embed": Own("images", _patch_cases, _patch_call),
    "layer_norm_modulate": Own("shape", _layer_norm_cases, _layer_norm_call),
    "gated_residual": Own("shape", _gated_residual_cases, _gated_residual_call),
    "swiglu": Own("shape", _rows(lambda s: (NAME, s[0], s[1], _even(s), True, ("own",)), 3),
                  _one_tensor),
    "geglu": Own("shape", _rows(lambda s: (NAME, s[0], s[1], _even(s), ("own",)), 3), _one_tensor),
    "gelu": Own("shape", _rows(lambda s: (NAME, s, "none", False, ("own",)), None), _one_tensor),
    "rope_2d": Own("shape", _rows(lambda s: (NAME, *s, s[1], "half", ("own",)), 4), _rope_call),
}  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("your own shape, of the one op that is named")
    group.add_argument("--q", help="flash_attention: BxNxHxD")
    group.add_argument("--k", help="flash_attention: BxNxHxD of k and v, that of q without it")
    group.add_argument("--bias", default="none", choices=("none", "heads", "batch", "keys"))
    group.add_argument("--map", help="window_attention: BxHeightxWidthxHeadsxD")
    group.add_argument("--window", type=int, default=7)
    group.add_argument("--shift", type=int, default=0)
    group.add_argument("--cosine", action="store_true", help="window_attention of Swin V2")
    group.add_argument("--tokens", type=int, help="dilated_attention: N")
    group.add_argument("--heads", type=int, default=16, help="dilated_attention: H")
    group.add_argument("--head-dim", type=int, default=48, help="dilated_attention: D")
    group.add_argument("--images", help="patch_embed: BxCxHxW or BxCxTxHxW")
    group.add_argument("--patch", default="16", help="patch_embed: 16 or 2x16x16")
    group.add_argument("--embed", type=int, default=768, help="patch_embed: width of a token")
    group.add_argument("--uint8", action="store_true", help="patch_embed: images are bytes")
    group.add_argument("--shape", help="every other op: sizes of its input")
    group.add_argument("--groups", type=int, default=32, help="group_norm_silu")
    group.add_argument("--layout", choices=("nchw", "nhwc"), default="nchw")
    group.add_argument("--modulation", choices=("none", "sample", "token"), default="sample")
    group.add_argument("--backward", action="store_true", help="forward+backward")


def chosen(o: argparse.Namespace) -> str | None:
    """The op whose shape the options give, None where they give none."""
    given = sorted({own.option for own in OPS.values() if getattr(o, own.option) is not None})
    if not given:
        return None
    if len(given) > 1:
        raise BadShape(f"--{' and --'.join(given)} must not go together")
    fitting = [op for op, own in OPS.items() if own.option == given[0]]
    named = [op for op in o.ops if op in fitting]
    if len(o.ops) > 1 or (o.ops and not named):
        raise BadShape(f"--{given[0]} must go with one op of {', '.join(fitting)}")
    return named[0] if named else fitting[0]


def case(o: argparse.Namespace, op: str, dtype: torch.dtype) -> Case:
    module = importlib.import_module(f".cases.{op}", __package__)
    mode = "forward+backward" if o.backward else "forward"
    return next(c for c in OPS[op].cases(module, o, dtype) if c.mode == mode)


def explanation(o: argparse.Namespace, op: str, dtype: torch.dtype) -> str:
    """Which backend the case takes and why."""
    import vitkit

    args, kwargs = OPS[op].call(o, dtype)
    return str(vitkit.explain(op, *args, **kwargs, backend=o.backend))
