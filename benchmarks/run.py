"""``vitkit bench``: measures cases and prints, stores and renders the rows."""

from __future__ import annotations

import argparse
import importlib
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch

from vitkit import backends
from vitkit._checks import name_of

from . import compare, overhead, own, report
from .ceilings import Roofline, measure_roofline
from .harness import LONGEST_CALL, Case, LeftOut, Row, measure, modelled
from .timing import CACHES

OPS = (*own.OPS, "linear", "conv3x3", "models")
SETS = ("smoke", "fast", "full", "scaling")
STDOUT = Path("-")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="vitkit bench",
        description="Speed and parity of the ops against the best PyTorch has, in one run.",
    )
    p.add_argument("ops", nargs="*", help=f"any of {', '.join(OPS)}; all without one")
    p.add_argument("--set", default="fast", choices=SETS, dest="which")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--backend", default="auto", help="backend of vitkit's ops")
    p.add_argument("--dtype", choices=sorted(DTYPES), help="only this dtype")
    p.add_argument("--mode", choices=("forward", "forward+backward"), help="only this mode")
    p.add_argument("--name", help="only rows whose model name contains this")
    p.add_argument("--seconds", type=float, default=1.0, help="time per row")
    p.add_argument(
        "--json", type=Path, nargs="?", const=STDOUT, metavar="FILE",
        help="store the rows in FILE; without one, print them instead of the table",
    )  # fmt: skip
    p.add_argument(
        "--resume", action="store_true",
        help="keep the rows that FILE of --json holds, if they are of this machine and commit, and"
        " measure the others",
    )  # fmt: skip
    p.add_argument(
        "--renew", action="store_true",
        help="measure rows again that FILE of --json holds of another commit; those not asked for"
        " stay, and say their commit",
    )  # fmt: skip
    p.add_argument("--report", type=Path, help="write an HTML page here")
    p.add_argument(
        "--compare", type=Path, metavar="FILE", help="stored rows to compare with, slow-downs first"
    )
    p.add_argument("--cache", default="warm", choices=CACHES, help="swept before each call if cold")
    p.add_argument(
        "--rivals", choices=("usual", "all"), default="usual",
        help="all: also those that a compiler tunes for minutes",
    )  # fmt: skip
    p.add_argument(
        "--time-box", type=float, default=5.0, metavar="SECONDS",
        help="points of a scaling curve with longer calls are modelled",
    )  # fmt: skip
    p.add_argument(
        "--budget", type=float, metavar="SECONDS",
        help="begin no case after that; ops take turns, so that each gets its share",
    )  # fmt: skip
    own.add_options(p)
    return p


def selected_cases(options: argparse.Namespace) -> list[Case]:
    op = own.chosen(options)
    if op is not None:
        return [own.case(options, op, DTYPES[options.dtype or "fp32"])]
    unknown = sorted(set(options.ops) - set(OPS))
    if unknown:
        raise SystemExit(
            f"vitkit bench: no cases for {', '.join(unknown)}; known: {', '.join(OPS)}"
        )
    cases: list[Case] = []
    for op in options.ops or OPS:
        module = importlib.import_module(f".cases.{op}", __package__)
        cases.extend(module.cases(options.device))
    return [
        c
        for c in cases
        if _in_set(c, options.which, options.device)
        and (options.dtype is None or c.dtype == DTYPES[options.dtype])
        and (options.mode is None or c.mode == options.mode)
        and (options.name is None or options.name.lower() in c.name.lower())
    ]


def _in_set(case: Case, which: str, device: str) -> bool:
    """On a CPU the fast set leaves gradients in half precision to the full one: they and their
    rivals take a third of its time."""
    if which == "fast" and device == "cpu" and case.mode != "forward" and case.dtype.itemsize == 2:
        return False
    dtype = name_of(case.dtype)
    return not {which, f"{which} {case.mode}", f"{which} {dtype}"}.isdisjoint(case.sets)


def in_turns(cases: Sequence[Case]) -> list[Case]:
    """The first case of every op, then the second of every op, and so on."""
    seen: dict[str, int] = {}
    ranks = []
    for case in cases:
        ranks.append(seen.get(case.op, 0))
        seen[case.op] = ranks[-1] + 1
    order = sorted(range(len(cases)), key=ranks.__getitem__)
    return [cases[i] for i in order]


def current_commit() -> str | None:
    """Of the source tree this runs from, None outside of one."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or None


def environment(device: str, roofline: Roofline, cache: str = "warm") -> dict[str, Any]:
    """Hardware, versions and commit: what a stored row means nothing without. On a CPU also what
    calling an op costs before its kernel does any work."""
    from vitkit import doctor

    facts = doctor.info()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else doctor.cpu_name(),
        "cpu_isa": facts["cpu_isa"],
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(terse=True),
        "vitkit": facts["vitkit"],
        "torch": torch.__version__,
        "triton": facts["libraries"]["triton"],
        "python": platform.python_version(),
        "commit": current_commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cache": cache,
        "gemm_gflops": roofline.gemm_gflops,
        "copy_gbytes": roofline.copy_gbytes,
        "call_microseconds": overhead.measure() if device == "cpu" else {},
    }


def _cores() -> int:
    import os

    return os.cpu_count() or 1


@contextmanager
def preferred(backend: str) -> Iterator[None]:
    """vitkit's ops take ``backend`` where a call names none."""
    before = backends.DEFAULT
    backends.DEFAULT = backend
    try:
        yield
    finally:
        backends.DEFAULT = before


@dataclass(frozen=True)
class Manner:
    """How cases are measured: seconds per row, state of the cache, which rivals, and the seconds
    of a call beyond which a point of a curve is modelled."""

    seconds: float = 1.0
    cache: str = "warm"
    thorough: bool = False
    time_box: float = 5.0


def _measure_or_model(
    case: Case, device: str, roofline: Roofline, manner: Manner, curve: Sequence[Row]
) -> Row:
    """``curve``: the measured points of the case's curve so far."""
    if curve and case.flops / (curve[-1].gflops * 1e9) > manner.time_box:
        return modelled(case, curve[-1])
    dtype = name_of(case.dtype)
    rate = roofline.gemm_gflops[dtype]
    seconds = case.flops / (rate * 1e9)
    if seconds > LONGEST_CALL:
        raise LeftOut(
            f"a call of torch takes about {seconds:.0f} s: it multiplies {dtype} at {rate:.1f}"
            " GFLOP/s here"
        )
    return measure(case, device, roofline, manner.seconds, manner.cache, manner.thorough)


@dataclass
class Results:
    """What is stored: the environment, the rows, and what failed, by case."""

    facts: dict[str, Any]
    rows: list[Row]
    failures: dict[str, str]


def label(x: Case | Row) -> str:
    """Of a case among all others, and of its row."""
    dtype = x.dtype if isinstance(x, Row) else name_of(x.dtype)
    return f"{x.op} {x.name} {x.mode} {dtype} {x.layout} {x.shape}"


def run(
    cases: Sequence[Case],
    device: str,
    manner: Manner = Manner(),
    progress: TextIO | None = None,
    budget: float = math.inf,
    before: Results | None = None,
    keep: Callable[[Results], None] = lambda results: None,
    renew: bool = False,
) -> Results:
    """Measures all cases that can begin within ``budget`` seconds. ``progress`` gets a line per
    case. Cases among the rows of ``before`` are not measured again unless ``renew``, which keeps
    the rows of other commits; ``keep`` is called with all results so far after every case."""

    def tell(line: str) -> None:
        if progress is not None:
            print(line, file=progress, flush=True)

    roofline = measure_roofline(device, sorted({c.dtype for c in cases}, key=str))
    tell(report.describe_roofline(roofline))
    facts = environment(device, roofline, manner.cache)
    rows = [] if before is None else list(before.rows)
    minutes = 0.0
    if before is not None:
        minutes = _continued(before.facts, facts, renew)
        facts |= _highest(before.facts, facts)
        roofline = Roofline(facts["gemm_gflops"], facts["copy_gbytes"])
        if renew:
            rows = _dated(before, facts["commit"])
    found = Results(facts, rows, {})
    stored = {label(r) for r in rows if not (renew and r.commit)}
    too_long: dict[str, str] = {} if before is None else dict(before.facts.get("too_long", {}))
    begin = time.monotonic()
    for index, case in enumerate(cases):
        left_out = 0
        if time.monotonic() - begin > budget:
            left_out = len(cases) - index
            tell(f"{left_out} cases left out: the {budget:g} s are over")
        elif label(case) not in stored:
            start = time.monotonic()
            text = _measured(case, device, roofline, manner, found, too_long)
            tell(f"[{index + 1}/{len(cases)}] {text} ({time.monotonic() - start:.0f} s)")
        took = round(minutes + (time.monotonic() - begin) / 60, 1)
        found.facts = facts | {"minutes": took, "left_out": left_out, "too_long": too_long}
        keep(found)
        if left_out:
            break
    order = [*(map(label, before.rows) if before is not None and renew else ()), *map(label, cases)]
    place = {name: i for i, name in enumerate(dict.fromkeys(order))}
    ops = list(dict.fromkeys([*OPS, *(row.op for row in rows)]))
    rows.sort(key=lambda row: (ops.index(row.op), place.get(label(row), len(place))))
    keep(found)
    return found


def _measured(
    case: Case,
    device: str,
    roofline: Roofline,
    manner: Manner,
    found: Results,
    too_long: dict[str, str],
) -> str:
    """Measures a case, adds it to what was found, and describes it."""
    name = label(case)
    line = [r for r in found.rows if case.curve and (r.op, r.curve, r.dtype, r.modelled) ==
            (case.op, case.curve, name_of(case.dtype), False)]  # fmt: skip
    try:
        torch._dynamo.reset()
        row = _measure_or_model(case, device, roofline, manner, line)
        found.rows[:] = [r for r in found.rows if label(r) != name] + [row]
        return report.describe_row(row)
    except LeftOut as reason:
        too_long[name] = str(reason)
        return f"{name}: left out, {reason}"
    except Exception as error:
        found.failures[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"{name}: FAILED {found.failures[name]}"


# What rows of one file share; the ceilings and the date may differ by a little.
SHARED = ("device", "cpu_isa", "threads", "vitkit", "torch", "triton", "python", "commit", "cache")


def _highest(*runs: dict[str, Any]) -> dict[str, Any]:
    """Ceilings: the most that was measured in any of the runs."""
    gemm: dict[str, float] = {}
    for facts in runs:
        for name, rate in facts["gemm_gflops"].items():
            gemm[name] = max(rate, gemm.get(name, 0.0))
    return {"gemm_gflops": gemm, "copy_gbytes": max(facts["copy_gbytes"] for facts in runs)}


def _dated(before: Results, commit: str | None) -> list[Row]:
    """The rows of a stored run, those of another commit with its name."""
    of_run = before.facts["commit"]
    dated = (replace(r, commit=r.commit or of_run) for r in before.rows)
    return [replace(r, commit="") if r.commit == commit else r for r in dated]


def _continued(before: dict[str, Any], now: dict[str, Any], renew: bool) -> float:
    """The minutes that a stored run took, if it can be continued.

    Raises:
        SystemExit: it is of another machine or version, or of another commit and not to be renewed.
    """
    for key in SHARED:
        if before.get(key) != now[key] and not (renew and key == "commit"):
            option = "renew" if renew else "resume"
            raise SystemExit(
                f"vitkit bench: --{option} must continue a run of the same {key}, got"
                f" {before.get(key)!r} stored and {now[key]!r} now"
            )
    return float(before.get("minutes", 0.0))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a row's numbers were wrong or it could not run."""
    options = _parser().parse_args(arguments)
    old = None if options.compare is None else report.load(options.compare)
    cases = selected_cases(options)
    if not cases:
        raise SystemExit("vitkit bench: no case matches these options")
    # With JSON on the standard output, everything for people goes to the other one.
    talk = sys.stderr if options.json == STDOUT else sys.stdout
    if cases[0].name == own.NAME:
        dtype = DTYPES[options.dtype or "fp32"]
        print(own.explanation(options, cases[0].op, dtype), file=talk, flush=True)
    manner = Manner(options.seconds, options.cache, options.rivals == "all", options.time_box)
    file = None if options.json in (None, STDOUT) else options.json
    if (options.resume or options.renew) and file is None:
        option = "renew" if options.renew else "resume"
        raise SystemExit(f"vitkit bench: --{option} must come with a FILE of --json")
    before = None
    if (options.resume or options.renew) and file.exists():
        before = Results(*report.load(file), {})
    budget = options.budget
    with preferred(options.backend):
        found = run(
            cases if budget is None else in_turns(cases),
            options.device,
            manner,
            talk,
            math.inf if budget is None else budget,
            before,
            (lambda r: None) if file is None else partial(_store, file),
            options.renew,
        )
    if options.json == STDOUT:
        print(report.as_json(found.facts, found.rows, found.failures))
    else:
        print()
        print(report.markdown(found.facts, found.rows))
    if old is not None:
        print(compare.markdown(*old, found.facts, found.rows), file=talk)
    if options.report:
        options.report.write_text(report.html(found.facts, found.rows))
    return 1 if found.failures else 0


def _store(file: Path, results: Results) -> None:
    report.store(file, results.facts, results.rows, results.failures)


if __name__ == "__main__":
    sys.exit(main())
