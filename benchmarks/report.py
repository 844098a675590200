"""Rows as text: a line, a Markdown table, a JSON file, a page; and the README's table.

``python -m vitkit.benchmarks.report results.json`` prints Markdown, ``--html FILE`` writes the
page, ``--readme README.md`` rewrites the table between the markers, ``--check`` fails if it would
change.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from .harness import Roofline, Row, geometric_mean

BEGIN, END = "<!-- benchmark table: begin -->", "<!-- benchmark table: end -->"


def describe_roofline(roofline: Roofline) -> str:
    gemm = ", ".join(f"{v:.0f} GFLOP/s {name}" for name, v in sorted(roofline.gemm_gflops.items()))
    return f"this machine: {gemm} (torch.mm), {roofline.copy_gbytes:.1f} GB/s (copy, read + write)"


def describe_row(row: Row) -> str:
    target = (
        "" if row.target is None else f", target {row.target:.2f}x {'met' if row.met else 'MISSED'}"
    )
    return (
        f"{row.op} {row.name} {row.mode} {row.dtype} {row.layout}: {row.microseconds:.0f} us,"
        f" {row.ratio:.2f}x {row.best_rival}{target}"
    )


def describe_environment(facts: dict[str, Any]) -> str:
    gemm = ", ".join(f"{v:.0f} GFLOP/s {n}" for n, v in sorted(facts["gemm_gflops"].items()))
    isa = f", {facts['cpu_isa']} kernels" if facts.get("cpu_isa") else ""
    return (
        f"{facts['device']}, {facts['threads']} threads{isa}; torch {facts['torch']},"
        f" vitkit {facts['vitkit']} ({facts['commit']}), {facts['date']}."
        f" Measured in the same run: {gemm} (torch.mm), {facts['copy_gbytes']:.1f} GB/s (copy)."
    )


def markdown(facts: dict[str, Any], rows: Sequence[Row]) -> str:
    """One table per op, slow-downs included, and the geometric mean of each."""
    lines = [describe_environment(facts), ""]
    if facts.get("call_microseconds"):
        calls = (f"{name} {us:.1f} us" for name, us in facts["call_microseconds"].items())
        lines += [f"A call on one element: {', '.join(calls)}.", ""]
    for op in dict.fromkeys(r.op for r in rows):
        mine = [r for r in rows if r.op == op]
        lines += [
            f"**{op}**: {geometric_mean([r.ratio for r in mine]):.2f}x the best rival"
            f" (geometric mean of {len(mine)} rows)",
            "",
            "| model | shape | mode | dtype | layout | vitkit | best rival | speed-up | target"
            " | error / limit | % of floor |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for r in mine:
            target = "" if r.target is None else f"{r.target:.2f}x {'met' if r.met else 'missed'}"
            rival = f"{r.best_rival} {_time(r.rivals[r.best_rival])}"
            error = r.max_error / r.error_limit if r.error_limit else 0.0
            lines.append(
                f"| {r.name} | {r.shape} | {r.mode} | {r.dtype} | {r.layout}"
                f" | {_time(r.microseconds)} | {rival} | **{r.ratio:.2f}x** | {target}"
                f" | {error:.2f} | {r.floor_fraction:.0%} |"
            )
        lines.append("")
    return "\n".join(lines)


def _time(microseconds: float) -> str:
    return f"{microseconds / 1e3:.2f} ms" if microseconds >= 1e3 else f"{microseconds:.0f} us"


def as_json(facts: dict[str, Any], rows: Sequence[Row], failures: dict[str, str]) -> str:
    data = {"environment": facts, "rows": [r.to_dict() for r in rows], "failures": failures}
    return json.dumps(data, indent=1)


def store(path: Path, facts: dict[str, Any], rows: Sequence[Row], failures: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_json(facts, rows, failures) + "\n")


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    data = json.loads(path.read_text())
    return data["environment"], [Row(**row) for row in data["rows"]]


def html(facts: dict[str, Any], rows: Sequence[Row]) -> str:
    """A self-contained page of speed-up bars, readable on a phone, light and dark."""
    import jinja2

    source = files(__package__).joinpath("page.html").read_text()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    ops = []
    for op in dict.fromkeys(r.op for r in rows):
        mine = [r for r in rows if r.op == op]
        ops.append({"name": op, "mean": geometric_mean([r.ratio for r in mine]), "rows": mine})
    return environment.from_string(source).render(
        environment=describe_environment(facts),
        longest=max([r.ratio for r in rows] + [1.0]),
        ops=ops,
        time=_time,
    )


def with_table(readme: str, table: str) -> str:
    """``readme`` with the text between the markers replaced."""
    if BEGIN not in readme or END not in readme:
        raise ValueError(f"report: README must hold {BEGIN} and {END}")
    head, rest = readme.split(BEGIN, 1)
    return f"{head}{BEGIN}\n{table.strip()}\n{END}{rest.split(END, 1)[1]}"


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description="Render stored benchmark rows.")
    p.add_argument("results", type=Path)
    p.add_argument("--html", type=Path)
    p.add_argument("--readme", type=Path, help="rewrite the table between the markers")
    p.add_argument("--check", action="store_true", help="with --readme: only compare")
    options = p.parse_args(arguments)
    facts, rows = load(options.results)
    if options.html:
        options.html.write_text(html(facts, rows))
    if options.readme:
        before = options.readme.read_text()
        after = with_table(before, markdown(facts, rows))
        if options.check:
            return 0 if before == after else 1
        options.readme.write_text(after)
    if not options.html and not options.readme:
        print(markdown(facts, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
