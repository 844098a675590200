"""Names of models, and what each one is: configurations are data, one table per family."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Entry:
    """One named configuration.

    Args:
        config: frozen dataclass; its ``reduced()`` is the same model at a size a test can afford.
        source: what the configuration is that of, and whose state_dict loads.
    """

    config: Any
    source: str


@dataclass(frozen=True)
class Family:
    """A table of configurations and the class that takes them.

    Args:
        model: called with a configuration; ``model.example_inputs(batch)`` are inputs of a call.
        entries: by name.
    """

    model: Callable[[Any], torch.nn.Module]
    entries: Mapping[str, Entry]


class Registry:
    """All families of :mod:`vitkit.models`."""

    def __init__(self, *families: Family) -> None:
        self._models = {name: (f.model, e) for f in families for name, e in f.entries.items()}
        assert len(self._models) == sum(len(f.entries) for f in families), "a name occurs twice"

    def list_models(self, pattern: str = "*") -> list[str]:
        """Names that match a shell-style pattern, sorted.

        Example:
            >>> import vitkit
            >>> vitkit.models.list_models("virchow*")
            ['virchow', 'virchow2']
        """
        return sorted(fnmatch.filter(self._models, pattern))

    def entry(self, name: str) -> Entry:
        """Configuration and source of a name.

        Raises:
            ValueError: there is no such name.
        """
        if name not in self._models:
            near = difflib.get_close_matches(name, self._models, n=3)
            hint = f" (near: {', '.join(near)})" if near else ""
            raise ValueError(f"models: name must be one of list_models(), got {name!r}{hint}")
        return self._models[name][1]

    def create(
        self, name: str, *, reduced: bool = False, backend: str = "auto", **overrides: Any
    ) -> torch.nn.Module:
        """The model of that name with random weights.

        Parameters have the names and shapes of the implementation that ``entry(name).source``
        names, so that its checkpoints load with ``load_state_dict``. Build large models under
        ``torch.device("meta")`` where a checkpoint follows.

        Args:
            name: one of :func:`list_models`.
            reduced: a few narrow layers on small inputs, with the head dim, patch size and kinds of
                layers of the full model.
            backend: set as ``vitkit_backend`` on every module, see :mod:`vitkit.backends`.
            overrides: fields of the configuration to replace.

        Raises:
            ValueError: no such name, or no such field.

        Example:
            >>> import torch, vitkit
            >>> model = vitkit.models.create("vit_s16", reduced=True)
            >>> model(*model.example_inputs(batch=2)).shape
            torch.Size([2, 1000])
        """
        config = self.entry(name).config
        if reduced:
            config = config.reduced()
        fields = {f.name for f in dataclasses.fields(config)}
        if unknown := sorted(set(overrides) - fields):
            raise ValueError(
                f"create: overrides of {name!r} must be fields of {type(config).__name__}"
                f" ({', '.join(sorted(fields))}), got {', '.join(unknown)}"
            )
        model = self._models[name][0](dataclasses.replace(config, **overrides))
        if backend != "auto":
            for module in model.modules():
                module.vitkit_backend = backend  # type: ignore[assignment]
        return model
