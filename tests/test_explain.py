"""Explanations of a patched ViT are those of the unpatched one; rollout against the matrices."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import vitkit
from vitkit.demo import explain, rollout
from vitkit.verify import KernelCalls

pytest.importorskip("timm")
pytest.importorskip("sklearn")

SIZE = 24  # 6 x 6 patches, 4 x 4 tiles


@pytest.fixture(scope="module")
def model():
    return explain.small_vit(width=64, depth=2, size=SIZE).eval()


@pytest.fixture(scope="module")
def image():
    digit = explain.digits()[0][-1:].float()
    return torch.nn.functional.interpolate(digit, size=SIZE, mode="bilinear")[0]


def compare(name, model, image):
    with KernelCalls() as calls:
        found = explain.compare(name, model, image, 3, rounds=1)
    assert calls.total("flash_attention_fwd") > 0 and not vitkit.is_patched(model)
    assert found.parity.ok, f"{name}: {found.parity}"
    assert found.patched.shape == (SIZE, SIZE)
    assert found.patched.std() > 1e3 * found.parity.max_error, "an explanation of something"


@pytest.mark.parametrize("name", ["occlusion", "gradient x input", "attention rollout"])
def test_explanations_agree(name, model, image):
    compare(name, model, image)


@pytest.mark.parametrize("name", ["LIME", "SHAP"])
def test_those_of_the_packages_agree(name, model, image, monkeypatch):
    pytest.importorskip(name.lower())
    monkeypatch.setattr(explain, "SAMPLES", 60)
    compare(name, model, image)


def test_an_explanation_that_differs_is_found(model, image, monkeypatch):
    """A patched model that attends less sharply by 0.1 %."""
    plain = explain.METHODS["occlusion"]

    def changed(model, image, label):
        if not vitkit.is_patched(model):
            return plain(model, image, label)
        weight = model.blocks[1].attn.qkv.weight
        before = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(0.999)
        try:
            return plain(model, image, label)
        finally:
            with torch.no_grad():
                weight.copy_(before)

    monkeypatch.setitem(explain.METHODS, "occlusion", changed)
    assert not explain.compare("occlusion", model, image, 3, rounds=1).parity.ok


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_rollout_is_the_product_of_the_matrices(causal):
    torch.manual_seed(0)
    calls, product = [], torch.eye(9, dtype=torch.float64)
    for bias in (None, torch.randn(1, 3, 9, 9), torch.rand(9, 9) > 0.2):
        q, k = torch.randn(2, 2, 9, 3, 16)
        bias = bias.fill_diagonal_(True) if bias is not None and bias.dim() == 2 else bias
        call = rollout.AttentionCall(q, k, bias, causal, 0.25)
        calls.append(call)
        options = {"bias": bias, "causal": causal, "scale": 0.25}
        rows = vitkit.attention_map(q.double(), k.double(), list(range(9)), **options).mean(1)
        product = (rows + torch.eye(9)) / 2 @ product
    for row in (0, 5):
        found = rollout.rollout(calls, row)
        torch.testing.assert_close(found.double(), product[:, row], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(found.sum(1), torch.ones(2))


def test_calls_are_those_of_the_layers(model, image):
    with vitkit.patched(model), rollout.AttentionCalls() as seen, torch.no_grad():
        model(image[None])
    assert [tuple(c.q.shape) for c in seen.calls] == [(1, 37, 2, 32)] * 2


@pytest.mark.parametrize("shapes", [[], [(9, 8)], [(9, 9), (5, 5)]], ids=["none", "cross", "sizes"])
def test_bad_calls(shapes):
    calls = [
        rollout.AttentionCall(torch.randn(1, n, 1, 8), torch.randn(1, m, 1, 8), None, False, 1.0)
        for n, m in shapes
    ]
    with pytest.raises(ValueError, match="rollout: calls must be self-attention"):
        rollout.rollout(calls)


def test_the_picture_holds_every_explanation(image):
    values = torch.rand(SIZE, SIZE)
    none = explain.parity(values, values, values.double())
    found = [explain.Comparison(n, values, values, none, 2.0, 1.0, 2.0) for n in explain.METHODS]
    svg = explain.draw(image, found)
    assert all(f">{name}<" in svg for name in explain.METHODS) and ">2.00x as fast<" in svg


def test_examples_of_the_page():
    page = Path(__file__).resolve().parent.parent / "docs" / "explainability.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, page.name, "exec"), {})
