"""``vitkit verify``: a model from a line of text, its verification, and the page about it."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vitkit._switch import Switch
from vitkit.example_inputs import Inputs, example_inputs, shapes_of
from vitkit.layer_errors import layer_errors
from vitkit.model_specs import build_model, parse_options, parse_shape
from vitkit.patch import Report, patch
from vitkit.verification import Verification
from vitkit.verify import longest_sum, verify


class Refused(ValueError):
    """A mistake of the user's, in one line."""


@dataclass(frozen=True)
class Asked:
    """The command line."""

    spec: str
    shape: str | None = None
    batch: int = 1
    options: tuple[str, ...] = ()
    device: str = "cpu"
    dtype: str = "float32"
    backend: str = "auto"
    train: bool = False
    compiled: bool = False
    strict: bool = False
    seconds: float = 3.0


def dry_run(asked: Asked) -> Report:
    """What patching would do, without running the model.

    Raises:
        Refused: there is no such model, or ``strict`` is not met.
    """
    model, _ = _made(asked, inputs=False)
    try:
        own = Switch(model, asked.backend).own
        return patch(model, asked.backend, strict=asked.strict and not own, dry_run=True)
    except ValueError as error:
        raise Refused(str(error)) from error


def run(asked: Asked, page: Path | None = None) -> Verification:
    """Verifies the model; writes a page about it if ``page`` is given.

    Raises:
        Refused: there is no such model, it does not run as it is, or ``strict`` is not met.
    """
    model, (args, kwargs) = _made(asked)
    steps: list[str] = []
    try:
        result = verify(
            model, *args, backend=asked.backend, strict=asked.strict, train=asked.train,
            compiled=asked.compiled, seconds=asked.seconds, progress=steps.append, **kwargs,
        )  # fmt: skip
    except Exception as error:
        if not steps or str(error).startswith("verify: "):
            raise Refused(str(error)) from error
        if steps[-1] == "unpatched run":
            first = str(error).strip().split("\n")[0]
            raise Refused(
                f"{asked.spec} does not run, unpatched, on inputs {shapes_of((args, kwargs))}"
                f" ({first}); give --shape, or a callable that returns (model, inputs)"
            ) from error
        raise
    if page is not None:
        from vitkit.verify_page import render

        model.train(False)
        terms = longest_sum(model)
        layers = layer_errors(model, *args, backend=asked.backend, terms=terms, **kwargs)
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(render(asked, result, layers, shapes_of((args, kwargs))))
    return result


def _made(asked: Asked, inputs: bool = True) -> tuple[torch.nn.Module, Inputs]:
    """The model and arguments of a call, on the device and in the dtype asked for."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)  # remarks on dtype casts
    torch.manual_seed(0)
    try:
        shape = None if asked.shape is None else parse_shape(asked.shape)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built = build_model(asked.spec, **parse_options(asked.options))
        model, *given = built if isinstance(built, tuple) else (built,)
        if not inputs:
            found: Inputs = ((), {})
        elif given and shape is None:
            found = (given[0] if isinstance(given[0], tuple) else tuple(given), {})
        else:
            found = example_inputs(model, shape, asked.batch)
    except (ValueError, ImportError, RuntimeError) as error:
        raise Refused(str(error).split("\n")[0]) from error
    dtype = getattr(torch, asked.dtype)

    def place(t: Any) -> Any:
        if not isinstance(t, torch.Tensor):
            return t
        return t.to(asked.device, dtype if t.is_floating_point() else None)

    model = model.to(asked.device, dtype).eval()
    return model, torch.utils._pytree.tree_map(place, found)
