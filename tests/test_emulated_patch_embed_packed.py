"""The CUDA kernels on packed images, run on the CPU by the emulator in tests/emulator.

Emulated, not yet confirmed on hardware. What a dense call does alike is tested in
test_emulated_patch_embed.py.
"""

from __future__ import annotations

import ctypes
import math
import mmap

import pytest
import torch
import torch.nn.functional as F
from emulation import assert_order_changes_nothing, emulated
from numerics import DTYPES, assert_parity, double, gradients
from test_emulated_patch_embed import (
    Call,
    Geometry,
    Gradients,
    P,
    RowTensor,
    SmallGradient,
    load,
    pointer,
)
from test_patch_embed import MEAN, STD

from vitkit.ops import patch_embed_packed as op

NAMES = ("pixels", "weight", "bias", "norm_weight", "norm_bias", "pos_embed")
FLOAT, BF16, F16 = DTYPES


@pytest.fixture(scope="module")
def library():
    return load(emulated("patch_embed", flags=("-shared",)))


def make(dtype, sizes, weight, *, uint8=False, norm=False, pos=False):
    """Places of images of ``sizes``, and (pixels, weight, bias, norm_weight, norm_bias,
    pos_embed). The grid of positions is larger than that of any image."""
    torch.manual_seed(0)
    randn = lambda *shape: torch.randn(*shape).to(dtype)  # noqa: E731
    embed, channels, *patch = weight
    shapes = [(channels, *size) for size in sizes]
    if uint8:
        images = [torch.randint(256, s, dtype=torch.uint8) for s in shapes]
    else:
        images = [randn(*s) for s in shapes]
    pixels, listed, strides = op._flatten(images, None, randn(1))
    grids = [op._grid(s, patch) for s in sizes]
    columns = 1 + max(g[1] for g in grids)
    places, _, _ = op._places(listed, strides, patch, columns if pos else 0)
    rows = columns * max(g[0] for g in grids)
    return places, [
        pixels,
        (torch.randn(weight) / math.sqrt(math.prod(weight[1:]))).to(dtype),
        randn(embed),
        randn(embed) if norm else None,
        randn(embed) if norm else None,
        randn(rows, embed) if pos else None,
    ]


def eager(places, mean, std, eps, pixels, weight, bias, nw, nb, pos):
    """What a host model computes, op by op, in the dtype of weight."""
    _, channels, height, width = weight.shape
    axes = (torch.arange(n) for n in (channels, height, width))
    c, y, x = torch.meshgrid(*axes, indexing="ij")
    origin, of_channel, of_row, rows, columns = places[:, :5, None, None, None].unbind(1)
    inside = ((y < rows) & (x < columns)).expand(-1, channels, -1, -1)
    patches = pixels[torch.where(inside, origin + c * of_channel + y * of_row + x, 0)]
    if pixels.dtype == torch.uint8:
        patches = patches.to(weight.dtype) / 255
        if mean is not None:
            shape = (-1, 1, 1)
            of = patches.new_tensor
            patches = (patches - of(mean).view(shape)) / of(std).view(shape)
    z = F.linear(patches.masked_fill(~inside, 0).flatten(1), weight.flatten(1), bias)
    if nw is not None:
        z = F.layer_norm(z, nw.shape, nw, nb, eps)
    return z if pos is None else z + pos[places[:, 5]]


def call_of(library, places, tensors, mean=None, std=None, eps=1e-6):
    """A Call, and what it points to."""
    pixels, weight, bias, norm_weight, norm_bias, pos = tensors
    embed, g = len(weight), Geometry()
    library.emulated_packed_geometry(ctypes.byref(g), len(places), *weight.shape[1:])
    constants = [None if v is None else torch.tensor(v, dtype=torch.float64) for v in (mean, std)]
    small = [
        RowTensor(pointer(t), 0 if t is None else DTYPES.index(t.dtype), embed)
        for t in (bias, norm_weight, norm_bias, pos, None)
    ]
    call = Call(
        g, 1, DTYPES.index(weight.dtype), pixels.dtype == torch.uint8, pixels.data_ptr(),
        weight.data_ptr(), embed, *small, 0, False, eps, *map(pointer, constants),
        places.data_ptr(), pixels.numel(), 0 if pos is None else len(pos),
    )  # fmt: skip
    return call, constants


def tokens_of(library, places, tensors, mean=None, std=None, seed=1):
    call, _held = call_of(library, places, tensors, mean, std)
    out = torch.full((len(places), call.embed), torch.nan, dtype=tensors[1].dtype)
    error = library.emulated_forward(ctypes.byref(call), P(out.data_ptr()), ctypes.c_uint64(seed))
    assert error is None, error.decode()
    return out


def gradients_of(library, places, tensors, cotangent, mean=None, std=None, seed=1, wanted=NAMES):
    """Of the floating tensors that are given and wanted."""
    call, _held = call_of(library, places, tensors, mean, std)
    found = [
        torch.full_like(t, torch.nan)
        if t is not None and t.is_floating_point() and name in wanted
        else None
        for name, t in zip(NAMES, tensors, strict=True)
    ]
    if found[0] is not None:
        found[0].zero_()
    small = [SmallGradient(pointer(t), 0 if t is None else DTYPES.index(t.dtype)) for t in found]
    to = Gradients(pointer(found[0]), pointer(found[1]), *small[2:], SmallGradient(None, 0))
    error = library.emulated_backward(
        ctypes.byref(call), ctypes.byref(to), P(cotangent.data_ptr()), ctypes.c_uint64(seed)
    )
    assert error is None, error.decode()
    return [t for t in found if t is not None]


def check(library, places, tensors, mean=None, std=None):
    weight = tensors[1]
    cotangent = torch.randn(len(places), len(weight)).to(weight.dtype)
    tokens = tokens_of(library, places, tensors, mean, std)
    found = gradients_of(library, places, tensors, cotangent, mean, std)

    def exact(x, w, b, nw, nb, pos):
        return op.reference(x, places, w, b, mean, std, nw, nb, 1e-6, pos)

    want = gradients(exact, double(*tensors), [cotangent])
    near = gradients(lambda *t: eager(places, mean, std, 1e-6, *t), tensors, [cotangent])
    assert_parity("tokens", tokens, near[0][0], want[0][0], terms=weight[0].numel())
    names = [
        n for n, t in zip(NAMES, tensors, strict=True) if t is not None and t.is_floating_point()
    ]
    for name, a, e, w in zip(names, found, near[1], want[1], strict=True):
        terms = len(weight) if name == "pixels" else len(places)
        assert_parity(f"d{name}", a, e, w, dtype=weight.dtype, terms=terms)
        if name in ("pixels", "pos_embed"):
            assert not a[w == 0].any()  # what no token covers


RAGGED = [(7, 11), (1, 1), (3, 40), (13, 8)]
# dtype, sizes, weight, options of make, units of the tiles
CASES = {
    "whole_patches_16_bytes_at_a_time": (
        BF16, [(32, 48), (16, 16), (48, 32)], (136, 3, 16, 16), {"pos": True}, [8],
    ),
    "ragged": (F16, RAGGED, (24, 3, 4, 4), {"pos": True}, [1]),
    "two_tiles_of_two_units": (
        BF16, [(16, 128), (8, 72), (6, 13)], (9, 2, 2, 8), {"pos": True}, [8, 1],
    ),
    "half_patches_in_whole_units": (BF16, [(10, 24), (5, 16)], (8, 1, 4, 16), {}, [8]),
    "norm_in_the_tile": (BF16, [(8, 12), (12, 4)], (96, 3, 4, 4), {"norm": True}, [4]),
    "norm_in_a_second_pass": (
        F16, [(16, 24), (8, 8), (16, 16)], (136, 3, 8, 8), {"norm": True, "pos": True}, [8],
    ),
    "odd_embed": (FLOAT, [(5, 9), (4, 11)], (133, 2, 3, 5), {"norm": True, "pos": True}, [1]),
    "one_token_of_one_pixel": (FLOAT, [(1, 1)], (4, 1, 2, 2), {"pos": True}, [1]),
    "bytes": (BF16, [(16, 24), (8, 8)], (40, 3, 8, 8), {"uint8": True, "pos": True}, [8]),
    # In float32, where padding that misses zero by the fraction of the mean shows.
    "ragged_bytes": (FLOAT, RAGGED, (24, 3, 4, 4), {"uint8": True, "norm": True}, [1]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_emulated_packed(library, case):
    dtype, sizes, weight, options, units = case
    places, tensors = make(dtype, sizes, weight, **options)
    call, _held = call_of(library, places, tensors)
    found = (ctypes.c_int * len(units))()
    assert library.emulated_units(ctypes.byref(call), found, ctypes.c_uint64(1)) is None
    assert list(found) == units
    check(library, places, tensors, *((MEAN, STD) if "uint8" in options else (None, None)))


def test_emulated_padded_batch(library):
    """What lies beyond the size of an image is neither read nor, in the gradient, written."""
    places, tensors = make(BF16, [(20, 16)], (24, 2, 4, 4), pos=True)
    places = places[torch.tensor([0, 1, 4, 5, 10, 11])]
    places[1, 3:5] = torch.tensor([4, 3])
    places[3, 3:5] = torch.tensor([2, 3])
    check(library, places, tensors)
    places, tensors = make(BF16, [(8, 20)], (24, 2, 2, 8), pos=True)
    check(library, places[places[:, 4] == 8], tensors)  # rows half a unit apart


def check_positions(library, index, embed, rows):
    """The gradient of positions alone."""
    tokens = len(index)
    places = torch.tensor([[0, 1, 1, 1, 1, 0]]).repeat(tokens, 1)
    places[:, 5] = index
    tensors = [torch.ones(1), torch.ones(embed, 1, 1, 1), *[None] * 3, torch.ones(rows, embed)]
    cotangent = torch.randn(tokens, embed)
    (got,) = gradients_of(library, places, tensors, cotangent, wanted=("pos_embed",))
    want = torch.zeros(rows, embed, dtype=torch.float64).index_add_(0, index, cotangent.double())
    near = torch.zeros(rows, embed).index_add_(0, index, cotangent)
    assert_parity("dpos_embed", got, near, want, terms=tokens)
    assert not got[want == 0].any()


def test_emulated_positions_that_many_tokens_share(library):
    """More tokens than a block looks through or lists at a time; a row that only the last tokens
    have, and one of none."""
    torch.manual_seed(0)
    index = torch.randint(2, (33000,))
    index[:500] = 0
    index[32900:] = 2
    check_positions(library, index, 5, 4)


@pytest.mark.parametrize("embed", [1030, 1032], ids=["one_by_one", "packs"])
def test_emulated_positions_of_wide_tokens(library, embed):
    """Columns of two blocks."""
    torch.manual_seed(0)
    check_positions(library, torch.tensor([1, 0, 1, 3, 1]), embed, 4)


BROKEN = {
    "before_the_pixels": (0, -1),
    "behind_the_pixels": (0, 2 * 12 * 12),
    "channels_behind_the_pixels": (1, 12 * 12 + 1),
    "rows_behind_the_pixels": (2, 13),
    "rows_before_the_pixels": (2, -12),
    "offsets_that_overflow": (1, 2**63 - 1),
    "position_before_the_first": (5, -1),
    "position_behind_the_last": (5, 12),
    "position_of_more_than_32_bits": (5, 2**32),
}


def test_emulated_broken_places(library):
    """A token whose place is broken is NaN, its neighbours are as without it, and nothing is
    written for it. Sizes beyond a patch are those of a patch."""
    places, tensors = make(FLOAT, [(12, 12)], (6, 2, 4, 4), pos=True)
    cotangent = torch.randn(len(places), 6)
    want = tokens_of(library, places, tensors)
    others = torch.arange(len(places)) != 8  # the last patch ends with the pixels
    for name, (column, value) in BROKEN.items():
        broken = places.clone()
        broken[8, column] = value
        got = tokens_of(library, broken, tensors)
        assert got[8].isnan().all() and torch.equal(got[others], want[others]), name
        dpixels, *_, dpos = gradients_of(library, broken, tensors, cotangent)
        assert not dpixels.view(2, 12, 12)[:, 8:, 8:].any(), name
        assert torch.equal(dpos[places[8, 5]], torch.zeros(6)), name
        assert torch.equal(dpos[places[7, 5]], cotangent[7]), name
    wide = places.clone()
    wide[:, 3:5] = 2**40
    assert torch.equal(tokens_of(library, wide, tensors), want)
    wide[8, 3] = -(2**40)  # nothing inside: bias and position
    got = tokens_of(library, wide, tensors)
    assert torch.equal(got[8], tensors[2] + tensors[5][places[8, 5]])


def test_emulated_offsets_beyond_32_bits(library):
    """A token and a channel 2^31 elements on, in memory that is mapped and not filled."""
    far = 2**31 + 64
    pixels = torch.frombuffer(mmap.mmap(-1, (far + 256) * 2), dtype=BF16)
    _, tensors = make(BF16, [(8, 8)], (8, 2, 8, 8))
    for start in (0, far):
        pixels[start : start + 256] = torch.randn(256)
    places = torch.tensor([[far, 64, 8, 8, 8, 0], [64, far, 8, 8, 8, 0], [0, 64, far, 2, 8, 0]])
    got = tokens_of(library, places, [pixels, *tensors[1:]])
    near = torch.cat([pixels[:256], pixels[far : far + 256]])
    moved = torch.where(places == far, 256, places)
    assert torch.equal(got, tokens_of(library, moved, [near, *tensors[1:]]))


def order_changes_nothing(library, case, seeds=range(2, 5)):
    dtype, sizes, weight, options, _ = case
    places, tensors = make(dtype, sizes, weight, **options)
    cotangent = torch.randn(len(places), weight[0]).to(dtype)

    def run(seed):
        yield tokens_of(library, places, tensors, seed=seed)
        yield from gradients_of(library, places, tensors, cotangent, seed=seed)

    assert_order_changes_nothing(run, seeds)


ORDERED = ("two_tiles_of_two_units", "ragged_bytes", "norm_in_a_second_pass")


def test_emulated_packed_thread_order_changes_nothing(library):
    for name in ORDERED:
        order_changes_nothing(library, CASES[name])


def catch(csrc):
    """Raises AssertionError if the kernels in ``csrc`` are broken."""
    broken = load(emulated("patch_embed", csrc=csrc, flags=("-shared",)))
    test_emulated_broken_places(broken)
    for case in CASES.values():
        test_emulated_packed(broken, case)
    test_emulated_padded_batch(broken)
    test_emulated_positions_that_many_tokens_share(broken)
    test_emulated_positions_of_wide_tokens(broken, 1032)
    for name in ORDERED:
        order_changes_nothing(broken, CASES[name])
