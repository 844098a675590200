"""Whether a host's function is one that vitkit's replacement was written for.

A replacement computes what a function of the host computes. If the host changes that function, the
replacement must not be used before somebody has looked at it: so rules name the functions they
repeat and the fingerprints they know, and an unknown one is a reason to leave the module alone.
``python -m vitkit.patch.source timm.layers:Attention.forward`` prints a fingerprint.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable
from functools import cache
from typing import Any

# Fields that change nothing at run time, and those that only some Python versions have.
_IGNORED = {"annotation", "returns", "type_comment", "type_params", "kind", "ctx", "decorator_list"}


def _structure(node: Any) -> Any:
    if isinstance(node, ast.JoinedStr):
        return "f-string"  # parsed differently from Python 3.12 on; only messages use them
    if isinstance(node, list):
        return [_structure(n) for n in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [_structure(v) for f, v in ast.iter_fields(node) if f not in _IGNORED]
    return [type(node).__name__, *fields]


def source_of(function: Callable[..., Any]) -> str | None:
    """Its source, dedented; None for built-in and generated functions."""
    try:
        return textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return None


@cache
def fingerprint(function: Callable[..., Any]) -> str | None:
    """Identifies what ``function`` does: comments, layout, docstring and annotations do not count.
    The same for every Python version; None if there is no source to read."""
    source = source_of(function)
    if source is None:
        return None
    tree = ast.parse(source).body[0]
    assert isinstance(tree, ast.FunctionDef)
    body = tree.body[1:] if ast.get_docstring(tree) is not None else tree.body
    text = repr([_structure(tree.args), _structure(body)])
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def unknown(function: Callable[..., Any], known: dict[str, str]) -> str | None:
    """The reason not to stand in for ``function``; None if its fingerprint is in ``known``, which
    maps each to the host versions that have it."""
    if fingerprint(function) in known:
        return None
    host = function.__module__.split(".")[0]
    version = getattr(sys.modules.get(host), "__version__", "?")
    return (
        f"{host} {version} changed {function.__qualname__}; known are those of {host}"
        f" {', '.join(known.values())}"
    )


def is_followed(source: str | None, first: str, second: str) -> bool:
    """Whether a function calls ``self.<second>`` once, as the very next thing after its one use (or
    one per branch) of ``self.<first>``, on the same variable."""
    lines = [s for line in (source or "").splitlines() if (s := line.split("#")[0].strip())]
    uses = [i for i, line in enumerate(lines) if f"self.{first}(" in line]
    then = [i for i, line in enumerate(lines) if f"self.{second}(" in line]
    if not uses or then != [uses[-1] + 1]:
        return False
    x = lines[then[0]].split("=")[0].strip()
    branches = (f"{x} = self.{first}(", "else:", "elif ")
    only_branches = all(line.startswith(branches) for line in lines[uses[0] : then[0]])
    return only_branches and lines[then[0]] == f"{x} = self.{second}({x})"


def main(arguments: list[str]) -> None:
    for argument in arguments:
        module, _, path = argument.partition(":")
        value: Any = importlib.import_module(module)
        for name in path.split("."):
            value = getattr(value, name)
        print(argument, fingerprint(value))


if __name__ == "__main__":
    main(sys.argv[1:])
