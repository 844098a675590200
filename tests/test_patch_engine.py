"""patch, unpatch, patched: what they change, what they leave, and that undoing is exact."""

from __future__ import annotations

import copy
import importlib
import io
import pickle

import pytest
import torch
from patching import assert_same_numbers, snapshot

import vitkit
from vitkit.patch.source import fingerprint, is_followed, unknown
from vitkit.verify import KernelCalls


class Mixed(torch.nn.Module):
    """A module of one's own around modules that rules know and modules they do not."""

    def __init__(self, channels=16):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, channels, 3, padding=1)
        self.norm = torch.nn.GroupNorm(4, channels)
        self.other = torch.nn.BatchNorm2d(channels)
        self.affineless = torch.nn.GroupNorm(2, channels, affine=False)

    def forward(self, x):
        x = torch.nn.functional.relu(self.norm(self.conv(x)))
        return self.affineless(self.other(x)).mean((2, 3))


class NormWithTwist(torch.nn.GroupNorm):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Mixed()


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_same_numbers_and_gradients(model, images, training):
    calls = assert_same_numbers(model.train(training), [images])
    assert calls.counts["group_norm_silu_fwd"] == {"cpu": 2}
    assert calls.counts["group_norm_silu_bwd"] == {"cpu": 2}


def test_undo_is_exact(model):
    model.norm.register_forward_hook(lambda m, i, o: None)
    before = snapshot(model)
    report = vitkit.patch(model)
    assert len(report.replaced) == 2 and vitkit.is_patched(model)
    assert snapshot(model) != before
    assert vitkit.unpatch(model) == 2
    assert snapshot(model) == before and not vitkit.is_patched(model)
    assert vitkit.unpatch(model) == 0


def test_second_patch_changes_nothing(model):
    vitkit.patch(model, backend="reference")
    once = snapshot(model)
    report = vitkit.patch(model)
    assert (report.replaced, report.skipped, report.already) == ([], [], 2)
    assert snapshot(model) == once
    assert "2 were patched before" in str(report)
    assert vitkit.patch(model, strict=True).already == 2


def test_state_dict_loads_both_ways(model, images):
    fresh = Mixed()
    vitkit.patch(model)
    assert list(model.state_dict()) == list(fresh.state_dict())
    fresh.load_state_dict(model.state_dict())
    model.load_state_dict(fresh.state_dict())


def test_patched_context_ends_unpatched_even_after_an_error(model):
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), vitkit.patched(model):
        assert vitkit.is_patched(model)
        1 / 0  # noqa: B018
    assert snapshot(model) == before
    vitkit.patch(model)
    with pytest.raises(ValueError, match="patched: model must not be patched already"):
        vitkit.patched(model).__enter__()


def test_dry_run_changes_nothing_and_reports_the_same(model):
    before = snapshot(model)
    dry = vitkit.patch(model, dry_run=True)
    assert snapshot(model) == before and "would replace 2" in str(dry)
    assert dry.replaced == vitkit.patch(model).replaced


def test_strict_refuses_before_anything_is_changed(model):
    model.twist = NormWithTwist(2, 16)
    before = snapshot(model)
    with pytest.raises(ValueError, match="strict must leave nothing"):
        vitkit.patch(model, strict=True)
    assert snapshot(model) == before
    del model.twist
    assert len(vitkit.patch(model, strict=True).replaced) == 2


def test_strict_refuses_a_model_with_nothing_to_replace():
    report = vitkit.patch(torch.nn.Bilinear(2, 2, 2))
    assert (report.replaced, report.skipped) == ([], [])
    with pytest.raises(ValueError, match="strict"):
        vitkit.patch(torch.nn.Bilinear(2, 2, 2), strict=True)


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        (("no module",), TypeError, "patch: model must be a torch.nn.Module, got str"),
        ((torch.nn.Linear(1, 1), "fastest"), ValueError, "patch: backend must be one of"),
    ],
    ids=["not_a_module", "unknown_backend"],
)
def test_bad_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        vitkit.patch(*arguments)


def _copied(model):
    return copy.deepcopy(model)


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [_copied, _pickled, _saved])
def test_copies_have_their_own_weights_and_can_be_unpatched(model, images, duplicate):
    vitkit.patch(model)
    expected = model.eval()(images)
    twin = duplicate(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    with KernelCalls() as calls:
        assert torch.equal(twin(images), expected)
    assert calls.total("group_norm_silu_fwd") == 2
    assert vitkit.unpatch(twin) == 2 and type(twin.norm) is torch.nn.GroupNorm
    assert vitkit.is_patched(model)


def test_hooks_on_a_replaced_module_still_run(model, images):
    seen = []
    model.norm.register_forward_pre_hook(lambda m, i: seen.append("before"))
    vitkit.patch(model)
    model.norm.register_forward_hook(lambda m, i, o: seen.append("after"))
    model(images)
    assert seen == ["before", "after"]


def test_the_backend_asked_for_is_the_one_called(model, images):
    for backend, kernels in (("cpu", 2), ("reference", 0), ("auto", 2)):
        with vitkit.patched(model, backend=backend) as report, KernelCalls() as calls:
            model(images)
        assert calls.total("group_norm_silu_fwd") == kernels and report.backend == backend
    with (
        vitkit.patched(model, backend="cuda"),
        pytest.raises(ValueError, match="backend 'cuda' cannot run: it runs on cuda tensors"),
    ):
        model(images)


def test_reasons_are_given():
    model = torch.nn.ModuleDict(
        {
            "subclass": NormWithTwist(2, 4),
            "overridden": torch.nn.GroupNorm(2, 4),
            "wide": torch.nn.GroupNorm(2, 4).double(),
            "fine": torch.nn.GroupNorm(2, 4),
        }
    )
    model["overridden"].forward = lambda x: x
    report = vitkit.patch(model)
    assert [r.name for r in report.replaced] == ["fine"]
    reasons = {s.name: s.reason for s in report.skipped}
    assert "a subclass of torch's GroupNorm" in reasons["subclass"]
    assert "its forward was replaced on the instance" in reasons["overridden"]
    assert "not float64" in reasons["wide"]
    assert "subclass" in str(report) and report.to_dict()["skipped"][0]["name"] == "subclass"


def test_no_kernel_no_replacement(model, monkeypatch):
    """Where only the reference could run, torch's own code is the better one: say so and leave."""
    from vitkit import _library
    from vitkit.nn import functional

    monkeypatch.setattr(functional, "_reasons", {})
    monkeypatch.setattr(_library, "native_kernel_error", lambda op, device: "not built")
    report = vitkit.patch(model)
    assert report.replaced == []
    assert "no kernel can run on cpu (cpu: not built)" in report.skipped[0].reason
    assert len(vitkit.patch(model, backend="reference").replaced) == 2


def test_a_model_moved_after_patching_runs_on_torch(model, images):
    """float64 has no kernels: the module falls back to torch's function, not to the reference."""
    vitkit.patch(model)
    with KernelCalls() as calls:
        patched = model.double().eval()(images.double())
    vitkit.unpatch(model)
    assert torch.equal(patched, model(images.double())) and calls.counts == {}


def test_unpatch_refuses_a_class_it_did_not_give(model):
    vitkit.patch(model)
    model.norm.__class__ = type("Sharded", (type(model.norm),), {})
    with pytest.raises(ValueError, match="unpatch: norm must have the class that patch gave it"):
        vitkit.unpatch(model)
    assert vitkit.is_patched(model.affineless)


def test_compiles_in_one_graph(model, images):
    vitkit.patch(model.eval())
    expected = model(images)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), expected)
    vitkit.unpatch(model)
    torch.testing.assert_close(compiled(images), model(images))


def test_report_prints_as_a_table(model):
    from rich.console import Console

    model.twist = NormWithTwist(2, 16)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(vitkit.patch(model))
    text = console.export_text()
    assert "replaced 2 modules, left 1" in text and "left: a subclass of torch's" in text


# ---- fingerprints of host functions ----


def _sample(x, y: int = 2):
    """A docstring."""
    # a comment
    return x + y


def _same_sample(x, y=2):
    return x + y


def _other_sample(x, y=2):
    return x - y


def test_fingerprint_sees_only_what_runs():
    assert fingerprint(_sample) == fingerprint(_same_sample)
    assert fingerprint(_sample) != fingerprint(_other_sample)
    assert fingerprint(len) is None


def test_unknown_host_version_is_a_reason():
    known = {fingerprint(_sample): "1.0"}
    assert unknown(_same_sample, known) is None
    assert "changed _other_sample; known are those of" in unknown(_other_sample, known)


@pytest.mark.parametrize("host", ["timm", "diffusers"])
def test_the_installed_hosts_are_known(host):
    pytest.importorskip(host)
    rules = importlib.import_module("vitkit.patch.engine")._rules_of(host)
    assert [r.why_not() for r in rules] == [None] * len(rules)


def test_a_host_whose_rules_cannot_be_loaded_is_named(monkeypatch):
    timm = pytest.importorskip("timm")
    engine = importlib.import_module("vitkit.patch.engine")
    engine._rules_of.cache_clear()
    monkeypatch.setitem(engine.HOSTS, "timm", "absent")
    report = vitkit.patch(timm.layers.Attention(16, 2))
    engine._rules_of.cache_clear()
    assert "the rules for timm cannot be loaded: No module named" in report.skipped[0].reason


AFTER_BRANCHES = """
if y is None:
    x = self.norm(x)
else:  # a comment
    x = self.norm(x, y)

x = self.act(x)
return x
"""


@pytest.mark.parametrize(
    "source, expected",
    [
        (AFTER_BRANCHES, True),
        ("x = self.norm(x)\nx = self.act(x)", True),
        ("x = self.norm(x)\nx = x + 1\nx = self.act(x)", False),
        ("y = self.norm(x)\nx = self.act(x)", False),
        ("x = self.norm(x)\nx = self.act(x)\nx = self.act(x)", False),
        ("x = self.norm(x)\nx = self.act(x) + x", False),
        ("x = self.act(x)\nx = self.norm(x)", False),
        (None, False),
    ],
    ids=[
        "branches",
        "plain",
        "something_between",
        "other_variable",
        "used_twice",
        "result_changed",
        "other_order",
        "no_source",
    ],
)
def test_is_followed_reads_the_source(source, expected):
    assert is_followed(source, "norm", "act") is expected
