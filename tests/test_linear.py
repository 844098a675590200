"""vitkit::linear_fwd and the layers on it: numbers, when it runs, what it refuses."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from numerics import DTYPES, assert_parity
from patching import assert_it_runs_where_it_should, counted
from torch.utils.flop_counter import FlopCounterMode

import vitkit
import vitkit.nn
from vitkit.nn import products
from vitkit.verify import KernelCalls

OP = torch.ops.vitkit.linear_fwd
calls = functools.partial(counted, "linear")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The kernel is the quickest everywhere, whatever CPU this is."""
    monkeypatch.setattr(products, "_is_quick_on_this_cpu", lambda: True)


def operands(rows, depth, columns, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, depth), (columns, depth), (columns,))
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


def plain(x, weight, bias, activation):
    y = F.linear(x, weight, bias)
    return y if activation is None else F.gelu(y, approximate=activation)


SHAPES = {
    "vit_mlp": (197, 96, 384),
    "swin_patches": (3136, 48, 96),
    "odd": (17, 33, 21),
    "one": (1, 1, 1),
    "class_head": (4, 64, 1000),
    "several_groups": (50, 1030, 700),
    "several_ranges": (3100, 40, 24),
}


@every_dtype
@pytest.mark.parametrize("activation", [None, "none", "tanh"], ids=["linear", "erf", "tanh"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_parity(shape, activation, dtype):
    x, weight, bias = operands(*shape, dtype)
    weight = weight / shape[1] ** 0.5
    for b in (bias, None):
        y = OP(x, weight, b, activation is not None, activation == "tanh")
        exact = plain(*(t if t is None else t.double() for t in (x, weight, b)), activation)
        assert y.dtype == dtype
        assert_parity("y", y, plain(x, weight, b, activation), exact, terms=shape[1])


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512", "amx"])
def test_every_instruction_set(cpu_isa, isa):
    cpu_isa(isa)
    for dtype in DTYPES:
        for shape in ((17, 33, 21), (50, 1030, 70)):
            x, weight, bias = operands(*shape, dtype)
            exact = F.linear(x.double(), weight.double(), bias.double())
            eager = F.linear(x, weight, bias)
            y = OP(x, weight, bias, False, False)
            assert_parity(f"y of {shape}", y, eager, exact, terms=shape[1])


def test_a_row_is_the_same_alone_and_among_others_on_any_number_of_threads():
    x, weight, bias = operands(3100, 96, 200)
    threads = torch.get_num_threads()
    whole = OP(x, weight, bias, True, False)
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            assert torch.equal(OP(x, weight, bias, True, False), whole)
    finally:
        torch.set_num_threads(threads)
    for rows in (1, 2, 7, 49):
        assert torch.equal(OP(x[:rows], weight, bias, True, False), whole[:rows])


@every_dtype
def test_nan_and_infinity_stay_in_their_rows(dtype):
    x, weight, bias = operands(15, 40, 24, dtype)
    x[3, 7], x[14, 0] = torch.nan, torch.inf
    y = OP(x, weight, bias, False, False)
    expected = F.linear(x, weight, bias)
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())
    assert y[14].isinf().all() and y[3].isnan().all() and y[:3].isfinite().all()


def test_rows_and_weights_with_strides():
    wide, weight, bias = operands(9, 80, 24)
    x, half = wide[:, 40:], torch.cat([weight, weight], 1)[:, 20:60]
    expected = OP(x.contiguous(), half.contiguous(), bias, False, False)
    assert torch.equal(OP(x, half, bias, False, False), expected)
    assert torch.equal(
        OP(x[:1].expand(5, -1), half, bias, False, False), expected[:1].expand(5, -1)
    )
    assert torch.equal(OP(x[2], half, bias[::1], False, False), expected[2])
    layer = vitkit.nn.Linear(40, 24).requires_grad_(False)
    turned = torch.randn(40, 5).t()
    assert torch.equal(layer(turned), layer(turned.contiguous()))


def test_empty():
    weight, bias = torch.randn(6, 4), torch.randn(6)
    assert OP(torch.empty(0, 4), weight, bias, False, False).shape == (0, 6)
    assert OP(torch.randn(2, 3, 4), weight[:0], bias[:0], False, False).shape == (2, 3, 0)
    layer = vitkit.nn.Linear(0, 3).requires_grad_(False)
    assert torch.equal(layer(torch.empty(5, 0)), layer.bias.expand(5, 3))


BAD = {
    "depth": ((8, 5), (3, 4), torch.float32, r"weight.size\(1\) must be 5, got 4"),
    "rank": ((8, 5), (3, 4, 5), torch.float32, "weight must have 2 dimensions, got 3"),
    "dtype": ((8, 5), (3, 5), torch.bfloat16, "weight must have the dtype of x"),
    "scalar": ((), (3, 5), torch.float32, "x must have at least one dimension"),
}


@pytest.mark.parametrize(("x", "weight", "dtype", "message"), BAD.values(), ids=BAD)
def test_bad_input(x, weight, dtype, message):
    with pytest.raises(RuntimeError, match="linear: " + message):
        OP(torch.randn(x), torch.randn(weight).to(dtype), None, False, False)


def test_other_bad_input():
    x, weight, bias = operands(8, 5, 3)
    with pytest.raises(RuntimeError, match=r"linear: bias.size\(0\) must be 3, got 2"):
        OP(x, weight, bias[:2], False, False)
    with pytest.raises(RuntimeError, match="linear: x must be float32, bfloat16 or float16"):
        OP(x.double(), weight.double(), None, False, False)
    with pytest.raises(RuntimeError, match="stride 1 in its last dimension"):
        OP(torch.randn(5, 8).t(), weight, None, False, False)
    layer = vitkit.nn.Linear(5, 3).requires_grad_(False)
    with pytest.raises(RuntimeError):
        layer(torch.randn(8, 4))
    with pytest.raises(RuntimeError):
        layer(x.double())


@every_dtype
def test_opcheck(dtype):
    x, weight, bias = operands(6, 16, 8, dtype)
    for arguments in ((x, weight, bias, False, False), (x[None], weight, None, True, True)):
        torch.library.opcheck(OP, arguments)


def test_flops_are_those_of_the_product():
    layer = vitkit.nn.Linear(16, 8).requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(6, 16))
    assert counter.get_total_flops() == 2 * 6 * 16 * 8


# ---- when it runs ----


def test_it_runs_where_nothing_speaks_against_it(monkeypatch):
    layer = vitkit.nn.Linear(16, 8)
    x = torch.randn(3, products.FEW_ROWS, 16)
    frozen = copy.deepcopy(layer).requires_grad_(False)
    assert calls(frozen, x)[1] == 1
    assert calls(layer, x)[1] == 0 and calls(frozen, x.clone().requires_grad_())[1] == 0
    with torch.no_grad():
        assert calls(layer, x)[1] == 1
    with torch.inference_mode():
        assert calls(layer, x)[1] == 1
    assert calls(frozen, x[0, 1:])[1] == 0, "too few rows"
    assert calls(frozen.double(), x.double())[1] == 0
    frozen = frozen.float()
    assert_it_runs_where_it_should("linear", frozen, x, monkeypatch)


def test_transforms_and_subclasses_are_torchs():
    layer = vitkit.nn.Linear(16, 8).requires_grad_(False)
    x = torch.randn(3, 5, 16)
    assert torch.allclose(torch.vmap(layer)(x), layer(x), atol=1e-5)
    jacobian = torch.func.jacrev(lambda x: layer(x).sum(0))(x[0])
    assert torch.allclose(jacobian[0, 0], layer.weight[0])

    class Mine(torch.Tensor):
        pass

    layer.weight = torch.nn.Parameter(layer.weight.as_subclass(Mine), requires_grad=False)
    assert calls(layer, x)[1] == 0
    plain = vitkit.nn.Linear(16, 8).requires_grad_(False)
    y = plain(x[0])
    plain.weight = torch.nn.Parameter(plain.weight.to_sparse_csr(), requires_grad=False)
    assert torch.allclose(plain(x[0]), y, atol=1e-6)


def test_a_torch_layer_is_patched_and_back():
    layers = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 4, bias=False))
    x = torch.randn(5, 16)
    before = layers(x)
    report = vitkit.patch(layers)
    assert [r.by for r in report.replaced] == ["linear", "linear"]
    with torch.no_grad():
        y, count = calls(layers, x)
    assert count == 2 and torch.allclose(y, before, atol=1e-6)
    assert vitkit.unpatch(layers) == 2 and type(layers[0]) is torch.nn.Linear


def test_a_patched_layer_trains_as_torch_does():
    layer = torch.nn.Linear(16, 8)
    x = torch.randn(5, 16)
    layer(x).sum().backward()
    wanted = layer.weight.grad.clone()
    layer.zero_grad()
    vitkit.patch(layer)
    layer(x).sum().backward()
    assert torch.equal(layer.weight.grad, wanted)


# ---- with the activation ----


def mlps():
    timm = pytest.importorskip("timm")
    tanh = timm.layers.GELUTanh
    yield vitkit.nn.Mlp(16, 24), True
    yield vitkit.nn.Mlp(16, 24, approximate="tanh", bias=False), True
    yield timm.layers.Mlp(16, 24), True
    yield timm.layers.Mlp(16, 24, act_layer=tanh, norm_layer=torch.nn.LayerNorm, drop=0.1), True
    yield timm.layers.Mlp(16, 24, act_layer=torch.nn.ReLU), False


def test_an_mlp_computes_its_gelu_with_the_projection():
    x = torch.randn(2, 9, 16)
    for mlp, fused in mlps():
        mlp = mlp.eval().requires_grad_(False)
        exact = copy.deepcopy(mlp).double()(x.double())
        vitkit.patch(mlp)
        with KernelCalls() as seen:
            y = mlp(x)
        assert seen.counts["linear_fwd"] == {"cpu": 2}
        assert "gelu_fwd" not in seen.counts
        assert torch.allclose(y.double(), exact, atol=1e-5), mlp
        # Whoever watches a part, or puts another in its place, finds it called.
        heard = []
        hook = mlp.act.register_forward_hook(lambda *_, heard=heard: heard.append(1))
        assert torch.allclose(mlp(x), y, atol=1e-6) and heard
        hook.remove()
        mlp.fc1 = torch.nn.Sequential(mlp.fc1)
        with KernelCalls() as seen:
            assert torch.allclose(mlp(x), y, atol=1e-6)
        assert ("gelu_fwd" in seen.counts) == fused


@every_dtype
def test_compiled_whole(dtype):
    mlp = vitkit.nn.Mlp(16, 24).to(dtype).requires_grad_(False)
    x = torch.randn(5, 16).to(dtype)
    targets = []

    def backend(graph, inputs):
        targets.extend(n.target for n in graph.graph.nodes if n.op == "call_function")
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(mlp, fullgraph=True, backend=backend)
    assert torch.equal(compiled(x), mlp(x))
    assert targets.count(OP) == 2
