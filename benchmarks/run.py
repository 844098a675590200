"""``vitkit bench``: measures cases and prints, stores and renders the rows."""

from __future__ import annotations

import argparse
import importlib
import math
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from vitkit import backends

from . import compare, overhead, own, report
from .ceilings import Roofline, measure_roofline
from .harness import Case, LeftOut, Row, measure, modelled
from .timing import CACHES

OPS = (*own.OPS, "models")
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
        if (options.which in c.sets or f"{options.which} {c.mode}" in c.sets)
        and (options.dtype is None or c.dtype == DTYPES[options.dtype])
        and (options.mode is None or c.mode == options.mode)
        and (options.name is None or options.name.lower() in c.name.lower())
    ]


def in_turns(cases: Sequence[Case]) -> list[Case]:
    """The first case of every op, then the second of every op, and so on."""
    seen: dict[str, int] = {}
    ranks = []
    for case in cases:
        ranks.append(seen.get(case.op, 0))
        seen[case.op] = ranks[-1] + 1
    order = sorted(range(len(cases)), key=ranks.__getitem__)
    return [cases[i] for i in order]


def environment(device: str, roofline: Roofline, cache: str = "warm") -> dict[str, Any]:
    """Hardware, versions and commit: what a stored row means nothing without. On a CPU also what
    calling an op costs before its kernel does any work."""
    from vitkit import doctor

    facts = doctor.info()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent, capture_output=True, text=True,
    )  # fmt: skip
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
        "commit": commit.stdout.strip() or None,
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
    return measure(case, device, roofline, manner.seconds, manner.cache, manner.thorough)


def run(
    cases: Sequence[Case],
    device: str,
    manner: Manner = Manner(),
    progress: TextIO | None = None,
    budget: float = math.inf,
) -> tuple[dict[str, Any], list[Row], dict[str, str]]:
    """Measures all cases that can begin within ``budget`` seconds; returns the environment, the
    rows, and what failed, by case. ``progress`` gets a line per case."""

    def tell(line: str) -> None:
        if progress is not None:
            print(line, file=progress, flush=True)

    roofline = measure_roofline(device, sorted({c.dtype for c in cases}, key=str))
    tell(report.describe_roofline(roofline))
    begin = time.monotonic()
    rows: list[Row] = []
    failures: dict[str, str] = {}
    left_out = 0
    too_long: dict[str, str] = {}
    for index, case in enumerate(cases):
        if time.monotonic() - begin > budget:
            left_out = len(cases) - index
            tell(f"{left_out} cases left out: the {budget:g} s are over")
            break
        dtype = str(case.dtype).removeprefix("torch.")
        label = f"{case.op} {case.name} {case.mode} {dtype} {case.layout}"
        line = [r for r in rows if case.curve and (r.op, r.curve, r.dtype, r.modelled) ==
                (case.op, case.curve, dtype, False)]  # fmt: skip
        start = time.monotonic()
        try:
            torch._dynamo.reset()
            rows.append(_measure_or_model(case, device, roofline, manner, line))
            seconds = f" ({time.monotonic() - start:.0f} s)"
            tell(f"[{index + 1}/{len(cases)}] {report.describe_row(rows[-1])}{seconds}")
        except LeftOut as reason:
            too_long[label] = str(reason)
            tell(f"[{index + 1}/{len(cases)}] {label}: left out, {reason}")
        except Exception as error:
            failures[label] = f"{type(error).__name__}: {error}".splitlines()[0]
            tell(f"[{index + 1}/{len(cases)}] {label}: FAILED {failures[label]}")
    took = {
        "minutes": round((time.monotonic() - begin) / 60, 1),
        "left_out": left_out,
        "too_long": too_long,
    }
    return environment(device, roofline, manner.cache) | took, rows, failures


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
    with preferred(options.backend):
        if options.budget is None:
            facts, rows, failures = run(cases, options.device, manner, talk)
        else:
            shared = in_turns(cases)
            facts, rows, failures = run(shared, options.device, manner, talk, options.budget)
    if options.json == STDOUT:
        print(report.as_json(facts, rows, failures))
    else:
        print()
        print(report.markdown(facts, rows))
    if old is not None:
        print(compare.markdown(*old, facts, rows), file=talk)
    if options.json and options.json != STDOUT:
        report.store(options.json, facts, rows, failures)
    if options.report:
        options.report.write_text(report.html(facts, rows))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
