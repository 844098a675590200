"""Bad input, the same for the tests of every op."""

from __future__ import annotations

import pytest
import torch

import vitkit


def check_bad_call(op, arguments, error, message, device):
    """``vitkit.<op>`` refuses the arguments with the same message from every backend, or from the
    one that they name."""
    arguments = {
        n: t.to(device) if isinstance(t, torch.Tensor) and not t.is_meta else t
        for n, t in arguments.items()
    }
    public = getattr(vitkit, op)
    asked = arguments.pop("backend", None)
    for backend in ("auto", device, "triton", "reference") if asked is None else (asked,):
        with pytest.raises(error, match=f"^{op}: .*{message}"):
            public(**arguments, backend=backend)
