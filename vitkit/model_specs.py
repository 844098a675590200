"""Models named in one line of text, ``HOST:NAME`` or a Python path."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

FORMS = "timm:NAME, torchvision:NAME, transformers:CLASS, diffusers:CLASS, vitkit:NAME, MODULE:CALLABLE or FILE.py:CALLABLE"  # noqa: E501


def parse_shape(text: str) -> tuple[int, ...]:
    """``"1x3x224x224"`` as integers."""
    try:
        shape = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ValueError(f"shape must look like 1x3x224x224, got {text!r}")
    return shape


def parse_options(assignments: Iterable[str]) -> dict[str, Any]:
    """``["depth=2", "mlp=swiglu"]`` as keyword arguments: Python literals where they are some."""
    options: dict[str, Any] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not (equals and name.isidentifier()):
            raise ValueError(f"option must look like depth=2, got {text!r}")
        try:
            options[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            options[name] = value
    return options


def build_model(spec: str, **options: Any) -> Any:
    """The model that a line of text names, with random weights, zeros redrawn.

    ``timm:NAME``, ``torchvision:NAME``, ``vitkit:NAME``; ``transformers:CLASS`` and
    ``diffusers:CLASS`` with their default configuration; or ``package.module:callable`` and
    ``path/to/file.py:callable``, called without arguments.

    Args:
        options: of the model's maker: fields of a configuration, arguments of the callable.

    Returns:
        A module. A callable of one's own may also return (module, arguments of one call).

    Raises:
        ValueError: the text is none of these, what it names does not exist or makes no module, or
            the package it comes from is not installed.
    """
    prefix, _, name = spec.rpartition(":") if spec.startswith((".", "/")) else spec.partition(":")
    if not name or not prefix:
        raise ValueError(f"model must be one of {FORMS}; got {spec!r}")
    if prefix in HOSTS:
        return without_zeros(HOSTS[prefix](name, options))
    made = _attribute(_module(prefix), name, spec)
    if not callable(made):
        raise ValueError(f"model must be made by a callable, {spec!r} is {type(made).__name__}")
    built = _called(spec, made, options)
    model = built[0] if isinstance(built, tuple) and built else built
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, {spec!r} made {type(model).__name__}")
    return built


def without_zeros(model: torch.nn.Module) -> torch.nn.Module:
    """The model with random numbers in place of parameters that are zero altogether: gates and last
    layers of diffusion models start so, and hide what lies behind them."""
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point() and not p.is_meta and not p.any():
                p.normal_(std=0.02)
    return model


def _called(spec: str, maker: Callable[..., Any], options: dict[str, Any]) -> Any:
    """``maker(**options)``; arguments it does not take are a mistake of who wrote the spec."""
    try:
        return maker(**options)
    except TypeError as error:
        given = ", ".join(options) or "no options"
        raise ValueError(f"model {spec!r} cannot be made with {given}: {error}") from error


def _near(name: str, names: Iterable[str]) -> str:
    by_letters = {n.lower(): n for n in names}
    near = difflib.get_close_matches(name.lower(), by_letters, n=3, cutoff=0.5)
    return f" (near: {', '.join(by_letters[n] for n in near)})" if near else ""


def _host(package: str) -> ModuleType:
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"model: {package} must be installed for {package}:NAME; run pip install {package}"
        )
    return importlib.import_module(package)


def _module(path: str) -> ModuleType:
    """A module by its dotted name, also from the current directory, or by its file."""
    if path.endswith(".py"):
        if not Path(path).is_file():
            raise ValueError(f"model: there is no file {path}")
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(spec.name, module)  # what it defines can be pickled
        spec.loader.exec_module(module)
        return module
    if "" not in sys.path:  # the vitkit command does not start there as python -m does
        sys.path.insert(0, "")
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name != path and not path.startswith(f"{error.name}."):
            raise ValueError(f"model: {path} cannot be imported: {error}") from error
        known = _near(path, HOSTS)
        raise ValueError(f"model: there is no host or module {path!r}{known}") from error


def _attribute(module: ModuleType, path: str, spec: str) -> Any:
    value: Any = module
    for part in path.split("."):
        if not hasattr(value, part):
            names = (n for n in dir(value) if not n.startswith("_"))
            raise ValueError(f"model: {spec!r} has no {part!r}{_near(part, names)}")
        value = getattr(value, part)
    return value


def _of_timm(name: str, options: dict[str, Any]) -> Any:
    timm = _host("timm")
    if ":" not in name and not timm.is_model(name.split(".")[0]):
        raise ValueError(f"model: timm has no {name!r}{_near(name, timm.list_models())}")
    return _called(f"timm:{name}", lambda **o: timm.create_model(name, **o), options)


def _of_torchvision(name: str, options: dict[str, Any]) -> Any:
    models = _host("torchvision").models
    if name not in models.list_models():
        raise ValueError(f"model: torchvision has no {name!r}{_near(name, models.list_models())}")
    maker = models.get_model
    return _called(f"torchvision:{name}", lambda **o: maker(name, weights=None, **o), options)


def _of_vitkit(name: str, options: dict[str, Any]) -> Any:
    from vitkit.models import create

    return create(name, **options)


def _of_transformers(name: str, options: dict[str, Any]) -> Any:
    cls = _class_of("transformers", name)
    config = getattr(cls, "config_class", None)
    if config is None or not issubclass(cls, torch.nn.Module):
        raise ValueError(f"model: {name} of transformers is no model with a configuration")
    return _called(f"transformers:{name}", lambda **o: cls(config(**o)), options)


def _of_diffusers(name: str, options: dict[str, Any]) -> Any:
    cls = _class_of("diffusers", name)
    if not issubclass(cls, torch.nn.Module):
        raise ValueError(f"model: {name} of diffusers is no model")
    return _called(f"diffusers:{name}", cls, options)


def _class_of(host: str, name: str) -> Any:
    library = _host(host)
    cls = getattr(library, name, None)
    if not isinstance(cls, type):
        raise ValueError(f"model: {host} has no class {name!r}{_near(name, dir(library))}")
    return cls


HOSTS: dict[str, Callable[[str, dict[str, Any]], Any]] = {
    "timm": _of_timm,
    "torchvision": _of_torchvision,
    "transformers": _of_transformers,
    "diffusers": _of_diffusers,
    "vitkit": _of_vitkit,
}
