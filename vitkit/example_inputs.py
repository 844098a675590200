"""Arguments of one call of a model, from what the model says of itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

TEXT_TOKENS = 77
# Where configurations of diffusers keep the width of the text they attend.
TEXT_WIDTHS = ("caption_channels", "joint_attention_dim", "cross_attention_dim")


def shapes_of(inputs: Any) -> str:
    """Of all tensors in arguments of a call: ``"1x3x224x224, 1"``."""
    tensors = torch.utils._pytree.tree_leaves(inputs)
    return ", ".join(
        "x".join(map(str, t.shape)) or "1" for t in tensors if isinstance(t, torch.Tensor)
    )


def example_inputs(
    model: torch.nn.Module, shape: tuple[int, ...] | None = None, batch: int = 1
) -> Inputs:
    """Random arguments of one call: positional and named.

    Images have the size of timm's ``default_cfg``, of the model's ``config``, or 224 pixels; models
    of transformers get the input they name first, those of diffusers also a step and what they are
    conditioned on; models of :mod:`vitkit.models` make their own.

    Args:
        shape: of the first tensor, instead of what the model says of it.
        batch: ignored with ``shape``.
    """
    if shape is None and hasattr(model, "example_inputs"):
        return tuple(model.example_inputs(batch)), {}  # type: ignore[operator]
    config = _as_mapping(getattr(model, "config", None))
    parameters = inspect.signature(model.forward).parameters
    if any(cls.__module__.startswith("diffusers.") for cls in type(model).__mro__):
        return _of_diffusers(model, config, parameters, shape, batch)
    first = getattr(model, "main_input_name", None)  # transformers
    if shape is None and first is not None:
        return (), _of_transformers(config, parameters, first, batch)
    x = torch.randn(shape or _image_shape(model, config, batch))
    return ((x,), {}) if first is None else ((), {first: x})


def _as_mapping(config: Any) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    return config.to_dict() if hasattr(config, "to_dict") else {}


def _sides(size: Any) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _image_shape(
    model: torch.nn.Module | None, config: Mapping[str, Any], batch: int
) -> tuple[int, ...]:
    timm = getattr(model, "default_cfg", None) or {}
    if "input_size" in timm:
        return (batch, *timm["input_size"])
    config = config if "image_size" in config else config.get("vision_config", config)
    channels = config.get("num_channels") or config.get("in_channels") or 3
    return (batch, channels, *_sides(config.get("image_size") or 224))


def _of_transformers(
    config: Mapping[str, Any], parameters: Mapping[str, Any], first: str, batch: int
) -> dict[str, Any]:
    if first == "inputs":  # Perceiver, whose configuration has the size of other images
        return {first: torch.randn(batch, 3, 224, 224)}
    if first != "input_ids":
        return {first: torch.randn(_image_shape(None, config, batch))}
    text = config.get("text_config") or config
    found = {first: torch.randint(1, text.get("vocab_size", 1000), (batch, 16))}
    if "pixel_values" in parameters and config.get("vision_config"):
        found["pixel_values"] = torch.randn(_image_shape(None, config, batch))
    return found


def _of_diffusers(
    model: torch.nn.Module,
    config: Mapping[str, Any],
    parameters: Mapping[str, Any],
    shape: tuple[int, ...] | None,
    batch: int,
) -> Inputs:
    channels = config.get("in_channels") or 3
    side = config.get("sample_size") or 32
    packed = "img_ids" in parameters  # FLUX: tokens of a grid, not an image
    if shape is None:
        shape = (batch, 64, channels) if packed else (batch, channels, *_sides(side))
    batch = shape[0]
    widths = [config[n] for n in TEXT_WIDTHS if isinstance(config.get(n), int)]
    makers: dict[str, Callable[[], Any]] = {
        "timestep": lambda: torch.full((batch,), 0.5) if packed else torch.full((batch,), 500),
        "encoder_hidden_states": lambda: (
            torch.randn(batch, TEXT_TOKENS, widths[0]) if widths else None
        ),
        "pooled_projections": lambda: torch.randn(batch, config["pooled_projection_dim"]),
        "class_labels": lambda: _labels(config, batch),
        "img_ids": lambda: _grid(shape[1]),
        "txt_ids": lambda: torch.zeros(TEXT_TOKENS, 3),
        "guidance": lambda: torch.full((batch,), 3.5) if config.get("guidance_embeds") else None,
        "added_cond_kwargs": lambda: _sizes(model, config, batch, 8.0 * shape[-1]),
    }
    named = {n: make() for n, make in makers.items() if n in parameters}
    return (torch.randn(shape),), {n: v for n, v in named.items() if v is not None}


def _labels(config: Mapping[str, Any], batch: int) -> torch.Tensor | None:
    classes = config.get("num_class_embeds") or config.get("num_embeds_ada_norm")
    adaptive = config.get("norm_type", "ada_norm_zero") == "ada_norm_zero"
    return torch.arange(batch) % classes if classes and adaptive else None


def _grid(tokens: int) -> torch.Tensor:
    """[tokens, 3]: places on a square, in the second and third column."""
    side = int(tokens**0.5)
    place = torch.arange(tokens)
    return torch.stack([place * 0, place // side, place % side], -1).float()


def _sizes(
    model: torch.nn.Module, config: Mapping[str, Any], batch: int, pixels: float
) -> dict[str, Any] | None:
    """What SDXL and PixArt are told about the image's size."""
    if config.get("addition_embed_type") == "text_time":
        width = config["projection_class_embeddings_input_dim"]
        pooled = torch.randn(batch, width - 6 * config["addition_time_embed_dim"])
        sizes = torch.tensor([pixels, pixels, 0, 0, pixels, pixels]).expand(batch, -1)
        return {"text_embeds": pooled, "time_ids": sizes}
    if type(model).__name__.startswith("PixArt"):
        sizes = torch.full((batch, 2), pixels)
        return {"resolution": sizes, "aspect_ratio": torch.ones(batch, 1)}
    return None
