"""vitkit.verify must say no when the numbers, or the run, are wrong."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

import vitkit
import vitkit.nn
from vitkit.layer_errors import layer_errors
from vitkit.ops import group_norm_silu as op


class Block(torch.nn.Module):
    """A module vitkit replaces (torch.nn.GroupNorm), in a model with a layer it does not."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.norm = torch.nn.GroupNorm(2, 8)
        self.noise = noise

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.norm(self.conv(x))
        return {"features": y + self.noise * torch.randn_like(y), "mean": y.mean((2, 3))}


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(2, 3, 6, 5)


def test_the_same_numbers(x):
    model = Block()
    result = vitkit.verify(model, x, seconds=0.01)
    assert result.ok and not result.problems
    assert [o.name for o in result.outputs] == ["output['features']", "output['mean']"]
    assert [o.shape for o in result.outputs] == [(2, 8, 6, 5), (2, 8)]
    assert result.kernel_calls == {"group_norm_silu_fwd": {"cpu": 1}}
    assert result.backend == "cpu" and result.rounds >= 5
    assert result.worst in result.outputs
    assert not vitkit.is_patched(model) and model.training
    assert result.to_dict()["ok"] is True


def test_a_wrong_kernel_is_found(x, monkeypatch):
    right = op.group_norm_silu
    monkeypatch.setattr(op, "group_norm_silu", lambda *a, **k: right(*a, **k) * 1.001)
    result = vitkit.verify(Block(), x, seconds=0.01)
    assert not result.ok
    assert "output['features']: " in result.problems[0]
    assert "NOT the same numbers" in str(result)


def test_random_numbers_prove_nothing(x):
    result = vitkit.verify(Block(noise=3.0), x, seconds=0.01)
    assert not result.ok
    assert "does the model draw random numbers?" in str(result)


def test_a_replaced_module_that_is_never_called_is_reported(x):
    class Idle(Block):
        def forward(self, x):
            return self.conv(x)

    result = vitkit.verify(Idle(), x, seconds=0.01)
    assert result.problems == ["modules were replaced, but no kernel ran"]


def test_backend_reference_needs_no_kernel(x):
    result = vitkit.verify(Block(), x, backend="reference", seconds=0.01)
    assert result.ok and result.backend == "reference" and result.kernel_calls == {}


def test_a_failing_model_is_left_unpatched_in_its_own_mode(x):
    class Failing(Block):
        def forward(self, x):
            if vitkit.is_patched(self):
                raise RuntimeError("only when patched")
            return self.norm(self.conv(x))

    model = Failing()
    with pytest.raises(RuntimeError, match="only when patched"):
        vitkit.verify(model, x, seconds=0.01)
    assert not vitkit.is_patched(model) and model.training


def test_what_cannot_be_verified_is_refused(x):
    model = Block()
    vitkit.patch(model)
    with pytest.raises(ValueError, match="model must not be patched already"):
        vitkit.verify(model, x)

    class Integers(torch.nn.Module):
        def forward(self, x):
            return x.argmax()

    with pytest.raises(ValueError, match="model must return floating point tensors, got Tensor"):
        vitkit.verify(Integers(), x)


def test_inputs_may_be_nested_and_named():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.GroupNorm(2, 4)

        def forward(self, pair, *, scale):
            return self.norm(pair[0] + pair[1]["x"]) * scale

    pair = (torch.randn(1, 4, 3, 3), {"x": torch.randn(1, 4, 3, 3)})
    assert vitkit.verify(Two(), pair, scale=torch.tensor(2.0), seconds=0.01).ok


def test_the_speed_up_is_that_of_neighbouring_calls(x, monkeypatch):
    """A machine that halves its speed in the middle changes the times, not the ratio."""
    import importlib

    module = importlib.import_module("vitkit.verify")  # vitkit.verify is the function
    model, clock = Block(), [0.0]
    calls = []

    def tick():
        return clock[0]

    def call():
        calls.append(vitkit.is_patched(model))
        slow = 2.0 if len(calls) > 5 else 1.0
        clock[0] += slow * (1.0 if vitkit.is_patched(model) else 1.5)

    monkeypatch.setattr(module.time, "perf_counter", tick)
    ways = {
        "unpatched": (lambda: vitkit.unpatch(model), call),
        "patched": (lambda: vitkit.patch(model), call),
    }
    timings, rounds = module._take_turns(ways, 0.0, tick, False)
    after = timings["patched"]
    assert rounds == 5 and after.speedup == 1.5 and timings["unpatched"].speedup == 1.0
    assert after.spread == (0.75, 1.5)
    assert calls[:4] == [False, True, True, False], "the order changes from round to round"
    assert timings["unpatched"].seconds == 1.5 and after.seconds == 2.0


# ---- modules of vitkit's own ----


class Own(torch.nn.Module):
    """One module of vitkit.nn, one that patching replaces."""

    def __init__(self):
        super().__init__()
        self.mlp = vitkit.nn.GEGLU(8, 8)
        self.norm = torch.nn.GroupNorm(1, 8)

    def forward(self, x):
        return self.norm(self.mlp(x).transpose(1, 2))


def test_modules_of_vitkits_own_are_compared_with_the_reference(monkeypatch):
    model, tokens = Own(), torch.randn(2, 5, 8)
    result = vitkit.verify(model, tokens, seconds=0, strict=True)
    assert result.ok and result.own["GEGLU"] == 1 and len(result.report.replaced) == 1
    assert set(result.kernel_calls) - {"linear_fwd"} == {"geglu_fwd", "group_norm_silu_fwd"}
    assert "vitkit on backend reference" in str(result) and result.timings == {}
    assert all("vitkit_backend" not in m.__dict__ for m in model.modules())
    model.mlp.vitkit_backend = "reference"
    result = vitkit.verify(model, tokens, seconds=0)
    assert result.ok and {r.name for r in result.report.replaced} == {"mlp", "norm"}
    assert "geglu_fwd" in result.kernel_calls and model.mlp.vitkit_backend == "reference"


# ---- training, compiling, strict ----


class Trained(Block):
    """With statistics that a call changes, a dropout, and a parameter without a gradient."""

    def __init__(self):
        super().__init__()
        self.batch_norm = torch.nn.BatchNorm2d(3)
        self.dropout = torch.nn.Dropout(0.5)
        self.conv.bias.requires_grad_(False)

    def forward(self, x):
        return super().forward(self.dropout(self.batch_norm(x)))


def test_gradients_in_train_mode(x, monkeypatch):
    model = Trained()
    before = copy.deepcopy(model.state_dict())
    result = vitkit.verify(model, x, train=True, seconds=0.01)
    assert result.ok, result
    names = {g.name.removeprefix("gradient of ") for g in result.gradients}
    assert names == {n for n, _ in model.named_parameters()} - {"conv.bias"} | {"input[0][0]"}
    assert result.kernel_calls["group_norm_silu_bwd"] == {"cpu": 1}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and model.dropout.training
    assert all(p.grad is None for p in model.parameters())

    right = op.group_norm_silu

    class Biased(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, d):
            return d * 1.001

    monkeypatch.setattr(op, "group_norm_silu", lambda *a, **k: Biased.apply(right(*a, **k)))
    result = vitkit.verify(model, x, train=True, seconds=0)
    assert all(o.parity.ok for o in result.outputs)
    assert "gradient of norm.weight: max error" in " ".join(result.problems)
    with pytest.raises(ValueError, match="train must have outputs that depend"):
        vitkit.verify(Constant(), torch.arange(3), train=True, seconds=0)


def test_most_gradients_must_have_a_yardstick(x):
    """A gradient that is rounding alone may be far off; where most are, nothing is proven."""
    result = vitkit.verify(Block(), x, train=True, seconds=0)
    far = [dataclasses.replace(g, eager_l2_error=0.5) for g in result.gradients]
    mixed = dataclasses.replace(result, gradients=far[:2] + result.gradients[2:])
    assert mixed.ok and len(far) == 5
    bad = dataclasses.replace(result, gradients=far[:3] + result.gradients[3:])
    assert bad.problems[0].startswith("3 of 5 gradients of the unpatched run are far from float64")


class Constant(torch.nn.Module):
    def forward(self, x):
        return x.float()


def test_four_columns_of_speed(x, monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda m: compiled(m, backend="eager"))
    result = vitkit.verify(Block(), x, compiled=True, seconds=0.01)
    assert result.ok, result
    columns = ["unpatched", "patched", "compiled", "patched, compiled"]
    assert list(result.timings) == columns and result.timings["unpatched"].speedup == 1.0
    assert all(t.seconds > 0 and t.peak_bytes > 0 for t in result.timings.values())
    names = [o.name for o in result.outputs]
    assert names[2:] == [f"patched, compiled: {n}" for n in names[:2]]


@pytest.mark.parametrize("ours", [True, False], ids=["patched_only", "unpatched_too"])
def test_what_does_not_compile_is_said(x, monkeypatch, ours):
    """It is held against the patch only where the unpatched model compiles."""

    def broken(model):
        def call(*args):
            raise RuntimeError("no such operator\nand a long trace")

        call.named_parameters = model.named_parameters
        return call if vitkit.is_patched(model) or not ours else model

    monkeypatch.setattr(torch, "compile", broken)
    result = vitkit.verify(Block(), x, compiled=True, seconds=0)
    said = "patched, compiled: RuntimeError: no such operator"
    assert result.problems == ([said] if ours else [])
    assert ours or (result.notes[1] == said and f"not run: {said}" in str(result))


def test_strict_leaves_nothing(x):
    plain = torch.nn.Conv2d(3, 4, 1)
    result = vitkit.verify(plain, x, seconds=0)
    assert result.ok and "nothing to verify: no module has a kernel" in str(result)
    with pytest.raises(ValueError, match="verify: strict must leave nothing, got"):
        vitkit.verify(plain, x, strict=True)


# ---- layers ----


def test_the_layer_a_wrong_kernel_is_in_is_found(x, monkeypatch):
    model = torch.nn.Sequential(Block(), torch.nn.Identity(), Block()).eval()
    model[1].forward = lambda out: out["features"][:, :3]
    right, calls = op.group_norm_silu, []

    def wrong_the_second_time(*args, **kwargs):
        calls.append(1)
        return right(*args, **kwargs) * (1.01 if len(calls) == 2 else 1.0)

    assert [e.name for e in layer_errors(model, x)] == ["0", "2"]
    monkeypatch.setattr(op, "group_norm_silu", wrong_the_second_time)
    first, second = layer_errors(model, x)
    assert first.patched <= first.limit and second.patched > second.limit
    assert second.patched == pytest.approx(0.01, rel=0.2) and second.eager <= second.limit
    assert not vitkit.is_patched(model) and math.isfinite(first.eager)
