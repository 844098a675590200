"""vitkit::conv3x3_fwd and Conv2d on it: numbers, layouts, when it runs, what it refuses."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from numerics import DTYPES, assert_parity
from patching import assert_it_runs_where_it_should, counted
from torch.utils.flop_counter import FlopCounterMode

import vitkit
import vitkit.nn
from vitkit.nn import convolution, products
from vitkit.verify import KernelCalls

OP = torch.ops.vitkit.conv3x3_fwd
LAST = torch.channels_last
calls = functools.partial(counted, "conv3x3")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The kernel is the quickest everywhere, whatever CPU this is."""
    monkeypatch.setattr(products, "_is_quick_on_this_cpu", lambda: True)


def operands(samples, channels, height, width, columns, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, channels, height, width, generator=generator)
    weight = torch.randn(columns, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
    bias = torch.randn(columns, generator=generator)
    return [t.to(dtype) for t in (x, weight, bias)]


def plain(x, weight, bias):
    return F.conv2d(x, weight, bias, padding=1)


def channels_last(t):
    return t.contiguous(memory_format=LAST)


SHAPES = {
    "ddpm": (2, 128, 16, 16, 128),
    "ddpm_4px": (4, 96, 4, 4, 80),
    "vae": (1, 24, 130, 70, 33),
    "odd": (3, 17, 9, 7, 21),
    "one": (1, 1, 1, 1, 1),
    "row": (1, 5, 1, 40, 3),
    "several_groups": (2, 700, 4, 4, 700),
    "several_ranges": (3, 8, 80, 80, 20),
}


@every_dtype
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_parity(shape, last, dtype):
    x, weight, bias = operands(*shape, dtype)
    if last:
        x, weight = channels_last(x), channels_last(weight)
    for b in (bias, None):
        y = OP(x, weight, b)
        exact = plain(*(t if t is None else t.double() for t in (x, weight, b)))
        assert y.dtype == dtype and y.is_contiguous(
            memory_format=LAST if last else torch.contiguous_format
        )
        wide = plain(*(t if t is None else t.float() for t in (x, weight, b)))
        assert_parity("y", y, wide.to(dtype), exact, terms=9 * shape[1])


def test_the_error_is_no_larger_than_torchs():
    """Of numbers as layers have them, not only within the tolerance."""
    for shape in ((2, 256, 16, 16, 256), (1, 64, 32, 32, 64)):
        x, weight, bias = operands(*shape)
        exact = plain(x.double(), weight.double(), bias.double())
        error, theirs = ((y - exact).norm() for y in (OP(x, weight, bias), plain(x, weight, bias)))
        assert error <= 1.2 * theirs


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512", "amx"])
def test_every_instruction_set(cpu_isa, isa):
    cpu_isa(isa)
    for dtype in DTYPES:
        for shape in ((3, 17, 9, 7, 21), (1, 40, 6, 52, 70)):
            x, weight, bias = operands(*shape, dtype)
            exact = plain(x.double(), weight.double(), bias.double())
            for given in (x, channels_last(x)):
                y = OP(given, weight, bias)
                eager = plain(x.float(), weight.float(), bias.float()).to(dtype)
                assert_parity(f"y of {shape}", y, eager, exact, terms=9 * shape[1])


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
def test_a_sample_is_the_same_alone_and_among_others_on_any_number_of_threads(last):
    x, weight, bias = operands(9, 40, 10, 12, 72)
    x = channels_last(x) if last else x
    threads = torch.get_num_threads()
    whole = OP(x, weight, bias)
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            assert torch.equal(OP(x, weight, bias), whole)
    finally:
        torch.set_num_threads(threads)
    for n in range(9):
        assert torch.equal(OP(x[n : n + 1], weight, bias), whole[n : n + 1])
    assert torch.equal(OP(channels_last(x) if not last else x.contiguous(), weight, bias), whole)


@every_dtype
def test_nan_and_infinity_reach_their_windows_and_no_further_than_their_tiles(dtype):
    x, weight, bias = operands(2, 20, 12, 11, 16, dtype)
    clean = OP(x, weight, bias)
    x[0, 3, 5, 4], x[1, 0, 0, 10] = torch.nan, torch.inf
    y, expected = OP(x, weight, bias), plain(x.float(), weight.float(), bias.float())
    assert not (y.isfinite() & ~expected.isfinite()).any()
    near = torch.zeros(2, 1, 12, 11, dtype=torch.bool)
    near[0, 0, 4:8, 2:6] = near[1, 0, :2, 8:] = True  # the tiles whose 4 x 4 holds the pixel
    far = ~near.expand_as(y)
    assert torch.equal(y[far], clean[far])


def test_images_and_weights_with_strides():
    wide, weight, bias = operands(3, 40, 8, 14, 24)
    x, turned = wide[:, 4:28, 1:, 2:9], weight[:, 3:27].transpose(2, 3)
    expected = OP(x.contiguous(), turned.contiguous(), bias)
    assert torch.equal(OP(x, turned, bias), expected)
    assert torch.equal(OP(channels_last(x), turned, bias), expected)
    assert torch.equal(OP(x, channels_last(turned), bias.flip(0).flip(0)[::1]), expected)
    assert torch.equal(OP(x[:1].expand(3, -1, -1, -1), turned, bias)[2], expected[0])
    every_other = torch.stack([bias, bias], 1)[:, 0]
    assert torch.equal(OP(x, turned, every_other), expected)


def test_empty():
    x, weight, bias = operands(2, 4, 6, 5, 3)
    assert OP(x[:0], weight, bias).shape == (0, 3, 6, 5)
    assert OP(x, weight[:0], bias[:0]).shape == (2, 0, 6, 5)
    assert OP(x[:, :, :0], weight, bias).shape == (2, 3, 0, 5)
    with pytest.raises(RuntimeError, match="conv3x3: x must have at least one channel, got 0"):
        OP(x[:, :0], weight[:, :0], bias)


BAD = {
    "channels": ((1, 5, 4, 4), (3, 4, 3, 3), torch.float32, r"weight.size\(1\) must be 5, got 4"),
    "kernel": ((1, 5, 4, 4), (3, 5, 3, 5), torch.float32, r"weight.size\(3\) must be 3, got 5"),
    "rank": ((5, 4, 4), (3, 5, 3, 3), torch.float32, "x must have 4 dimensions, got 3"),
    "dtype": ((1, 5, 4, 4), (3, 5, 3, 3), torch.bfloat16, "weight must have the dtype of x"),
}


@pytest.mark.parametrize(("x", "weight", "dtype", "message"), BAD.values(), ids=BAD)
def test_bad_input(x, weight, dtype, message):
    with pytest.raises(RuntimeError, match="conv3x3: " + message):
        OP(torch.randn(x), torch.randn(weight).to(dtype), None)


def test_other_bad_input():
    x, weight, bias = operands(1, 20, 4, 4, 18)
    with pytest.raises(RuntimeError, match=r"conv3x3: bias.size\(0\) must be 18, got 17"):
        OP(x, weight, bias[:17])
    with pytest.raises(RuntimeError, match="conv3x3: x must be float32, bfloat16 or float16"):
        OP(x.double(), weight.double(), None)
    layer = vitkit.nn.Conv2d(20, 18, 3, padding=1).requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"expected input.* to have 20 channels"):
        layer(x[:, :19])
    with pytest.raises(RuntimeError):
        layer(x.double())


@every_dtype
def test_opcheck(dtype):
    x, weight, bias = operands(2, 16, 5, 6, 20, dtype)
    for arguments in ((x, weight, bias), (channels_last(x), channels_last(weight), None)):
        torch.library.opcheck(OP, arguments)


def layer_of(channels=16, columns=20, **options):
    torch.manual_seed(0)
    made = vitkit.nn.Conv2d(channels, columns, 3, padding=options.pop("padding", 1), **options)
    return made.requires_grad_(False)


def test_flops_are_those_torch_counts():
    totals = []
    for layer in (layer_of(), torch.nn.Conv2d(16, 20, 3, padding=1).requires_grad_(False)):
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(2, 16, 6, 5))
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] == 2 * 9 * 16 * 20 * 2 * 6 * 5


# ---- when it runs ----


def test_it_runs_where_nothing_speaks_against_it(monkeypatch):
    x, frozen = torch.randn(2, 16, 6, 5), layer_of()
    layer = copy.deepcopy(frozen).requires_grad_(True)
    assert calls(frozen, x)[1] == 1 and calls(layer_of(padding="same"), x)[1] == 1
    assert calls(layer, x)[1] == 1 and calls(frozen, x.clone().requires_grad_())[1] == 1
    with torch.inference_mode():
        assert calls(layer, x)[1] == 1
    assert calls(frozen, x[0])[1] == 0, "no batch"
    assert calls(frozen, x[:, :, :1])[1] == 0, "a row"
    assert calls(copy.deepcopy(frozen).double(), x.double())[1] == 0
    assert_it_runs_where_it_should("conv3x3", frozen, x, monkeypatch)


OTHERS = {
    "strided": (16, 16, {"stride": 2}),
    "unpadded": (16, 16, {"padding": 0}),
    "mirrored": (16, 16, {"padding_mode": "reflect"}),
    "dilated": (16, 16, {"dilation": 2, "padding": 2}),
    "groups": (16, 16, {"groups": 2}),
    "few_channels": (15, 16, {}),
    "few_columns": (16, 15, {}),
}


@pytest.mark.parametrize(("channels", "columns", "options"), OTHERS.values(), ids=OTHERS)
def test_other_convolutions_are_torchs(channels, columns, options):
    layer, x = layer_of(channels, columns, **options), torch.randn(2, channels, 6, 6)
    y, count = calls(layer, x)
    twin = torch.nn.Conv2d(channels, columns, 3, **({"padding": 1} | options))
    twin.load_state_dict(layer.state_dict())
    assert count == 0 and torch.equal(y, twin(x))
    assert not convolution.has_kernel(twin) and not vitkit.patch(twin).replaced


def test_transforms_and_subclasses_are_torchs():
    layer, x = layer_of(), torch.randn(3, 2, 16, 5, 4)
    assert torch.allclose(torch.vmap(layer)(x), torch.stack([layer(t) for t in x]), atol=1e-5)

    class Mine(torch.Tensor):
        pass

    layer.weight = torch.nn.Parameter(layer.weight.as_subclass(Mine), requires_grad=False)
    assert calls(layer, x[0])[1] == 0


# ---- patched ----


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(16, 24, 3, padding=1)
        self.down = torch.nn.Conv2d(24, 24, 3, stride=2, padding=1)
        self.second = torch.nn.Conv2d(24, 16, 3, padding="same", bias=False)

    def forward(self, x):
        return self.second(F.silu(self.down(F.silu(self.first(x)))))


def test_a_torch_layer_is_patched_and_back():
    model, x = Net(), torch.randn(2, 16, 9, 8)
    before, keys = model(x), list(model.state_dict())
    report = vitkit.patch(model)
    assert [(r.name, r.by) for r in report.replaced] == [
        ("first", "conv3x3"),
        ("second", "conv3x3"),
    ]
    with torch.no_grad():
        y, count = calls(model, x)
    assert count == 2 and torch.allclose(y, before, atol=1e-6)
    assert list(model.state_dict()) == keys
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(twin(x), y)
        assert vitkit.unpatch(twin) == 2 and type(twin.first) is torch.nn.Conv2d
        assert torch.equal(twin(x), before)


GRADIENTS = {
    "all": (True, True, True),
    "of_the_input": (True, False, False),
    "of_the_layer": (False, True, True),
    "of_the_bias": (False, False, True),
}


@every_dtype
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("wanted", GRADIENTS.values(), ids=GRADIENTS)
def test_gradients(wanted, last, dtype):
    given = operands(3, 24, 9, 7, 18, dtype)
    grad = operands(3, 18, 9, 7, 1)[0]
    layer = vitkit.nn.Conv2d(24, 18, 3, padding=1).to(dtype)

    def gradients(values, convolve):
        leaves = [v.detach().requires_grad_(w) for v, w in zip(values, wanted, strict=True)]
        y = convolve(*leaves)
        cotangent = grad.to(y.dtype)
        cotangent = channels_last(cotangent) if last else cotangent
        return torch.autograd.grad(y, [v for v in leaves if v.requires_grad], cotangent)

    def ours(x, weight, bias):
        y, count = calls(lambda x: layer._conv_forward(x, weight, bias), x)
        assert count == 1
        return y

    if last:
        given[:2] = (channels_last(t) for t in given[:2])
    with KernelCalls() as seen:
        found = gradients(given, ours)
    assert seen.counts["conv3x3_fwd"]["cpu"] == 1 + wanted[0]
    exact = gradients([t.double() for t in given], plain)
    eager = gradients([t.float() for t in given], plain)
    for a, e, truth in zip(found, eager, exact, strict=True):
        assert a.dtype == dtype
        assert_parity("gradient", a, e.to(dtype), truth, terms=9 * 24)


def test_gradients_of_gradients():
    given = [t.double().float() for t in operands(2, 16, 5, 4, 16)]
    layer = vitkit.nn.Conv2d(16, 16, 3, padding=1)

    def second(values, convolve):
        leaves = [v.detach().requires_grad_() for v in values]
        first = torch.autograd.grad(convolve(*leaves).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    found = second(given, layer._conv_forward)
    for a, e in zip(found, second([t.double() for t in given], plain), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=2e-3, atol=2e-3)


def test_a_patched_layer_trains_as_torch_does():
    model, x = Net(), torch.randn(2, 16, 9, 8)
    model(x).square().sum().backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    vitkit.patch(model)
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_it_compiles_in_one_graph(last, train):
    model, x = Net().requires_grad_(train), torch.randn(2, 16, 9, 8)
    if last:
        model, x = model.to(memory_format=LAST), channels_last(x)
    expected, targets = model(x), []
    if train:
        expected.square().sum().backward()
        wanted = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()

    def inductor(graph, example_inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend("inductor")(graph, example_inputs)

    vitkit.patch(model)
    torch._dynamo.reset()
    y = torch.compile(model, fullgraph=True, backend=inductor)(x)
    assert torch.allclose(y, expected, atol=1e-5)
    assert train or sum("conv3x3_fwd" in t for t in targets) == 2
    if train:
        with KernelCalls() as seen:
            y.square().sum().backward()
        assert seen.counts["conv3x3_fwd"]["cpu"] == 1, "the image itself has no gradient"
        for p, w in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(p.grad, w, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_hooks_and_parametrisations_are_honoured():
    model, x = Net().requires_grad_(False), torch.randn(2, 16, 9, 8)
    heard = []
    model.first.register_forward_hook(lambda *_: heard.append(1))
    torch.nn.utils.parametrizations.weight_norm(model.second)
    before = model(x)
    report = vitkit.patch(model)
    assert [r.name for r in report.replaced] == ["first"]
    assert torch.allclose(model(x), before, atol=1e-6) and len(heard) == 2
