"""``make models``: every reference model at its full size, and models of the hosts, verified.

``python -m vitkit.benchmarks.models [NAME ...]`` runs what is named (names of ``vitkit.models`` or
of ``cases/models.py``, shell-style patterns), all without one, the smallest first, each in its own
process with a limit on time and memory; what is stored already is kept unless ``--again``. Rows go
to a JSON file, from which ``python -m vitkit.models docs/models.md`` makes the tables.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from vitkit import doctor
from vitkit.example_inputs import shapes_of
from vitkit.model_specs import without_zeros
from vitkit.models import create, list_models
from vitkit.models.__main__ import parameters
from vitkit.verification import AFTER, BEFORE, Verification
from vitkit.verify import verify

from .cases.models import MODELS, Inputs
from .run import current_commit

RESULTS = Path(__file__).parent / "results"
HOSTS = {m.name: m for m in MODELS if m.rival is None}
GIB = 2.0**30


CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}


def environment(clock: str = "wall") -> dict[str, Any]:
    """What rows that are compared must have in common."""
    facts = doctor.info()
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else doctor.cpu_name(),
        "cpu_isa": facts["cpu_isa"],
        "threads": torch.get_num_threads(),
        "libraries": {k: v for k, v in facts["libraries"].items() if v},
        "python": facts["python"],
        "clock": clock,
    }


def default_path() -> Path:
    """The stored rows; the last of several machines'."""
    found = sorted(RESULTS.glob("models-*.json"))
    return found[-1] if found else RESULTS / "models-cpu.json"


def load(path: Path | None = None) -> dict[str, Any]:
    path = path or default_path()
    return json.loads(path.read_text()) if path.exists() else {"environment": {}, "rows": {}}


# ---- one model, in its own process ----


def _make(name: str) -> tuple[torch.nn.Module, Inputs]:
    torch.manual_seed(0)
    if name in HOSTS:
        model, inputs = HOSTS[name].make()
        return without_zeros(model), inputs
    model = without_zeros(create(name))
    return model, (model.example_inputs(batch=1), {})  # type: ignore[operator]


def measure(name: str, seconds: float, clock: str = "wall") -> dict[str, Any]:
    """The row of a model."""
    model, (args, kwargs) = _make(name)
    result = verify(model.eval(), *args, seconds=seconds, clock=CLOCKS[clock], **kwargs)
    return _row(result, shapes_of((args, kwargs)))


def _row(result: Verification, shapes: str) -> dict[str, Any]:
    before, after = result.timings[BEFORE], result.timings[AFTER]
    calls = {op: sum(by.values()) for op, by in result.kernel_calls.items()}
    return {
        "inputs": shapes,
        "baseline": result.baseline,
        "replaced": len(result.report.replaced),
        "left": len(result.report.skipped),
        "own": sum(result.own.values()),
        "kernel_calls": calls,
        "ok": result.ok,
        "problems": result.problems,
        "max_error": result.worst.parity.relative,
        "closeness": result.closeness,
        "milliseconds": [before.seconds * 1e3, after.seconds * 1e3],
        "speedup": after.speedup,
        "spread": after.spread,
        "rounds": result.rounds,
        "peak_mbytes": [before.peak_bytes / 2**20, after.peak_bytes / 2**20],
    }


# ---- all of them ----


def _memory_available() -> float:
    """GiB."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return 8.0
    (line,) = [x for x in text.splitlines() if x.startswith("MemAvailable")]
    return int(line.split()[1]) * 1024 / GIB


def needed(count: int) -> float:
    """GiB of a float32 model of so many parameters, its float64 copy, and a call."""
    return count * (4 + 8) / GIB + 1.5


def attempt(name: str, count: int, options: argparse.Namespace) -> dict[str, Any]:
    """The row of a model, or {"reason": why there is none}."""
    gib = needed(count)
    if gib > options.memory:
        return {"reason": f"needs about {gib:.0f} GiB"}
    command = [sys.executable, "-m", __spec__.name, "--one", name, "--clock", options.clock]
    command += ["--seconds", options.seconds]
    try:
        done = subprocess.run(
            [str(c) for c in command], capture_output=True, text=True, timeout=options.time_box
        )
    except subprocess.TimeoutExpired:
        return {"reason": f"takes more than {options.time_box:g} s"}
    if done.returncode < 0:
        return {"reason": f"ended by signal {-done.returncode}"}
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def chosen(patterns: Sequence[str]) -> list[str]:
    """Names that match any of the patterns, the models of the hosts first."""
    every = [*HOSTS, *list_models()]
    found = []
    for pattern in patterns or ["*"]:
        matching = fnmatch.filter(every, pattern)
        if not matching:
            raise SystemExit(f"make models: nothing is called {pattern!r}; known: {every}")
        found += [n for n in matching if n not in found]
    return found


def describe(name: str, row: dict[str, Any]) -> str:
    if "reason" in row:
        return f"{name}: not run, {row['reason']}"
    before, after = row["milliseconds"]
    return (
        f"{name}: {'same numbers' if row['ok'] else row['problems']}, error {row['closeness']:.2f}"
        f" of its limit; {before:.0f} ms -> {after:.0f} ms, {row['speedup']:.2f}x"
    )


def run(options: argparse.Namespace) -> int:
    data, facts = load(options.json), environment(options.clock)
    if data["rows"] and data["environment"] != facts:
        raise SystemExit(
            f"make models: {options.json} must come from this machine and these versions, got"
            f" {data['environment']}; name another file with --json"
        )
    data["environment"] = facts
    names = chosen(options.names)
    counts = {n: parameters(n) if n not in HOSTS else 0 for n in names}
    for name in sorted(names, key=counts.__getitem__):
        stored = data["rows"].get(name)
        if stored and "reason" not in stored and not options.again:
            print(f"{name}: stored already ({stored['date']})", flush=True)
            continue
        started = time.time()
        row = attempt(name, counts[name], options)
        row |= {"commit": current_commit(), "date": time.strftime("%Y-%m-%d", time.gmtime())}
        data["rows"][name] = row
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
        print(f"{describe(name, row)} ({time.time() - started:.0f} s)", flush=True)
    return int(any(not data["rows"][n].get("ok", True) for n in names))


# ---- what docs/models.md shows ----

COLUMNS = ("kernel calls", "error / limit", "speed against the reference")


def cells(name: str, rows: dict[str, Any]) -> tuple[str, ...]:
    """The measured columns of a reference model."""
    row = rows.get(name)
    if row is None or "reason" in row:
        return ("not run" if row is None else f"not run: {row['reason']}", "", "")
    return _numbers(row)


def _numbers(row: dict[str, Any]) -> tuple[str, ...]:
    calls = str(sum(row["kernel_calls"].values()))
    closeness = f"{row['closeness']:.2f}" if row["ok"] else "**missed**"
    least, most = row["spread"]
    return calls, closeness, f"{row['speedup']:.2f}x ({least:.2f} to {most:.2f})"


def hosts_table(data: dict[str, Any]) -> str:
    """Markdown: models of the hosts, patched against unpatched, and what all was measured on."""
    facts, rows = data["environment"], data["rows"]
    lines = [
        "| model | input | modules replaced, left | kernel calls | error / limit | speed | MiB of a"
        " call |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in HOSTS.values():
        row = rows.get(model.name)
        if row is None or "reason" in row:
            reason = "not run" if row is None else f"not run: {row['reason']}"
            lines.append(f"| {model.name} | {model.shape} | {reason} | | | | |")
            continue
        numbers = " | ".join(_numbers(row))
        memory = " to ".join(f"{m:.0f}" for m in row["peak_mbytes"])
        modules = f"{row['replaced']}, {row['left']}"
        lines.append(f"| {model.name} | {row['inputs']} | {modules} | {numbers} | {memory} |")
    measured = [r for r in rows.values() if "reason" not in r]
    return "\n".join([*lines, "", _measured_on(facts, measured)])


_TIMES = {"wall": "{} threads", "cpu": "CPU time on one thread (other work shared the machine)"}


def _measured_on(facts: dict[str, Any], rows: Iterable[dict[str, Any]]) -> str:
    rows = list(rows)
    if not rows:
        return "Nothing was measured yet."
    versions = ", ".join(f"{k} {v}" for k, v in facts["libraries"].items())
    commits = ", ".join(sorted({r["commit"] for r in rows if r["commit"]}))
    dates = sorted({r["date"] for r in rows})
    between = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    times = _TIMES[facts["clock"]].format(facts["threads"])
    return (
        f"Both tables: float32 on {facts['device']}, {facts['cpu_isa']} kernels, {times};"
        f" {versions}; vitkit {commits}, {between}."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="make models", description=__doc__.split("\n")[0])
    p.add_argument("names", nargs="*", help="names or patterns; all without one")
    p.add_argument("--json", type=Path, default=default_path(), help="where rows are stored")
    p.add_argument("--memory", type=float, default=0.7 * _memory_available(), help="limit in GiB")
    p.add_argument("--time-box", type=float, default=600.0, help="limit in seconds, of each model")
    p.add_argument("--seconds", type=float, default=5.0, help="of timing, for each model")
    p.add_argument(
        "--clock", choices=CLOCKS, default="wall",
        help="cpu: CPU time on one thread, for a machine that does other things too",
    )  # fmt: skip
    p.add_argument("--again", action="store_true", help="what is stored already too")
    p.add_argument("--one", help=argparse.SUPPRESS)
    options = p.parse_args(arguments)
    if options.clock == "cpu":
        torch.set_num_threads(1)
    if options.one:
        print(json.dumps(measure(options.one, options.seconds, options.clock)))
        return 0
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
