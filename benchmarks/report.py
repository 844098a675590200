"""Rows as text: a line, Markdown tables, a JSON file, a page; and the tables of README and docs.

``python -m vitkit.benchmarks.report results.json`` prints Markdown, ``--html FILE`` writes the
page, ``--readme README.md`` rewrites its summary and ``--docs docs/benchmarks.md`` its tables, both
between markers; ``--check`` fails if they, or the page's words, would change.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from .ceilings import Roofline
from .harness import Row, geometric_mean

BEGIN, END = "<!-- benchmark table: begin -->", "<!-- benchmark table: end -->"


def describe_roofline(roofline: Roofline) -> str:
    gemm = ", ".join(f"{v:.0f} GFLOP/s {name}" for name, v in sorted(roofline.gemm_gflops.items()))
    return f"this machine: {gemm} (torch.mm), {roofline.copy_gbytes:.1f} GB/s (copy, read + write)"


def describe_row(row: Row) -> str:
    if row.modelled:
        return (
            f"{row.op} {row.name} {row.mode} {row.dtype} {row.layout}:"
            f" {_time(row.microseconds)}, modelled"
        )
    target = (
        "" if row.target is None else f", target {row.target:.2f}x {'met' if row.met else 'MISSED'}"
    )
    return (
        f"{row.op} {row.name} {row.mode} {row.dtype} {row.layout}: {row.microseconds:.0f} us,"
        f" {row.ratio:.2f}x {row.best_rival}{target}"
    )


def _older(rows: Sequence[Row]) -> str:
    """What is said of rows of other commits than the run's."""
    count = sum(bool(r.commit) for r in rows)
    if not count:
        return ""
    commits = ", ".join(dict.fromkeys(r.commit for r in rows if r.commit))
    return (
        f" {count} of the {len(rows)} rows, marked *, were measured at an earlier commit"
        f" ({commits})."
    )


def _star(*rows: Row) -> str:
    return "*" if all(r.commit for r in rows) else ""


def describe_environment(facts: dict[str, Any], rows: Sequence[Row]) -> str:
    gemm = ", ".join(f"{v:.0f} GFLOP/s {n}" for n, v in sorted(facts["gemm_gflops"].items()))
    isa = f", {facts['cpu_isa']} kernels" if facts.get("cpu_isa") else ""
    return (
        f"{facts['device']}, {facts['threads']} threads{isa}; torch {facts['torch']},"
        f" vitkit {facts['vitkit']} ({facts['commit']}), {facts['date']}."
        f" Measured in the same run: {gemm} (torch.mm), {facts['copy_gbytes']:.1f} GB/s (copy)."
        f" Caches were {facts.get('cache', 'warm')}."
        + (f" The run took {facts['minutes']:.0f} minutes." if "minutes" in facts else "")
        + _older(rows)
    )


def markdown(facts: dict[str, Any], rows: Sequence[Row]) -> str:
    """One table per op, slow-downs included, and the geometric mean of each."""
    lines = [describe_environment(facts, rows), ""]
    if facts.get("call_microseconds"):
        calls = (f"{name} {us:.1f} us" for name, us in facts["call_microseconds"].items())
        lines += [f"A call on one element: {', '.join(calls)}.", ""]
    for op in dict.fromkeys(r.op for r in rows):
        mine = [r for r in rows if r.op == op and not r.curve]
        if not mine:
            continue
        lines += [
            f"**{op}**: {geometric_mean([r.ratio for r in mine]):.2f}x the best rival"
            f" (geometric mean of {len(mine)} rows)",
            "",
            "| model | shape | mode | dtype | layout | vitkit | best rival | speed-up | target"
            " | error / limit | % of floor | memory |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for r in mine:
            target = "" if r.target is None else f"{r.target:.2f}x {'met' if r.met else 'missed'}"
            rival = f"{r.best_rival} {_time(r.rivals[r.best_rival])}"
            error = r.max_error / r.error_limit if r.error_limit else 0.0
            lines.append(
                f"| {r.name}{_star(r)} | {r.shape} | {r.mode} | {r.dtype} | {r.layout}"
                f" | {_time(r.microseconds)} | {rival} | **{r.ratio:.2f}x** | {target}"
                f" | {error:.2f} | {r.floor_fraction:.0%} | {_share(r)} |"
            )
        lines += ["", _first_calls(mine), ""]
    if facts.get("too_long"):
        lines += ["Left out:", "", *(f"- {n}: {why}" for n, why in facts["too_long"].items()), ""]
    for op, curve in dict.fromkeys((r.op, r.curve) for r in rows if r.curve):
        lines += _curve(curve, [r for r in rows if (r.op, r.curve) == (op, curve)])
    return "\n".join(lines)


def summary(facts: dict[str, Any], rows: Sequence[Row]) -> str:
    """One line per op: how many rows, their mean and range, and the first row as an example."""
    lines = [
        describe_environment(facts, rows),
        "",
        "| op | rows | speed-up (geometric mean) | least to most | for example |",
        "|---|---|---|---|---|",
    ]
    for op in dict.fromkeys(r.op for r in rows if not r.curve):
        mine = [r for r in rows if r.op == op and not r.curve]
        ratios = [r.ratio for r in mine]
        first = mine[0]
        lines.append(
            f"| {op}{_star(*mine)} | {len(mine)} | **{geometric_mean(ratios):.2f}x**"
            f" | {min(ratios):.2f}x to"
            f" {max(ratios):.2f}x | {first.name} {first.mode} {first.dtype}:"
            f" {_time(first.microseconds)}, {first.best_rival}"
            f" {_time(first.rivals[first.best_rival])} |"
        )
    return "\n".join(lines)


def _share(row: Row) -> str:
    """Of the memory that a call of the best rival needs."""
    rival = row.best_rival_peak_mbytes
    return f"{row.peak_mbytes / rival:.2f}x" if rival > 0 else ""


def _first_calls(rows: Sequence[Row]) -> str:
    """What compiling and tuning took before the clock ran."""
    ours = max(r.first_call_ms for r in rows)
    text = f"First calls, not in the times: vitkit at most {ours:.0f} ms"
    compiled = [
        ms for r in rows for name, ms in r.rival_first_calls_ms.items() if "compile" in name
    ]
    if compiled:
        text += f", torch.compile {min(compiled) / 1e3:.1f} to {max(compiled) / 1e3:.1f} s"
    return text + "."


def _curve(curve: str, rows: Sequence[Row]) -> list[str]:
    """Time and memory against size."""
    lines = [
        f"**{rows[0].op}** against {curve}:",
        "",
        "| size | dtype | vitkit | best rival | speed-up | vitkit MiB | rival MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in sorted(rows, key=lambda r: (r.dtype, r.size)):
        mine = f"| {r.size:,.0f} | {r.dtype} | {_time(r.microseconds)}"
        if r.modelled:
            lines.append(f"{mine} (modelled) | | | {r.peak_mbytes:.1f} (modelled) | |")
            continue
        lines.append(
            f"{mine} | {r.best_rival} {_time(r.rivals[r.best_rival])} | **{r.ratio:.2f}x**"
            f" | {r.peak_mbytes:.1f} | {r.best_rival_peak_mbytes:.1f} |"
        )
    return [*lines, ""]


def _time(microseconds: float) -> str:
    return f"{microseconds / 1e3:.2f} ms" if microseconds >= 1e3 else f"{microseconds:.0f} us"


def as_json(facts: dict[str, Any], rows: Sequence[Row], failures: dict[str, str]) -> str:
    stored = [{k: _null(v) for k, v in r.to_dict().items()} for r in rows]
    data = {"environment": facts, "rows": stored, "failures": failures}
    return json.dumps(data, indent=1, allow_nan=False)


def _null(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, tuple):
        return [_null(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _number(key: str, value: Any) -> Any:
    if key.endswith("interval"):
        return tuple(_number("", v) for v in value)
    return math.nan if value is None and key != "target" else value


def store(path: Path, facts: dict[str, Any], rows: Sequence[Row], failures: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_json(facts, rows, failures) + "\n")


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    data = json.loads(path.read_text())
    rows = [Row(**{k: _number(k, v) for k, v in row.items()}) for row in data["rows"]]
    return data["environment"], rows


def html(facts: dict[str, Any], rows: Sequence[Row]) -> str:
    """A self-contained page: speed-up bars, curves, roofline, memory and error. Readable on a
    phone, light and dark."""
    import jinja2

    from . import plots

    source = files(__package__).joinpath("page.html").read_text()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    ops = []
    for op in dict.fromkeys(r.op for r in rows):
        mine = [r for r in rows if r.op == op and not r.curve]
        if not mine:
            continue
        ops.append({"name": op, "mean": geometric_mean([r.ratio for r in mine]), "rows": mine})
    return environment.from_string(source).render(
        environment=describe_environment(facts, rows),
        place=_places([r.ratio for r in rows if not r.modelled]),
        ops=ops,
        curves=any(r.curve for r in rows),
        plots=plots.all_plots(facts, rows),
        time=_time,
    )


def _places(ratios: Sequence[float]) -> Callable[[float], float]:
    """Where a ratio lies on the page's bars, in percent, on a logarithmic scale that holds all."""
    low, high = min([0.8, *ratios]), max([2.0, *ratios])
    return lambda ratio: 100 * math.log(ratio / low) / math.log(high / low)


def _words(page: str) -> str:
    """A page without its drawings, which another matplotlib may draw differently."""
    return re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)


def with_table(readme: str, table: str) -> str:
    """``readme`` with the text between the markers replaced."""
    if BEGIN not in readme or END not in readme:
        raise ValueError(f"report: the page must hold {BEGIN} and {END}")
    head, rest = readme.split(BEGIN, 1)
    return f"{head}{BEGIN}\n{table.strip()}\n{END}{rest.split(END, 1)[1]}"


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description="Render stored benchmark rows.")
    p.add_argument("results", type=Path)
    p.add_argument("--html", type=Path)
    p.add_argument("--readme", type=Path, help="rewrite the summary between the markers")
    p.add_argument("--docs", type=Path, help="rewrite the tables between the markers")
    p.add_argument("--check", action="store_true", help="only compare")
    options = p.parse_args(arguments)
    facts, rows = load(options.results)
    stale = False
    if options.html:
        text = html(facts, rows)
        stale = not options.html.exists() or _words(text) != _words(options.html.read_text())
        if not options.check:
            options.html.write_text(text)
    for path, table in ((options.readme, summary), (options.docs, markdown)):
        if path is None:
            continue
        before = path.read_text()
        after = with_table(before, table(facts, rows))
        stale = stale or before != after
        if not options.check:
            path.write_text(after)
    if not (options.html or options.readme or options.docs):
        print(markdown(facts, rows))
    return int(options.check and stale)


if __name__ == "__main__":
    sys.exit(main())
