"""vitkit.patch_embed and patch_embed_packed on every backend: parity with float64, layouts, bytes,
LayerNorm, positions and prefix tokens, bad input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import DTYPES, assert_parity, double, gradients

import vitkit
from vitkit.ops import patch_embed as op

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(params=["native", "triton", "reference"])
def backend(request, device):
    name = device if request.param == "native" else request.param
    images, weight = torch.zeros(1, 1, 2, 2, device=device), torch.zeros(1, 1, 2, 2, device=device)
    reason = vitkit.explain("patch_embed", images, weight).reasons[name]
    if reason is not None:
        pytest.skip(reason)
    return name


def make(device, dtype, images, weight, *, uint8=False, norm=False, pos=None, prefixes=0, seed=0):
    """(images, weight, bias, norm_weight, norm_bias, pos_embed, prefix_tokens)"""
    torch.manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, device=device).to(dtype)  # noqa: E731
    if uint8:
        x = torch.randint(256, images, dtype=torch.uint8, device=device)
    else:
        x = randn(*images)
    embed = weight[0]
    w = (torch.randn(weight, device=device) / math.sqrt(math.prod(weight[1:]))).to(dtype)
    rows = math.prod(-(-s // p) for s, p in zip(images[2:], weight[2:], strict=True))
    if pos == "all":
        rows += prefixes
    return [
        x,
        w,
        randn(embed),
        randn(embed) if norm else None,
        randn(embed) if norm else None,
        randn(rows, embed) if pos else None,
        randn(prefixes, embed) if prefixes else None,
    ]


def eager(mean, std, eps, pad, x, weight, bias, nw, nb, pos, prefix):
    """What a host model computes, op by op, in the dtype of weight."""
    dtype = weight.dtype
    bias, nw, nb = (None if t is None else t.to(dtype) for t in (bias, nw, nb))
    if x.dtype == torch.uint8:
        x = x.to(dtype) / 255
        if mean is not None:
            shape = (1, -1, *(1,) * (x.dim() - 2))
            x = (x - x.new_tensor(mean).view(shape)) / x.new_tensor(std).view(shape)
    patch = weight.shape[2:]
    if pad:
        missing = [(-s) % p for s, p in zip(x.shape[2:], patch, strict=True)]
        x = F.pad(x, [end for m in reversed(missing) for end in (0, m)])
    convolution = F.conv2d if weight.dim() == 4 else F.conv3d
    y = convolution(x, weight, bias, stride=patch).flatten(2).transpose(1, 2)
    if nw is not None:
        y = F.layer_norm(y, nw.shape, nw, nb, eps)
    late = pos is not None and pos.shape[0] == y.shape[1]
    y = y + pos.to(dtype) if late else y
    if prefix is not None:
        y = torch.cat([prefix.to(dtype).expand(y.shape[0], -1, -1), y], 1)
    return y + pos.to(dtype) if pos is not None and not late else y


NAMES = ("images", "weight", "bias", "norm_weight", "norm_bias", "pos_embed", "prefix_tokens")


def check(tensors, backend, mean=None, std=None, pad=False, eps=1e-6, together=False):
    """Output and every gradient by the tolerance rule; together: gradients as one vector, for
    tensors so small that all but rounding may cancel in one of them."""
    images, weight = tensors[:2]

    def ours(images, weight, bias, nw, nb, pos, prefix):
        return vitkit.patch_embed(
            images, weight, bias, mean=mean, std=std, norm_weight=nw, norm_bias=nb, norm_eps=eps,
            pos_embed=pos, prefix_tokens=prefix, pad=pad, backend=backend,
        )  # fmt: skip

    def truth(images, weight, bias, nw, nb, pos, prefix):
        return op.reference(images, weight, bias, mean, std, nw, nb, eps, pos, prefix, pad)

    def plain(*given):
        return eager(mean, std, eps, pad, *given)

    shape = truth(*(t.to("meta") if t is not None else None for t in tensors)).shape
    cotangent = torch.randn(shape, device=images.device).to(weight.dtype)
    got = gradients(ours, tensors, [cotangent])
    want = gradients(truth, double(*tensors), [cotangent])
    yardstick = gradients(plain, tensors, [cotangent])
    assert got[0][0].dtype == weight.dtype and got[0][0].is_contiguous()
    depth = weight[0].numel()
    assert_parity("tokens", got[0][0], yardstick[0][0], want[0][0], terms=depth)
    names = [
        n for n, t in zip(NAMES, tensors, strict=True) if t is not None and t.is_floating_point()
    ]
    terms = {"images": shape[2]}
    if together:
        joined = [torch.cat([t.double().flatten() for t in x[1]]) for x in (got, yardstick, want)]
        most = max(shape[0] * shape[1], shape[2])
        assert_parity("gradients", *joined, dtype=weight.dtype, terms=most)
        return
    for name, a, e, w in zip(names, got[1], yardstick[1], want[1], strict=True):
        count = terms.get(name, shape[0] * shape[1])
        assert_parity(f"d{name}", a, e, w, dtype=weight.dtype, terms=count)


# images, weight, other arguments of make
CALLS = {
    "vit_cls_and_positions": ((2, 3, 32, 48), (40, 3, 16, 16), {"pos": "all", "prefixes": 1}),
    "registers_without_positions": ((2, 3, 28, 28), (24, 3, 14, 14), {"pos": "x", "prefixes": 5}),
    "swin_norm": ((2, 3, 20, 24), (33, 3, 4, 4), {"norm": True}),
    "wide_norm_and_all": (
        (1, 3, 16, 24), (272, 3, 8, 8), {"norm": True, "pos": "all", "prefixes": 2},
    ),
    "dit_latents": ((3, 4, 8, 6), (70, 4, 2, 2), {"pos": "x"}),
    "tubelets": ((2, 3, 4, 8, 12), (18, 3, 2, 4, 4), {"pos": "x", "norm": True}),
    "odd_everything": ((2, 5, 9, 14), (7, 5, 3, 7), {"pos": "x"}),
    "rectangular_patch": ((1, 1, 6, 40), (6, 1, 2, 20), {}),
    "one_pixel": ((2, 3, 3, 5), (4, 3, 1, 1), {}),
}  # fmt: skip


@every_dtype
@pytest.mark.parametrize(("images", "weight", "options"), CALLS.values(), ids=CALLS)
def test_parity(device, backend, dtype, images, weight, options):
    check(make(device, dtype, images, weight, **options), backend)


@every_dtype
@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "pixels"])
def test_bytes(device, backend, dtype, channels_last):
    """Normalised inside, the result no further from float64 than the pipeline in floats."""
    tensors = make(
        device, dtype, (2, 3, 32, 48), (40, 3, 16, 16), uint8=True, pos="all", prefixes=1
    )
    if channels_last:
        tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    check(tensors, backend, MEAN, STD)
    check(tensors, backend)


@every_dtype
def test_bytes_padded(device, backend, dtype):
    """Padding is zero after normalisation, not a black pixel."""
    tensors = make(device, dtype, (2, 3, 19, 13), (12, 3, 4, 8), uint8=True, norm=True)
    check(tensors, backend, MEAN, STD, pad=True)
    black = torch.zeros(1, 3, 1, 1, dtype=torch.uint8, device=device)
    one = torch.ones(1, 3, 2, 1, dtype=torch.float32, device=device)
    y = vitkit.patch_embed(black, one, mean=MEAN, std=STD, pad=True, backend=backend)
    assert abs(y.item() - sum(-m / s for m, s in zip(MEAN, STD, strict=True))) < 1e-5


@every_dtype
@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "pixels"])
def test_padded(device, backend, dtype, channels_last):
    tensors = make(device, dtype, (2, 3, 19, 13), (12, 3, 4, 8), pos="x")
    if channels_last:
        tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    check(tensors, backend, pad=True)


def test_padded_video(device, backend):
    check(make(device, torch.float32, (1, 2, 3, 5, 7), (6, 2, 2, 2, 4)), backend, pad=True)


def test_float32_parameters_beside_lower_precision_images(device, backend):
    tensors = make(
        device, torch.bfloat16, (2, 3, 8, 8), (24, 3, 4, 4), norm=True, pos="all", prefixes=2
    )
    check([*tensors[:2], *(t.float() for t in tensors[2:])], backend)


VIEWS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "crop": lambda x: x[:, :, 3:19, 5:29],
    "crop_of_channels_last": lambda x: x.contiguous(memory_format=torch.channels_last)[
        :, :, 3:19, 5:29
    ],
    "every_second_pixel": lambda x: x[..., ::2],
    "every_second_row": lambda x: x[:, :, ::2],
    "transposed": lambda x: x.transpose(2, 3),
    "expanded_batch": lambda x: x[:1].expand(3, -1, -1, -1),
    "expanded_channels": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "some_channels": lambda x: torch.cat([x, x], 1)[:, ::2],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views(device, backend, view):
    """Read in place or copied, same numbers; gradients have the shape of the view."""
    x = torch.randn(2, 3, 32, 32, device=device)
    weight = torch.randn(16, 3, 4, 4, device=device)
    images = view(x)[:, :, :16, :16]
    want = F.conv2d(images, weight, stride=4).flatten(2).transpose(1, 2)
    got = vitkit.patch_embed(images, weight, backend=backend)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    leaf = images.detach().requires_grad_()
    y = vitkit.patch_embed(leaf, weight, backend=backend)
    (found,) = torch.autograd.grad(y.square().sum(), leaf)
    z = F.conv2d(leaf, weight, stride=4)
    (expected,) = torch.autograd.grad(z.square().sum(), leaf)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_offsets_beyond_32_bits(device):
    """A batch stride of more than 2^31 elements: offsets are 64 bits wide."""
    base = torch.empty(0, dtype=torch.uint8, device=device)
    try:
        storage = torch.UntypedStorage(2**31 + 64 * 64, device=device)
    except RuntimeError:
        pytest.skip("no address space")
    images = base.set_(storage, 0, (2, 1, 8, 8), (2**31, 64, 8, 1))
    images.copy_(torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8))
    weight = torch.randn(4, 1, 4, 4, device=device)
    got = vitkit.patch_embed(images, weight, backend=device)
    torch.testing.assert_close(got, vitkit.patch_embed(images.clone(), weight, backend="reference"))


def test_only_what_needs_a_gradient(device, backend):
    """Frozen projection, trained positions; and the gradient of a bias alone."""
    tensors = make(device, torch.float32, (2, 3, 8, 8), (8, 3, 4, 4), pos="all", prefixes=1)
    images, weight, bias, _, _, pos, prefix = tensors
    for leaf in (images, weight, bias, pos, prefix):
        leaf.requires_grad_()
        y = vitkit.patch_embed(
            images, weight, bias, pos_embed=pos, prefix_tokens=prefix, backend=backend
        )
        y.square().sum().backward()
        z = eager(None, None, 0.0, False, *tensors)
        (want,) = torch.autograd.grad(z.square().sum(), leaf)
        torch.testing.assert_close(leaf.grad, want, rtol=1e-4, atol=1e-4)
        leaf.requires_grad_(False)


@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
def test_empty_batch(device, backend, norm):
    tensors = make(
        device, torch.float32, (0, 3, 8, 8), (8, 3, 4, 4), norm=norm, pos="all", prefixes=1
    )
    leaves = [t.requires_grad_() for t in tensors if t is not None]
    given = dict(zip(NAMES, tensors, strict=True))
    y = vitkit.patch_embed(**given, backend=backend)
    assert y.shape == (0, 5, 8)
    y.sum().backward()
    assert all(t.grad.shape == t.shape and torch.all(t.grad == 0) for t in leaves)


def test_nan_stays_in_its_token(device, backend):
    images, weight = make(device, torch.float32, (2, 3, 8, 8), (8, 3, 4, 4))[:2]
    clean = vitkit.patch_embed(images, weight, backend=backend)
    images[1, 2, 5, 6] = math.nan
    y = vitkit.patch_embed(images, weight, backend=backend)
    assert y[1, 3].isnan().all()
    y[1, 3] = clean[1, 3]
    torch.testing.assert_close(y, clean)


def test_threads_change_no_bit(device):
    if device != "cpu":
        pytest.skip("threads of the CPU kernels")
    tensors = make(
        device, torch.float32, (3, 3, 112, 112), (48, 3, 4, 4), norm=True, pos="all", prefixes=1
    )

    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            leaves = [t.clone().requires_grad_() for t in tensors]
            y = vitkit.patch_embed(**dict(zip(NAMES, leaves, strict=True)), backend="cpu")
            y.square().sum().backward()
            return [y, *(t.grad for t in leaves)]
        finally:
            torch.set_num_threads(before)

    assert all(torch.equal(a, b) for a, b in zip(run(1), run(3), strict=True))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_calls_agree_with_the_reference(data):
    number = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    dims = number(2, 3)
    patch = [number(1, 9) for _ in range(dims)]
    pad = data.draw(st.booleans())
    sizes = [number(1, 3) * p - (number(0, p - 1) if pad else 0) for p in patch]
    channels, uint8 = number(1, 4), data.draw(st.booleans())
    images, weight = (number(1, 3), channels, *sizes), (number(1, 70), channels, *patch)
    options = {
        "uint8": uint8, "norm": weight[0] > 3 and data.draw(st.booleans()),
        "pos": data.draw(st.sampled_from([None, "all", "x"])), "prefixes": number(0, 2),
    }  # fmt: skip
    tensors = make("cpu", data.draw(st.sampled_from(DTYPES)), images, weight, **options)
    if dims == 2 and data.draw(st.booleans()):
        tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    stated = uint8 and data.draw(st.booleans())
    mean, std = ([0.3, 0.9, 0.0, 0.5][:channels], [0.1, 0.5, 1.0, 0.25][:channels])
    normalisation = (mean, std) if stated else (None, None)
    check(tensors, "cpu", *normalisation, pad=pad, eps=1e-3, together=True)


# ---- images of different sizes ----


def packed_truth(images, weight, bias, nw, nb, pos, mean, std, pad, function=op.reference):
    """Image by image, through the reference of the dense op."""
    tokens = []
    for image in images:
        grid = [-(-s // p) for s, p in zip(image.shape[1:], weight.shape[2:], strict=True)]
        if min(grid) == 0:
            continue
        rows = None if pos is None else pos[: grid[0], : grid[1]].flatten(0, 1)
        given = (weight, bias, mean, std, nw, nb, 1e-6, rows, None, pad)
        tokens.append(function(image[None], *given)[0])
    return torch.cat(tokens)


def packed_eager(images, weight, bias, mean, std, nw, nb, eps, pos, prefix, pad):
    return eager(mean, std, eps, pad, images, weight, bias, nw, nb, pos, prefix)


SIZES = [(8, 12), (4, 4), (0, 8), (16, 8)]


@every_dtype
@pytest.mark.parametrize("kind", ["list", "batch", "bytes", "padded", "norm"])
def test_packed(device, backend, dtype, kind):
    torch.manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, device=device).to(dtype)  # noqa: E731
    sizes = [(7, 11), (3, 4), (13, 8)] if kind == "padded" else SIZES
    weight, bias, pos = randn(24, 3, 4, 4) / 7, randn(24), randn(5, 4, 24)
    nw, nb = (randn(24), randn(24)) if kind == "norm" else (None, None)
    mean, std = (MEAN, STD) if kind == "bytes" else (None, None)
    if kind == "batch":
        images = randn(4, 3, 18, 13)  # what lies beyond a size must not matter
    elif kind == "bytes":
        images = [torch.randint(256, (3, *s), dtype=torch.uint8, device=device) for s in sizes]
    else:
        images = [randn(3, *s) for s in sizes]
    pad = kind == "padded"

    def ours(*given):
        *x, weight, bias, nw, nb, pos = given
        found = vitkit.patch_embed_packed(
            x[0] if kind == "batch" else x, weight, bias, sizes=sizes if kind == "batch" else None,
            mean=mean, std=std, norm_weight=nw, norm_bias=nb, pos_embed=pos, pad=pad,
            backend=backend,
        )  # fmt: skip
        tables.append(found[1:])
        return found[0]

    def through(function):
        def call(*given):
            *x, weight, bias, nw, nb, pos = given
            if kind == "batch":
                x = [image[:, :h, :w] for image, (h, w) in zip(x[0], sizes, strict=True)]
            return packed_truth(x, weight, bias, nw, nb, pos, mean, std, pad, function)

        return call

    tables: list = []
    given = [*([images] if kind == "batch" else images), weight, bias, nw, nb, pos]
    grids = [(-(-h // 4), -(-w // 4)) for h, w in sizes]
    count = sum(h * w for h, w in grids)
    cotangent = randn(count, 24)
    got = gradients(ours, given, [cotangent])
    want = gradients(through(op.reference), double(*given), [cotangent])
    plain = gradients(through(packed_eager), given, [cotangent])
    assert_parity("tokens", got[0][0], plain[0][0], want[0][0], terms=48)
    for i, (a, e, w) in enumerate(zip(got[1], plain[1], want[1], strict=True)):
        if w is None:  # an image without tokens
            assert a is None or not a.any()
            continue
        assert_parity(f"gradient {i}", a, e, w, dtype=dtype, terms=max(count, 24))
    cu_seqlens, positions = tables[0]
    assert cu_seqlens.dtype == positions.dtype == torch.int32
    lengths = [h * w for h, w in grids]
    assert cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert positions.tolist() == [[r, c] for h, w in grids for r in range(h) for c in range(w)]


def test_packed_tokens_go_into_packed_attention(device, backend):
    """Attention over a packed pair is attention over each."""
    torch.manual_seed(0)
    images = [torch.randn(3, 8, 12, device=device), torch.randn(3, 12, 4, device=device)]
    weight = torch.randn(16, 3, 4, 4, device=device) / 7
    tokens, cu_seqlens, _ = vitkit.patch_embed_packed(images, weight, backend=backend)
    x = tokens.view(-1, 2, 8)
    packed = vitkit.flash_attention(x, x, x, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)
    for image, (a, b) in zip(images, [(0, 6), (6, 9)], strict=True):
        alone = vitkit.patch_embed(image[None], weight, backend=backend).view(1, -1, 2, 8)
        want = vitkit.flash_attention(alone, alone, alone)[0]
        torch.testing.assert_close(packed[a:b], want, rtol=1e-4, atol=1e-5)


def test_packed_without_images(device, backend):
    weight = torch.randn(8, 3, 4, 4, device=device, requires_grad=True)
    tokens, cu_seqlens, positions = vitkit.patch_embed_packed([], weight, backend=backend)
    assert tokens.shape == (0, 8) and cu_seqlens.tolist() == [0] and positions.shape == (0, 2)
    tokens.sum().backward()
    assert not weight.grad.any()


def test_places_outside_the_pixels_are_refused():
    """Also when the operator is called directly: nothing outside its tensors is read."""
    pixels, weight = torch.zeros(48), torch.zeros(2, 3, 4, 4)
    rest = (weight, None, None, None, None, None, 1e-6, None)
    vitkit.patch_embed_packed([pixels.view(3, 4, 4)], weight, backend="cpu")  # loads the library
    for place in ([1, 16, 4, 4, 4, 0], [0, 17, 4, 4, 4, 0], [-1, 16, 4, 4, 4, 0]):
        with pytest.raises(RuntimeError, match="places must lie inside pixels"):
            torch.ops.vitkit.patch_embed_packed_fwd(pixels, torch.tensor([place]), *rest)


def test_places_outside_the_pixels_show(device):
    """On a GPU, which nobody waits for: their tokens are NaN, and nothing else is."""
    if device == "cpu":
        pytest.skip("they are refused")
    pixels, weight = torch.zeros(48, device=device), torch.zeros(2, 3, 4, 4, device=device)
    reason = vitkit.explain("patch_embed_packed", [pixels.view(3, 4, 4)], weight).reasons["cuda"]
    if reason is not None:
        pytest.skip(reason)
    places = [[0, 16, 4, 4, 4, 0], [1, 16, 4, 4, 4, 0], [0, 17, 4, 4, 4, 0], [-1, 16, 4, 4, 4, 0]]
    rest = (weight, None, None, None, None, None, 1e-6, None)
    at = torch.tensor(places, device=device)
    found = torch.ops.vitkit.patch_embed_packed_fwd(pixels, at, *rest)
    assert not found[0].any() and found[1:].isnan().all()


# ---- bad input ----

X, W = torch.zeros(2, 3, 32, 32), torch.zeros(8, 3, 16, 16)
U8 = X.to(torch.uint8)
BAD = {
    "channels": ((X[:, :2], W), {}, "images must have the 3 channels of weight, got 2"),
    "rank": ((X[0], W), {}, r"images must have shape \[B, C, H, W\]"),
    "video_weight": ((X, W[:, :, None]), {}, r"images must have shape \[B, C, T, H, W\]"),
    "small_image": ((X[..., :8], W), {}, "at least one patch of 16 x 16 large, got 32 x 8"),
    "no_rows_to_pad": ((X[:, :, :0], W), {"pad": True}, "at least one patch"),
    "ragged_image": ((X[..., :20], W), {}, r"divisible by the patch 16 x 16 \(or pad=True\)"),
    "positions": (
        (X, W), {"pos_embed": torch.zeros(196, 8)},
        "pos_embed must have 4 rows for this 2 x 2 grid, got 196, which fits a grid of 14 x 14",
    ),
    "positions_and_prefix": (
        (X, W), {"pos_embed": torch.zeros(197, 8), "prefix_tokens": torch.zeros(1, 8)},
        r"4 or 1 \+ 4 rows.*got 197, which fits a grid of 1 x 197, 14 x 14 after 1 prefix rows",
    ),
    "position_width": ((X, W), {"pos_embed": torch.zeros(4, 9)}, r"\[rows, E = 8\]"),
    "prefix_rank": ((X, W), {"prefix_tokens": torch.zeros(8)}, "prefix_tokens must have shape"),
    "bias": ((X, W, torch.zeros(7)), {}, r"bias must have shape \[E\] = \(8,\)"),
    "norm_bias_alone": ((X, W), {"norm_bias": torch.zeros(8)}, "norm_bias must be None without"),
    "eps": ((X, W), {"norm_eps": -1.0}, "norm_eps must be a finite number >= 0"),
    "mean_of_floats": ((X, W), {"mean": MEAN, "std": STD}, "mean must be None for floating"),
    "mean_alone": ((U8, W), {"mean": MEAN}, "std must be given together with its twin"),
    "std_zero": ((U8, W), {"mean": MEAN, "std": (0.5, 0.0, 0.5)}, "std must be positive"),
    "std_count": ((U8, W), {"mean": MEAN, "std": (0.5,)}, "std must be 3 finite numbers"),
    "empty_weight": ((X, W[:0]), {}, "weight must have shape"),
}  # fmt: skip


@pytest.mark.parametrize(("args", "options", "message"), BAD.values(), ids=BAD)
def test_bad_values(args, options, message):
    for backend in ("auto", "reference"):
        with pytest.raises(ValueError, match=f"patch_embed: .*{message}"):
            vitkit.patch_embed(*args, **options, backend=backend)


def test_bad_types():
    with pytest.raises(TypeError, match="patch_embed: images must have the dtype of weight"):
        vitkit.patch_embed(X.half(), W)
    with pytest.raises(TypeError, match="patch_embed: images must be floating or uint8, got int32"):
        vitkit.patch_embed(X.int(), W)
    with pytest.raises(TypeError, match="patch_embed: images must be a tensor, got list"):
        vitkit.patch_embed([X], W)
    with pytest.raises(ValueError, match=r"cannot run: its kernels take.*float64"):
        vitkit.patch_embed(X.double(), W.double(), backend="cpu")


BAD_PACKED = {
    "negative_size": ((X, W), {"sizes": [(32, 32), (-16, 16)]}, "sizes must lie between 0"),
    "size_beyond_batch": ((X, W), {"sizes": [(32, 32), (48, 16)]}, r"\(32, 32\), got \(48, 16\)"),
    "count_of_sizes": ((X, W), {"sizes": [(32, 32)]}, "sizes must be 2 pairs"),
    "sizes_of_a_list": (([X[0]], W), {"sizes": [(32, 32)]}, "sizes must be None for a list"),
    "channels": (([X[0, :2]], W), {}, r"images\[0\] must have shape \[3, H, W\]"),
    "small_image": (([X[0, :, :8]], W), {}, "at least one patch of 16 x 16"),
    "ragged_image": (([X[0, :, :20]], W), {}, "divisible by the patch"),
    "positions": (([X[0]], W), {"pos_embed": torch.zeros(1, 2, 8)}, "cover the grid 2 x 2"),
    "position_rank": (([X[0]], W), {"pos_embed": torch.zeros(4, 8)}, "rows, columns, E = 8"),
    "std_zero": (
        ([U8[0]], W), {"mean": MEAN, "std": (0.5, 0.0, 0.5)}, "std must be positive",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("args", "options", "message"), BAD_PACKED.values(), ids=BAD_PACKED)
def test_bad_packed_values(args, options, message):
    with pytest.raises(ValueError, match=f"patch_embed_packed: .*{message}"):
        vitkit.patch_embed_packed(*args, **options)


def test_bad_packed_types():
    with pytest.raises(TypeError, match="images must have one dtype, got uint8 after float32"):
        vitkit.patch_embed_packed([X[0], U8[0]], W)
    with pytest.raises(TypeError, match="images must be a tensor or a list of tensors, got str"):
        vitkit.patch_embed_packed("images", W)
