"""The CUDA patch_embed kernels, run on the CPU by the emulator in tests/emulator.

Emulated, not yet confirmed on hardware: index arithmetic, fragments, masks and pipelining of the
very files nvcc compiles. Memory ordering, the compiler and speed need a GPU (``make gpu``).
"""

from __future__ import annotations

import ctypes
import math
import mmap

import pytest
import torch
from emulation import assert_order_changes_nothing, emulated, load_kernels
from numerics import DTYPES, assert_parity, double, gradients
from test_patch_embed import MEAN, NAMES, STD, eager, make

from vitkit.ops.patch_embed import reference

P, I64, INT, F32, BOOL = (
    ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float, ctypes.c_bool,
)  # fmt: skip
SMALL = ("bias", "norm_weight", "norm_bias", "position", "prefix")


class Geometry(ctypes.Structure):
    _fields_ = [
        *((n, I64) for n in ("image", "channel", "frame", "row", "column")),
        *((n, INT) for n in ("frames", "rows", "columns", "channels")),
        *((f"patch_{n}", INT) for n in ("frames", "rows", "columns")),
        *((n, INT) for n in ("grid_rows", "grid_columns", "patches", "tokens")),
        ("pixel_order", BOOL),
    ]


class RowTensor(ctypes.Structure):
    _fields_ = [("data", P), ("element", INT), ("stride", I64)]


class SmallGradient(ctypes.Structure):
    _fields_ = [("data", P), ("element", INT)]


class Call(ctypes.Structure):
    _fields_ = [
        ("g", Geometry),
        ("images", INT),
        ("type", INT),
        ("bytes", BOOL),
        ("pixels", P),
        ("weight", P),
        ("embed", INT),
        *((n, RowTensor) for n in SMALL),
        ("prefixes", INT),
        ("position_of_prefix", BOOL),
        ("eps", F32),
        ("mean", P),
        ("std", P),
        ("places", P),
        ("pixel_count", I64),
        ("position_rows", INT),
    ]


class Gradients(ctypes.Structure):
    _fields_ = [("images", P), ("weight", P), *((n, SmallGradient) for n in SMALL)]


def load(path):
    return load_kernels(path, Call, Gradients, emulated_units=ctypes.c_char_p)


@pytest.fixture(scope="module")
def library():
    return load(emulated("patch_embed", flags=("-shared",)))


def pointer(t):
    return None if t is None else t.data_ptr()


def geometry(images, weight):
    video = images.dim() == 5
    sizes = [images.shape[2] if video else 1, *images.shape[-2:]]
    patch = [weight.shape[2] if video else 1, *weight.shape[-2:]]
    grid = [-(-s // p) for s, p in zip(sizes, patch, strict=True)]
    strides = images.stride()
    channels = images.shape[1]
    return Geometry(
        strides[0], strides[1], strides[2] if video else 0, *strides[-2:], *sizes, channels, *patch,
        *grid[1:], math.prod(grid), math.prod(grid) * len(images),
        channels > 1 and strides[1] == 1 and strides[-1] == channels,
    )  # fmt: skip


def run(library, tensors, mean=None, std=None, eps=1e-6, cotangent=None, seed=1):
    """Tokens, and with a cotangent the gradients of the tensors that are given."""
    images, weight, bias, norm_weight, norm_bias, pos, prefix = tensors
    g, embed = geometry(images, weight), len(weight)
    constants = [None if v is None else torch.tensor(v, dtype=torch.float64) for v in (mean, std)]
    small = [
        RowTensor(pointer(t), 0 if t is None else DTYPES.index(t.dtype), embed)
        for t in (bias, norm_weight, norm_bias, pos, prefix)
    ]
    prefixes = 0 if prefix is None else len(prefix)
    call = Call(
        g, len(images), DTYPES.index(weight.dtype), images.dtype == torch.uint8,
        images.data_ptr(), weight.data_ptr(), embed, *small, prefixes,
        pos is not None and len(pos) != g.patches, eps, *map(pointer, constants),
    )  # fmt: skip
    out = torch.full((len(images), prefixes + g.patches, embed), torch.nan, dtype=weight.dtype)
    seed = ctypes.c_uint64(seed)
    error = library.emulated_forward(ctypes.byref(call), P(out.data_ptr()), seed)
    assert error is None, error.decode()
    if cotangent is None:
        return (out,)
    found = [
        torch.full_like(t, torch.nan) if t is not None and t.is_floating_point() else None
        for t in tensors
    ]
    rest = [SmallGradient(pointer(t), 0 if t is None else DTYPES.index(t.dtype)) for t in found[2:]]
    to = Gradients(pointer(found[0]), pointer(found[1]), *rest)
    error = library.emulated_backward(
        ctypes.byref(call), ctypes.byref(to), P(cotangent.data_ptr()), seed
    )
    assert error is None, error.decode()
    return out, *(t for t in found if t is not None)


def check(library, tensors, mean=None, std=None, pad=False, eps=1e-6):
    images, weight = tensors[:2]
    torch.manual_seed(1)
    shape = eager(mean, std, eps, pad, *tensors).shape
    cotangent = torch.randn(shape).to(weight.dtype)
    found = run(library, tensors, mean, std, eps, cotangent)

    def exact(x, w, b, nw, nb, pos, prefix):
        return reference(x, w, b, mean, std, nw, nb, eps, pos, prefix, pad)

    want = gradients(exact, double(*tensors), [cotangent])
    near = gradients(lambda *t: eager(mean, std, eps, pad, *t), tensors, [cotangent])
    assert_parity("tokens", found[0], near[0][0], want[0][0], terms=weight[0].numel())
    names = [
        n for n, t in zip(NAMES, tensors, strict=True) if t is not None and t.is_floating_point()
    ]
    for name, a, e, w in zip(names, found[1:], near[1], want[1], strict=True):
        terms = len(weight) if name == "images" else cotangent.shape[0] * cotangent.shape[1]
        assert_parity(f"d{name}", a, e, w, dtype=weight.dtype, terms=terms)


FLOAT, BF16, F16 = DTYPES
# dtype, images, weight, options of make, unit of pixels
CASES = {
    "vit_16_bytes_at_a_time": (
        BF16, (2, 3, 16, 32), (136, 3, 16, 16), {"pos": "all", "prefixes": 1}, 8,
    ),
    "units_of_2": (F16, (1, 3, 28, 28), (24, 3, 14, 14), {"pos": "x", "prefixes": 3}, 2),
    "norm_in_the_tile": (BF16, (1, 3, 20, 24), (96, 3, 4, 4), {"norm": True}, 4),
    "norm_in_a_second_pass": (
        F16, (1, 3, 16, 24), (136, 3, 8, 8), {"norm": True, "pos": "all", "prefixes": 2}, 8,
    ),
    "odd_embed_and_norm": (FLOAT, (1, 2, 6, 10), (133, 2, 3, 5), {"norm": True, "prefixes": 1}, 1),
    "float32": (FLOAT, (2, 3, 16, 16), (40, 3, 8, 8), {"pos": "x"}, 4),
    "two_tiles_of_tokens": (BF16, (3, 4, 16, 12), (33, 4, 2, 2), {"pos": "x"}, 2),
    "tubelets": (BF16, (1, 3, 4, 8, 12), (16, 3, 2, 4, 4), {"pos": "x"}, 4),
    "one_pixel": (FLOAT, (2, 3, 3, 5), (4, 3, 1, 1), {}, 1),
    "bytes": (BF16, (2, 3, 16, 16), (40, 3, 8, 8), {"uint8": True, "pos": "x"}, 8),
    "bytes_of_float32": (FLOAT, (1, 3, 8, 12), (24, 3, 4, 4), {"uint8": True, "norm": True}, 4),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_emulated_patch_embed(library, case):
    dtype, images, weight, options, unit = case
    tensors = make("cpu", dtype, images, weight, **options)
    g = Call(geometry(*tensors[:2]), type=DTYPES.index(dtype), bytes=options.get("uint8", False))
    g.pixels = tensors[0].data_ptr()
    assert library.emulated_unit(ctypes.byref(g)) == unit
    normalised = (MEAN, STD) if "uint8" in options else (None, None)
    check(library, tensors, *normalised)


@pytest.mark.parametrize("uint8", [False, True], ids=["float", "bytes"])
def test_emulated_channels_last_with_padding(library, uint8):
    """Channels innermost, partial patches at the right and the bottom. Bytes: in float32, where
    padding that misses zero by the fraction of the mean shows."""
    options = {"uint8": uint8, "pos": "all", "prefixes": 1}
    dtype = FLOAT if uint8 else BF16
    tensors = make("cpu", dtype, (2, 3, 10, 13), (24, 3, 4, 4), **options)
    tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    check(library, tensors, *((MEAN, STD) if uint8 else (None, None)), pad=True)


def test_emulated_padding_of_planes(library):
    check(library, make("cpu", F16, (2, 3, 10, 12), (24, 3, 4, 8)), pad=True)


def test_emulated_float32_parameters(library):
    options = {"norm": True, "pos": "all", "prefixes": 2}
    tensors = make("cpu", BF16, (2, 3, 8, 8), (24, 3, 4, 4), **options)
    check(library, [*tensors[:2], *(t.float() for t in tensors[2:])])


def test_emulated_splits_of_tokens(library):
    """The weight's gradient in several parts."""
    check(library, make("cpu", BF16, (3, 1, 36, 12), (8, 1, 1, 2), pos="x"))


def test_emulated_views(library):
    """A crop of every second image, unaligned; gradients of the images are for dense ones."""
    whole = make("cpu", BF16, (4, 3, 20, 24), (16, 3, 4, 4), pos="x")
    tensors = [whole[0][::2, :, 3:19, 5:21], whole[1], whole[2], None, None, None, None]
    (got,) = run(library, tensors)
    want = reference(*double(*tensors[:3]), None, None, None, None, 1e-6, None, None, False)
    near = eager(None, None, 1e-6, False, *tensors)
    assert_parity("tokens", got, near, want, terms=48)


def test_emulated_offsets_beyond_32_bits(library):
    """Images 2^31 elements apart, in memory that is mapped and not filled."""
    stride = 2**31 + 64
    memory = torch.frombuffer(mmap.mmap(-1, (stride + 256) * 2), dtype=BF16)
    images = memory.as_strided((2, 1, 8, 16), (stride, 128, 16, 1))
    images.copy_(torch.randn(images.shape))
    tensors = make("cpu", BF16, (2, 1, 8, 16), (8, 1, 8, 8))
    tensors[0] = images
    (got,) = run(library, tensors)
    tensors[0] = images.clone()
    assert torch.equal(got, run(library, tensors)[0])


def test_emulated_thread_order_changes_nothing(library):
    for name in ("norm_in_a_second_pass", "bytes", "units_of_2"):
        order_changes_nothing(library, CASES[name])


def order_changes_nothing(library, case, seeds=range(2, 5)):
    dtype, images, weight, options, _ = case
    tensors = make("cpu", dtype, images, weight, **options)
    shape = run(library, tensors)[0].shape
    cotangent = torch.randn(shape).to(dtype)
    assert_order_changes_nothing(
        lambda seed: run(library, tensors, cotangent=cotangent, seed=seed), seeds
    )


def catch(csrc):
    """Raises AssertionError if the kernels in ``csrc`` are broken."""
    broken = load(emulated("patch_embed", csrc=csrc, flags=("-shared",)))
    for case in CASES.values():
        test_emulated_patch_embed(broken, case)
    for uint8 in (False, True):
        test_emulated_channels_last_with_padding(broken, uint8)
    test_emulated_splits_of_tokens(broken)
    for name in ("norm_in_a_second_pass", "bytes", "units_of_2"):
        order_changes_nothing(broken, CASES[name])
