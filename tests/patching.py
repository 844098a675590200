"""What every patch test asserts: same numbers and gradients, kernels really called, exact undo."""

from __future__ import annotations

import copy

import torch
from numerics import assert_parity

import vitkit
from vitkit.nn import products
from vitkit.verify import KernelCalls


def floating(outputs):
    """The floating tensors among a host's outputs (tuples, dataclasses, dicts)."""
    leaves = torch.utils._pytree.tree_leaves(
        dict(outputs) if isinstance(outputs, dict) else outputs
    )
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]


def run(model, inputs, kwargs=None, seed=0):
    """Outputs and the gradients of every parameter and floating input, by name."""
    inputs = [
        t.detach().clone().requires_grad_() if torch.is_tensor(t) and t.is_floating_point() else t
        for t in inputs
    ]
    model.zero_grad()
    torch.manual_seed(seed)
    outputs = floating(model(*inputs, **(kwargs or {})))
    found = {f"output {i}": o for i, o in enumerate(outputs)}
    loss = sum((o * _cotangent(o)).sum() for o in outputs)
    loss.backward()
    for i, t in enumerate(inputs):
        if torch.is_tensor(t) and t.requires_grad:
            found[f"d input {i}"] = t.grad
    found |= {f"d {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {name: t.detach() for name, t in found.items()}


def _cotangent(output):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)


def in_double(values):
    return [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in values]


def double_kwargs(kwargs):
    return dict(zip(kwargs or {}, in_double((kwargs or {}).values()), strict=True))


def assert_same_numbers(model, inputs, kwargs=None, *, terms=1024):
    """Outputs and gradients of the patched model keep the tolerance, the unpatched one being the
    yardstick; the model ends as it began. Returns the kernel calls of one patched run."""
    assert not vitkit.is_patched(model)
    exact = run(copy.deepcopy(model).double(), in_double(inputs), double_kwargs(kwargs))
    eager = run(model, inputs, kwargs)
    with vitkit.patched(model) as report:
        assert report.replaced, report
        with KernelCalls() as calls:
            actual = run(model, inputs, kwargs)
    assert actual.keys() == eager.keys() == exact.keys()
    largest = max(t.abs().max().item() for n, t in exact.items() if n.startswith("d "))
    for name, truth in exact.items():
        if name.startswith("d ") and truth.abs().max().item() < 1e-10 * largest:
            # Zero in exact arithmetic, as the gradient of a bias of the keys is: what is left is
            # rounding and has no scale of its own.
            allowed = terms**0.5 * torch.finfo(torch.float32).eps * largest
            assert actual[name].abs().max().item() <= allowed, name
        else:
            assert_parity(name, actual[name], eager[name], truth, terms=terms)
    return calls


PRODUCTS = ("linear", "conv3x3")


def replaced(report):
    """Products apart: whether their kernel is the quickest depends on the CPU."""
    return [r for r in report.replaced if not r.by.startswith(PRODUCTS)]


def counts(calls):
    """Kernel calls by operator and backend, products apart."""
    return {op: by for op, by in calls.counts.items() if not op.startswith(PRODUCTS)}


def snapshot(model):
    """All that patch must restore: per module its class, attributes (by identity), hooks; and the
    state_dict."""
    modules = {
        name: (id(m), type(m), [(k, id(v)) for k, v in m.__dict__.items()], _inner(m))
        for name, m in model.named_modules()
    }
    state = {k: (id(v), v.data_ptr()) for k, v in model.state_dict(keep_vars=True).items()}
    return modules, state, [id(p) for p in model.parameters()]


def _inner(module):
    """Contents of the dictionaries that nn.Module keeps (hooks, parameters, submodules)."""
    return {
        key: [(k, id(v)) for k, v in value.items()]
        for key, value in module.__dict__.items()
        if isinstance(value, dict)
    }


def counted(op, layer, x):
    """layer(x), and how often that calls the operator's CPU kernel."""
    with KernelCalls() as seen:
        y = layer(x)
    return y, seen.counts.get(f"{op}_fwd", {}).get("cpu", 0)


def assert_it_runs_where_it_should(op, frozen, x, monkeypatch):
    """What kernels of products share: autocast, other backends and other CPUs are not theirs."""
    assert counted(op, frozen, x)[1] == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert counted(op, frozen, x)[1] == 0
    for backend, expected in (("reference", 0), ("triton", 0), ("cpu", 1)):
        frozen.vitkit_backend = backend
        assert counted(op, frozen, x)[1] == expected
    del frozen.vitkit_backend
    monkeypatch.setattr(products, "_is_quick_on_this_cpu", lambda: False)
    assert counted(op, frozen, x)[1] == 0
