"""What patch promises of every host: kernels called, numbers and gradients kept in eval and in
train mode, the state_dict left as it was, copies that keep the patch, an exact undo, one graph
under torch.compile, checkpointing and LoRA."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from numerics import assert_parity
from patch_hosts import CASES
from patching import assert_same_numbers, floating, in_double, run, snapshot
from torch.utils.checkpoint import checkpoint

import vitkit
from vitkit.verify import KernelCalls

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
every_host = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def forwards(calls):
    return {op.removesuffix("_fwd"): calls.total(op) for op in calls.counts if op.endswith("_fwd")}


def output(model, case, cast=list):
    torch.manual_seed(0)
    names, values = list(case.kwargs), list(case.kwargs.values())
    with torch.no_grad():
        return floating(model(*cast(case.inputs), **dict(zip(names, cast(values), strict=True))))


@every_host
def test_same_numbers_and_gradients(case):
    """In train mode with gradients, in eval mode without, where hosts take other paths."""
    model = case.model()
    before = snapshot(model)
    calls = assert_same_numbers(model.train(), case.inputs, case.kwargs)
    assert forwards(calls).items() >= case.kernels.items()
    attention = next(iter(case.kernels))
    assert calls.total(f"{attention}_bwd") == case.kernels[attention]

    exact = output(copy.deepcopy(model.eval()).double(), case, in_double)
    eager = output(model, case)
    with vitkit.patched(model), KernelCalls() as calls:
        actual = output(model, case)
    assert calls.total(f"{attention}_fwd") == case.kernels[attention]
    for i, (a, e, x) in enumerate(zip(actual, eager, exact, strict=True)):
        assert_parity(f"output {i}", a, e, x, terms=1024)
    assert snapshot(model) == before


@every_host
def test_state_copies_and_a_second_patch(case):
    model = case.model()
    before = snapshot(model)
    vitkit.patch(model)
    assert snapshot(model)[1:] == before[1:]  # the state_dict and the parameters
    with KernelCalls() as calls:
        once, expected = snapshot(model), output(model, case)
    again = vitkit.patch(model, backend="reference")
    assert again.replaced == [] and again.already > 0 and snapshot(model) == once
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with KernelCalls() as found:
            assert all(map(torch.equal, output(twin, case), expected))
        assert found.counts == calls.counts
        assert vitkit.unpatch(twin) > 0 and not vitkit.is_patched(twin)
    assert vitkit.unpatch(model) > 0 and snapshot(model) == before
    assert vitkit.unpatch(model) == 0 and snapshot(model) == before


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.compiles])
def test_compiles_in_one_graph(name):
    case = CASES[name]
    model = case.model()
    vitkit.patch(model)
    expected = output(model, case)
    targets = []

    def record(graph, example_inputs):
        for node in graph.graph.nodes:
            # A projection may compute the GELU behind it.
            fused = "vitkit.linear_fwd" in str(node.target) and node.args[3]
            targets.append("vitkit.gelu_fwd" if fused else str(node.target))
        return graph

    torch._dynamo.reset()
    found = output(torch.compile(model, fullgraph=True, backend=record), case)
    torch.testing.assert_close(found, expected)
    for op, count in case.kernels.items():
        assert sum(f"vitkit.{op}_fwd" in t for t in targets) == count


class Checkpointed(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *inputs, **kwargs):
        return checkpoint(self.model, *inputs, use_reentrant=False, **kwargs)


@every_host
def test_checkpointed(case):
    """Recomputed on the kernels, to the same bits."""
    model = case.model().train()
    vitkit.patch(model)
    expected = run(model, case.inputs, case.kwargs)
    with KernelCalls() as calls:
        found = run(Checkpointed(model), case.inputs, case.kwargs)
    assert all(map(torch.equal, found.values(), expected.values()))
    assert len(found) == len(expected)
    attention = next(iter(case.kernels))
    assert forwards(calls)[attention] == 2 * case.kernels[attention]


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.lora])
def test_lora(name):
    """Adapters that change what they are on; put on before the patch, and after it."""
    peft = pytest.importorskip("peft")
    case = CASES[name]
    config = peft.LoraConfig(r=2, target_modules=list(case.lora), init_lora_weights=False)
    attention = next(iter(case.kernels))

    def adapted(model):
        torch.manual_seed(1)
        return peft.inject_adapter_in_model(config, model).eval()

    model = adapted(case.model())
    report = vitkit.patch(model, dry_run=True)
    if case.left:
        assert sum(case.left in s.reason for s in report.skipped) == case.kernels[attention]
        return
    expected, plain = run(model, case.inputs, case.kwargs), output(case.model(), case)
    assert (expected["output 0"] - plain[0]).abs().max() > 1e-4
    assert any("lora_A" in name for name in expected)
    later = case.model()
    vitkit.patch(later)
    vitkit.patch(model)
    for patched in (model, adapted(later)):
        with KernelCalls() as calls:
            found = run(patched, case.inputs, case.kwargs)
        assert forwards(calls)[attention] == case.kernels[attention]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
