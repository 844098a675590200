"""Linear layers and convolutions in half precision on a CPU without instructions for it."""

from __future__ import annotations

import copy
import pickle
import platform
import warnings

import pytest
import torch
from numerics import assert_parity

import vitkit
from vitkit._switch import Switch
from vitkit.models import create, list_models
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
    """A machine without such instructions and without a kernel, whatever this one has."""
    monkeypatch.setattr(products, "_is_quick_on_this_cpu", lambda: False)
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


@pytest.fixture
def seen(monkeypatch):
    """Dtypes of the products that torch computes."""
    dtypes = []
    inner = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, w, b=None: dtypes.append(x.dtype) or inner(x, w, b)
    )
    return dtypes


def test_products_really_are_in_float32(slow, seen):
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


@pytest.mark.parametrize("name", list_models())
def test_the_models_of_vitkit_need_no_patch_for_it(name, slow):
    model = create(name, reduced=True).bfloat16()
    assert not [r for r in vitkit.patch(model, dry_run=True).replaced if "float32" in r.by]


def test_a_backend_is_honoured(slow, seen):
    """The reference multiplies as torch does, and is what verify compares with."""
    torch.manual_seed(0)
    model = create("vit_s16", reduced=True).bfloat16().eval()
    plain = create("vit_s16", reduced=True, backend="reference").bfloat16().eval()
    plain.load_state_dict(model.state_dict())
    images = model.example_inputs(batch=1)[0].bfloat16()
    model(images)
    assert torch.float32 in seen
    seen.clear()
    plain(images)
    assert set(seen) == {torch.bfloat16}
    assert (
        "Linear" in Switch(model, "auto").own and "Linear" not in Switch(plain.float(), "auto").own
    )


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_whole_graphs_without_a_warning(dtype):
    """Of this machine's own choice."""
    layers = torch.nn.Sequential(vitkit.nn.Linear(8, 8), vitkit.nn.Linear(8, 4)).to(dtype)
    x = torch.randn(8, 8).to(dtype)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Dynamo detected")
        compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), layers(x))


def test_it_follows_what_torch_can_do():
    assert not products.products_are_slow(torch.float32, "cpu")
    assert not products.products_are_slow(torch.bfloat16, "cuda")
    if platform.machine() in ("x86_64", "AMD64"):
        fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        assert products.products_are_slow(torch.bfloat16, "cpu") == (not fast)
