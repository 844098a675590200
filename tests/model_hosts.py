"""What the tests of vitkit.models share."""

from __future__ import annotations

import copy

import torch
from numerics import assert_parity


def seeded(model, seed=0):
    """The model with every parameter drawn anew: what starts at zero or one would hide mistakes.
    Statistics of a BatchNorm too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 0.3 if p.dim() < 2 else 1.5 * p[0].numel() ** -0.5
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
            if name.endswith("norm.weight") or (p.dim() == 1 and "norm" in name and "w" in name):
                p.add_(1.0)
        for name, b in model.named_buffers():
            if name.endswith("running_var"):
                b.copy_(torch.rand(b.shape, generator=generator) + 0.5)
    return model


def assert_loads_and_agrees(ours, host, ours_call, host_call=None, *, strict=True, terms=4096):
    """The host's state_dict loads into ``ours`` by its own names, and the outputs are the same.

    Args:
        ours_call, host_call: take a model and a function that puts inputs into the dtype of a run;
            both return one tensor or a tuple. One is enough for models that are called alike.
    """
    host_call = host_call or ours_call
    ours, host = ours.eval(), seeded(host).eval()
    ours.load_state_dict(host.state_dict(), strict=strict)
    same, wide = (lambda *t: t), (lambda *t: tuple(_double(x) for x in t))
    with torch.no_grad():
        actual = _tuple(ours_call(ours, same))
        eager = _tuple(host_call(host, same))
        exact = _tuple(host_call(copy.deepcopy(host).double(), wide))
    for i, (a, e, x) in enumerate(zip(actual, eager, exact, strict=True)):
        assert x.isfinite().all() and x.std() > 0
        assert_parity(f"output {i}", a, e, x, terms=terms)


def _double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def _tuple(x):
    return x if isinstance(x, tuple) else (x,)


NORMS = (torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.BatchNorm2d)


def shapes(model):
    """Names and shapes of a state_dict, and what norms divide by, which no shape shows."""
    found = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    norms = {k: m.eps for k, m in model.named_modules() if isinstance(m, NORMS)}
    return found | norms
