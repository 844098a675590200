"""The proof beside the speed: a model's outputs and times, unpatched and patched, against
float64."""

from __future__ import annotations

import copy
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map_with_path

from vitkit._checks import name_of
from vitkit._memory import peak_bytes
from vitkit._numerics import EPS32, Parity, parity
from vitkit._switch import Switch, widened
from vitkit.patch import is_patched
from vitkit.verification import AFTER, BEFORE, COMPILED, OutputParity, Timing, Verification

Named = list[tuple[str, torch.Tensor]]

# Seconds after which five rounds are no longer waited for.
LONG = 60.0

# Modules that draw random numbers in training, beside torch's dropouts.
RANDOM = ("DropPath", "StochasticDepth", "PatchDropout")


class KernelCalls(TorchDispatchMode):
    """Counts, while entered, the vitkit kernels that really run: op -> backend -> calls.

    Example:
        >>> import torch, vitkit
        >>> with KernelCalls() as calls:
        ...     y = vitkit.group_norm_silu(torch.randn(1, 8, 4, 4), 2, backend="cpu")
        >>> calls.counts
        {'group_norm_silu_fwd': {'cpu': 1}}
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, dict[str, int]] = {}

    def total(self, op: str) -> int:
        return sum(self.counts.get(op, {}).values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vitkit":
            op = func._schema.name.removeprefix("vitkit::")
            device = next(a.device.type for a in args if isinstance(a, torch.Tensor))
            backend = func._overloadname if func._overloadname != "default" else device
            by_backend = self.counts.setdefault(op, {})
            by_backend[backend] = by_backend.get(backend, 0) + 1
        return func(*args, **(kwargs or {}))


def _weights(model: torch.nn.Module) -> list[torch.Tensor]:
    layers = (torch.nn.Linear, torch.nn.modules.conv._ConvNd)
    found = [m.weight for m in model.modules() if isinstance(m, layers)]
    return [w for w in found if w.numel()]


def longest_sum(model: torch.nn.Module) -> int:
    """Terms of the longest sum any layer computes: the rounding a correct model may show."""
    return max((w.numel() // w.shape[0] for w in _weights(model)), default=1)


def chained_sums(model: torch.nn.Module) -> int:
    """Terms of all sums a gradient comes through: every layer's, forwards and back."""
    return sum(w.numel() // w.shape[0] + w.numel() // w.shape[1] for w in _weights(model)) or 1


def verify(
    model: torch.nn.Module,
    *inputs: Any,
    backend: str = "auto",
    strict: bool = False,
    train: bool = False,
    compiled: bool = False,
    seconds: float = 3.0,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[str], None] | None = None,
    **kwargs: Any,
) -> Verification:
    """Runs ``model(*inputs, **kwargs)`` in float64, unpatched and patched, and compares.

    The patched run must keep the project's tolerance (``vitkit/_numerics.py``): no output may be
    further from the float64 run than twice the unpatched run is, plus the rounding of its dtype.
    The model is put in eval mode for the comparison and left as it was; a copy of it in float64
    must fit in memory. It must compute the same on every call: no random numbers. Modules of
    :mod:`vitkit.nn` and :mod:`vitkit.models` are compared with themselves on backend ``reference``.

    Args:
        model: unpatched; it is patched and unpatched again here.
        backend: see ``vitkit.patch``.
        strict: raise if anything that could have been replaced is left, or if there is nothing.
        train: compare and time in train mode, with the gradients of parameters and inputs; modules
            that draw random numbers stay in eval mode, and buffers are put back.
        compiled: also compare and time the patched model under ``torch.compile``, and time the
            unpatched one there. Compiling takes its time, twice.
        seconds: time spent on measuring speed, calls taking turns; at least five of each, or as
            many as a minute holds. 0 measures neither speed nor memory.
        clock: what times a call; ``time.thread_time`` on a busy CPU, with ``torch`` on one thread.
        progress: called with the name of each step.

    Returns:
        The verification; ``print(result)`` shows it, ``result.ok`` is the verdict.

    Raises:
        ValueError: the model is patched already, returns no floating point tensor, has no gradients
            to compare with ``train``, or ``strict`` is not met.

    Example:
        >>> import torch, vitkit
        >>> vitkit.verify(torch.nn.GroupNorm(2, 8), torch.randn(1, 8, 4, 4), seconds=0.01).ok
        True
    """
    if is_patched(model):
        raise ValueError("verify: model must not be patched already")
    tell = progress or (lambda step: None)
    switch = Switch(model, backend)
    if strict and (switch.report.skipped or not (switch.report.replaced or switch.own)):
        raise ValueError(f"verify: strict must leave nothing, got\n{switch.report}")
    calls, remarks = KernelCalls(), _Remarks([], [])
    with _as_found(model, switch, train):
        call = functools.partial(_run, model, inputs, kwargs, train)
        switch.off()
        tell("unpatched run")
        before = call()
        tell("float64 run")
        wide_inputs, wide_kwargs = widened((inputs, kwargs))
        truth = _run(copy.deepcopy(model).double(), wide_inputs, wide_kwargs, train)
        report = switch.on()
        tell("patched run")
        with calls:
            runs = {"": call()}
        ways: dict[str, _Way] = {BEFORE: (switch.off, call), AFTER: (switch.on, call)}
        if compiled:
            tell("compiling")
            made = _compiled(model, switch, (inputs, kwargs, train), remarks)
            ways |= {name: (lambda: None, way) for name, (way, _) in made.items()}
            runs |= {f"{n}: ": run for n, (_, run) in made.items() if n == COMPILED[AFTER]}
        timings: dict[str, Timing] = {}
        rounds = 0
        if seconds > 0:
            tell("timing")
            timings, rounds = _take_turns(ways, seconds, clock, _on_gpu(model))
    terms = (longest_sum(model), chained_sums(model))
    pairs = [_compare_all(prefix, run, before, truth, terms) for prefix, run in runs.items()]
    outputs, gradients = ([o for pair in pairs for o in pair[kind]] for kind in (0, 1))
    return Verification(
        report, switch.own, outputs, gradients, timings, rounds, calls.counts, *remarks
    )


def _on_gpu(model: torch.nn.Module) -> bool:
    return any(p.is_cuda for p in model.parameters())


@contextmanager
def _as_found(model: torch.nn.Module, switch: Switch, train: bool) -> Iterator[None]:
    """Puts every module in the mode asked for; leaves the model in its own, with its buffers."""
    training = {m: m.training for m in model.modules()}
    buffers = [(b, b.clone()) for b in model.buffers()] if train else []
    model.train(train)
    dropouts = torch.nn.modules.dropout._DropoutNd
    for m in model.modules():
        if isinstance(m, dropouts) or type(m).__name__ in RANDOM:
            m.eval()
    try:
        yield
    finally:
        switch.restore()
        for m, mode in training.items():
            m.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _tensors(outputs: Any) -> Named:
    leaves, _ = tree_flatten_with_path(dict(outputs) if isinstance(outputs, dict) else outputs)
    found = [
        (f"output{keystr(path)}", t)
        for path, t in leaves
        if isinstance(t, torch.Tensor) and t.is_floating_point()
    ]
    if not found:
        raise ValueError(
            f"verify: model must return floating point tensors, got {type(outputs).__name__}"
        )
    return found


def _run(
    model: torch.nn.Module, inputs: Any, kwargs: dict[str, Any], train: bool
) -> tuple[Named, Named]:
    """Outputs of a call and, with ``train``, the gradients of what requires some, by name."""
    if not train:
        with torch.no_grad():
            return _tensors(model(*inputs, **kwargs)), []
    named: Named = [
        (n.replace("_orig_mod.", ""), p) for n, p in model.named_parameters() if p.requires_grad
    ]

    def leaf(path: Any, t: Any) -> Any:
        if not (isinstance(t, torch.Tensor) and t.is_floating_point()):
            return t
        t = t.detach().clone().requires_grad_()
        named.append((f"input{keystr(path)}", t))
        return t

    args, options = tree_map_with_path(leaf, (inputs, kwargs))
    with torch.enable_grad():
        outputs = _tensors(model(*args, **options))
    reached = [o for _, o in outputs if o.requires_grad]
    if not reached:
        raise ValueError("verify: train must have outputs that depend on what requires a gradient")
    tensors = [t for _, t in named]
    starts = [_cotangent(o) for o in reached]
    found = torch.autograd.grad(reached, tensors, starts, allow_unused=True)
    pairs = zip(named, found, strict=True)
    gradients = [(f"gradient of {n}", g) for (n, _), g in pairs if g is not None]
    return [(n, o.detach()) for n, o in outputs], gradients


def _cotangent(output: torch.Tensor) -> torch.Tensor:
    """Drawn in float64, the same for every dtype of a run."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)


def _compare_all(
    prefix: str, after: Any, before: Any, exact: Any, terms: tuple[int, int]
) -> tuple[list[OutputParity], list[OutputParity]]:
    largest = max((g.abs().max().item() for _, g in exact[1] if g.numel()), default=0.0)
    found: tuple[list[OutputParity], list[OutputParity]] = ([], [])
    for kind in (0, 1):
        triples = zip(after[kind], before[kind], exact[kind], strict=True)
        for (name, a), (_, b), (_, x) in triples:
            vanishes = kind == 1 and (x.abs().max().item() if x.numel() else 0) < 1e-10 * largest
            scale = largest if vanishes else None
            found[kind].append(_compare(prefix + name, a, b, x, terms[kind], scale))
    return found


def _compare(
    name: str,
    after: torch.Tensor,
    before: torch.Tensor,
    exact: torch.Tensor,
    terms: int,
    scale: float | None,
) -> OutputParity:
    dtype = name_of(after.dtype)
    if scale is not None:
        # Zero in exact arithmetic, as the gradient of a bias of the keys is: what is left is
        # rounding and has no scale of its own.
        errors = [t.abs().max().item() if t.numel() else 0.0 for t in (after, before)]
        errors = [math.inf if math.isnan(e) else e for e in errors]
        limit = (torch.finfo(after.dtype).eps + math.sqrt(terms) * EPS32) * scale
        result = Parity(errors[0], limit, 0.0, 0.0, errors[1], scale)
        return OutputParity(name, tuple(after.shape), dtype, result, 0.0)
    distance = (before.to(exact.device).double() - exact).norm().item()
    norm = exact.norm().item()
    result = parity(after, before, exact, terms=terms)
    yardstick = distance / norm if norm else distance
    return OutputParity(name, tuple(after.shape), dtype, result, yardstick)


_Way = tuple[Callable[[], Any], Callable[[], Any]]  # what comes before a call, and the call


class _Remarks(NamedTuple):
    failures: list[str]
    notes: list[str]


def _compiled(
    model: torch.nn.Module, switch: Switch, call: tuple[Any, Any, bool], remarks: _Remarks
) -> dict[str, tuple[Callable[[], Any], Any]]:
    """The model unpatched and patched under ``torch.compile``: how to call it, and its results. A
    patched model that does not compile is a failure where the unpatched one does.

    Both are copies on the same parameters: what patching changes in place would be compiled anew at
    every turn.
    """
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    switch.off()
    before = copy.deepcopy(model, dict(tensors))
    switch.on()
    after = copy.deepcopy(model, dict(tensors))
    made: dict[str, tuple[Callable[[], Any], Any]] = {}
    for name, copied in ((COMPILED[BEFORE], before), (COMPILED[AFTER], after)):
        shown: Any = torch.compile(copied)
        way = functools.partial(_run, shown, *call)
        try:
            made[name] = (way, way())
        except Exception as error:  # whatever the host, Dynamo or Inductor raises
            ours = copied is after and COMPILED[BEFORE] in made
            why = str(error).strip().split("\n")[0]
            remarks[0 if ours else 1].append(f"{name}: {type(error).__name__}: {why}")
    return made


def _take_turns(
    ways: dict[str, _Way], seconds: float, clock: Callable[[], float], on_gpu: bool
) -> tuple[dict[str, Timing], int]:
    """Times and memory of each way to call, and the number of rounds; speed-ups over the first."""

    def timed(way: _Way) -> float:
        way[0]()
        if on_gpu:
            torch.cuda.synchronize()
        start = clock()
        way[1]()
        if on_gpu:
            torch.cuda.synchronize()
        return clock() - start

    taken: dict[str, list[float]] = {name: [] for name in ways}
    start = time.perf_counter()
    rounds, spent = 0, 0.0
    while rounds < 2 or (rounds < 5 and spent < LONG) or (rounds < 101 and spent < seconds):
        # First one, then the other first: what drifts favours neither.
        order: Sequence[str] = list(ways)[:: -1 if rounds % 2 else 1]
        for name in order:
            taken[name].append(timed(ways[name]))
        rounds, spent = rounds + 1, time.perf_counter() - start
    first = taken[next(iter(ways))]
    timings = {}
    for name, way in ways.items():
        ratios = [b / a for b, a in zip(first, taken[name], strict=True)]
        way[0]()
        memory = peak_bytes(way[1], "cuda" if on_gpu else "cpu")
        middle, spread = statistics.median(ratios), (min(ratios), max(ratios))
        timings[name] = Timing(statistics.median(taken[name]), middle, spread, memory)
    return timings, rounds
