"""Models named in one line of text, and an example input for each."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def parse_shape(text: str) -> tuple[int, ...]:
    """``"1x3x224x224"`` as integers."""
    try:
        shape = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ValueError(f"shape must look like 1x3x224x224, got {text!r}")
    return shape


def build_model(spec: str) -> torch.nn.Module:
    """``timm:NAME``, ``torchvision:NAME``, ``transformers:CLASS``, ``diffusers:CLASS`` (both with
    their default configuration), ``vitkit:NAME`` or ``module.path:callable``; random weights.

    Raises:
        ValueError: the text is none of these, or what it names makes no module.
    """
    prefix, _, name = spec.partition(":")
    if not name or not prefix:
        raise ValueError(f"model must look like timm:NAME or module:callable, got {spec!r}")
    model = HOSTS.get(prefix, _of_module)(prefix, name)
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, {spec!r} made {type(model).__name__}")
    return model


def _of_module(prefix: str, name: str) -> Any:
    return getattr(importlib.import_module(prefix), name)()


def _of_timm(prefix: str, name: str) -> Any:
    import timm

    return timm.create_model(name, pretrained=False)


def _of_torchvision(prefix: str, name: str) -> Any:
    from torchvision.models import get_model

    return get_model(name, weights=None)


def _of_transformers(prefix: str, name: str) -> Any:
    import transformers

    cls = getattr(transformers, name, None)
    config = getattr(cls, "config_class", None)
    if config is None:
        raise ValueError(f"model must be a model class of transformers, got {name!r}")
    return cls(config())


def _of_diffusers(prefix: str, name: str) -> Any:
    import diffusers

    cls = getattr(diffusers, name, None)
    if not isinstance(cls, type):
        raise ValueError(f"model must be a model class of diffusers, got {name!r}")
    return cls()


HOSTS: dict[str, Callable[[str, str], Any]] = {
    "timm": _of_timm,
    "torchvision": _of_torchvision,
    "transformers": _of_transformers,
    "diffusers": _of_diffusers,
}


def example_inputs(model: torch.nn.Module, shape: tuple[int, ...] | None) -> Inputs:
    """Arguments of one call: random numbers of ``shape``, or what the model's own configuration
    says, or one image of 224 pixels; a diffusion model also gets its step and, where it attends
    text, the text."""
    config = getattr(model, "config", None)
    sizes = shape or _own_shape(model, config)
    x = torch.randn(sizes)
    options: dict[str, Any] = {}
    if getattr(config, "sample_size", None) is None or not hasattr(model, "time_embedding"):
        return (x,), options
    width = getattr(config, "cross_attention_dim", None)
    if isinstance(width, int):
        options["encoder_hidden_states"] = torch.randn(sizes[0], 77, width)
    return (x, torch.tensor(500)), options


def _own_shape(model: torch.nn.Module, config: Any) -> tuple[int, ...]:
    cfg = getattr(model, "default_cfg", None) or {}
    if "input_size" in cfg:  # timm
        return (1, *cfg["input_size"])
    size = getattr(config, "image_size", None) or getattr(config, "sample_size", None)
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None)
    if size is None:
        return (1, channels or 3, 224, 224)
    height, width = (size, size) if isinstance(size, int) else size
    return (1, channels or 3, height, width)
