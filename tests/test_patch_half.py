"""Linear layers and convolutions in half precision on a CPU without instructions for it."""

from __future__ import annotations

import copy
import pickle
import platform

import pytest
import torch
from numerics import assert_parity

import vitkit
from vitkit.nn import products

HALF = (torch.bfloat16, torch.float16)
LAYERS = {
    "linear": (torch.nn.Linear(40, 24), (2, 5, 40)),
    "linear_without_bias": (torch.nn.Linear(40, 24, bias=False), (9, 40)),
    "conv1d": (torch.nn.Conv1d(6, 8, 3, padding=1), (2, 6, 11)),
    "conv2d_of_groups": (torch.nn.Conv2d(8, 8, 3, stride=2, groups=4), (2, 8, 9, 7)),
    "conv2d_mirrored": (torch.nn.Conv2d(4, 6, 3, 1, 1, padding_mode="reflect"), (2, 4, 6, 5)),
    "conv3d": (torch.nn.Conv3d(3, 5, 2), (1, 3, 4, 5, 6)),
}  # fmt: skip


@pytest.fixture
def slow(monkeypatch):
    """A machine without such instructions, whatever this one has."""
    monkeypatch.setattr(
        products, "products_are_slow", lambda dtype, device: dtype in HALF and device == "cpu"
    )


def outcome(layer, x, grad):
    x = x.detach().clone().requires_grad_()
    out = layer(x)
    tensors = [x, *layer.parameters()]
    return [out.detach(), *torch.autograd.grad(out, tensors, grad)]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", LAYERS)
def test_the_error_is_that_of_one_rounding(slow, name, dtype):
    layer, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = copy.deepcopy(layer).to(dtype), torch.randn(shape).to(dtype)
    grad = torch.randn_like(layer(x))
    eager = outcome(layer, x, grad)
    exact = outcome(copy.deepcopy(layer).double(), x.double(), grad.double())
    report = vitkit.patch(layer)
    assert [r.by for r in report.replaced] == ["products in float32"]
    found = outcome(layer, x, grad)
    for what, a, e, w in zip(("out", "dx", "dweight", "dbias"), found, eager, exact, strict=False):
        assert a.dtype == dtype
        assert_parity(what, a, e, w, dtype=dtype, terms=100)
    # The output itself is the exact one, rounded.
    eps = torch.finfo(dtype).eps
    assert ((found[0].double() - exact[0]).abs() <= 0.51 * eps * exact[0].abs() + 1e-5).all()


def test_products_really_are_in_float32(slow, monkeypatch):
    seen = []
    inner = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, w, b=None: seen.append(x.dtype) or inner(x, w, b)
    )
    layer = torch.nn.Linear(16, 8).bfloat16()
    vitkit.patch(layer)
    layer(torch.randn(products.FEW_ROWS, 16).bfloat16())
    layer(torch.randn(products.FEW_ROWS - 1, 16).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(64, 16).bfloat16())
    layer.float()(torch.randn(64, 16))
    assert seen == [torch.float32, torch.bfloat16, torch.bfloat16, torch.float32]


def test_what_it_does_not_touch(slow, monkeypatch):
    class Mine(torch.nn.Linear):
        pass

    assert not vitkit.patch(torch.nn.Linear(16, 8)).replaced
    report = vitkit.patch(torch.nn.Sequential(Mine(16, 8).bfloat16()))
    assert not report.replaced and not report.skipped
    monkeypatch.setattr(products, "products_are_slow", lambda *_: False)
    assert not vitkit.patch(torch.nn.Linear(16, 8).bfloat16()).replaced


def test_a_patched_layer_is_one_like_any_other(slow):
    """Copies, pickles, the state_dict, and back."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(64, 5)
    )
    model = model.bfloat16()
    x = torch.randn(4, 3, 6, 6).bfloat16()
    before, keys = model(x), list(model.state_dict())
    vitkit.patch(model, strict=True)
    after = model(x)
    assert list(model.state_dict()) == keys and isinstance(model[2], torch.nn.Linear)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), after) and vitkit.unpatch(twin) == 2
        assert torch.equal(twin(x), before)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), after)


def test_it_follows_what_torch_can_do():
    assert not products.products_are_slow(torch.float32, "cpu")
    assert not products.products_are_slow(torch.bfloat16, "cuda")
    if platform.machine() in ("x86_64", "AMD64"):
        fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        assert products.products_are_slow(torch.bfloat16, "cpu") == (not fast)
