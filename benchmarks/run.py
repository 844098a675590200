"""``vitkit bench``: measures cases and prints, stores and renders the rows."""

from __future__ import annotations

import argparse
import importlib
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from . import overhead, report
from .harness import Case, Roofline, Row, measure, measure_roofline

OPS = (
    "group_norm_silu",
    "flash_attention",
    "window_attention",
    "dilated_attention",
    "swiglu",
    "geglu",
    "gelu",
    "rope_2d",
    "layer_norm_modulate",
    "gated_residual",
    "patch_embed",
)
STDOUT = Path("-")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="vitkit bench",
        description="Speed and parity of the ops against the best PyTorch has, in one run.",
    )
    p.add_argument("ops", nargs="*", help=f"any of {', '.join(OPS)}; all without one")
    p.add_argument("--set", default="fast", choices=("smoke", "fast", "full"), dest="which")
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
    shape = p.add_argument_group("your own shape")
    shape.add_argument("--q", help="flash_attention: BxNxHxD")
    shape.add_argument("--k", help="flash_attention: BxNxHxD of k and v, that of q without it")
    shape.add_argument("--bias", default="none", help="none, heads, batch or keys")
    shape.add_argument("--shape", help="group_norm_silu: NxCxHxW")
    shape.add_argument("--groups", type=int, default=32)
    shape.add_argument("--layout", choices=("nchw", "nhwc"), default="nchw")
    shape.add_argument("--tokens", type=int, help="dilated_attention: N")
    shape.add_argument("--heads", type=int, default=16, help="dilated_attention: H")
    shape.add_argument("--head-dim", type=int, default=48, help="dilated_attention: D")
    shape.add_argument("--backward", action="store_true", help="forward+backward")
    return p


def _integers(text: str, count: int, flag: str) -> tuple[int, ...]:
    parts = text.lower().split("x")
    if len(parts) != count or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise SystemExit(
            f"vitkit bench: {flag} must be {count} sizes like 8x197x12x64, got {text!r}"
        )
    return tuple(int(p) for p in parts)


def _own_case(options: argparse.Namespace) -> Case | None:
    """The case described on the command line, None if none is."""
    dtype = DTYPES[options.dtype or "fp32"]
    if options.q:
        from .cases import flash_attention

        b, nq, h, d = _integers(options.q, 4, "--q")
        kb, nk, kh, kd = _integers(options.k, 4, "--k") if options.k else (b, nq, h, d)
        if (kb, kh, kd) != (b, h, d):
            raise SystemExit("vitkit bench: --k must have the batch, heads and head dim of --q")
        return flash_attention.make_case(
            "your shape", b, nq, nk, h, d, options.bias, dtype, options.backward, options.device,
            backend=options.backend,
        )  # fmt: skip
    if options.shape:
        from .cases import group_norm_silu

        shape = _integers(options.shape, 4, "--shape")
        return group_norm_silu.make_case(
            "your shape", shape, options.groups, dtype, options.layout == "nhwc", options.backward,
            options.device, backend=options.backend,
        )  # fmt: skip
    if options.tokens is not None:
        from .cases import dilated_attention

        sizes = _token_sizes(options)
        return dilated_attention.make_case(
            "your shape", *sizes, dtype, options.backward, options.device, backend=options.backend
        )
    return None


def _token_sizes(options: argparse.Namespace) -> tuple[int, int, int, int]:
    """[B, N, H, D] of dilated_attention."""
    sizes = (1, options.tokens, options.heads, options.head_dim)
    if min(sizes) < 1:
        raise SystemExit("vitkit bench: --tokens, --heads and --head-dim must be at least 1")
    return sizes


def selected_cases(options: argparse.Namespace) -> list[Case]:
    own = _own_case(options)
    if own is not None:
        return [own]
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
        if options.which in c.sets
        and (options.dtype is None or c.dtype == DTYPES[options.dtype])
        and (options.mode is None or c.mode == options.mode)
        and (options.name is None or options.name.lower() in c.name.lower())
    ]


def environment(device: str, roofline: Roofline) -> dict[str, Any]:
    """Hardware, versions and commit: what a stored row means nothing without. On a CPU also what
    calling an op costs before its kernel does any work."""
    from vitkit import doctor

    facts = doctor.info()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent, capture_output=True, text=True,
    )  # fmt: skip
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
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
        "gemm_gflops": roofline.gemm_gflops,
        "copy_gbytes": roofline.copy_gbytes,
        "call_microseconds": overhead.measure() if device == "cpu" else {},
    }


def _cores() -> int:
    import os

    return os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def run(
    cases: Sequence[Case], device: str, seconds: float = 2.0, progress: TextIO | None = None
) -> tuple[dict[str, Any], list[Row], dict[str, str]]:
    """Measures all cases; returns the environment, the rows, and what failed, by case. ``progress``
    gets a line per case."""

    def tell(line: str) -> None:
        if progress is not None:
            print(line, file=progress, flush=True)

    roofline = measure_roofline(device, sorted({c.dtype for c in cases}, key=str))
    tell(report.describe_roofline(roofline))
    rows: list[Row] = []
    failures: dict[str, str] = {}
    for index, case in enumerate(cases):
        label = f"{case.op} {case.name} {case.mode} {str(case.dtype)[6:]} {case.layout}"
        try:
            torch._dynamo.reset()
            rows.append(measure(case, device, roofline, seconds))
            tell(f"[{index + 1}/{len(cases)}] {report.describe_row(rows[-1])}")
        except Exception as error:
            failures[label] = f"{type(error).__name__}: {error}".splitlines()[0]
            tell(f"[{index + 1}/{len(cases)}] {label}: FAILED {failures[label]}")
    return environment(device, roofline), rows, failures


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a row's numbers were wrong or it could not run."""
    options = _parser().parse_args(arguments)
    cases = selected_cases(options)
    if not cases:
        raise SystemExit("vitkit bench: no case matches these options")
    # With JSON on the standard output, everything for people goes to the other one.
    talk = sys.stderr if options.json == STDOUT else sys.stdout
    if len(cases) == 1 and cases[0].name == "your shape":
        print(_explain(options), file=talk, flush=True)
    facts, rows, failures = run(cases, options.device, options.seconds, talk)
    if options.json == STDOUT:
        print(report.as_json(facts, rows, failures))
    else:
        print()
        print(report.markdown(facts, rows))
    if options.json and options.json != STDOUT:
        report.store(options.json, facts, rows, failures)
    if options.report:
        options.report.write_text(report.html(facts, rows))
    return 1 if failures else 0


def _explain(options: argparse.Namespace) -> str:
    """Which backend the case takes and why."""
    import vitkit

    dtype = DTYPES[options.dtype or "fp32"]
    if options.q:
        b, nq, h, d = _integers(options.q, 4, "--q")
        nk = _integers(options.k, 4, "--k")[1] if options.k else nq
        q = torch.empty(b, nq, h, d, dtype=dtype, device=options.device)
        k = torch.empty(b, nk, h, d, dtype=dtype, device=options.device)
        return str(vitkit.explain("flash_attention", q, k, k, backend=options.backend))
    if options.tokens is not None:
        from .cases import dilated_attention as case

        q = torch.empty(_token_sizes(options), dtype=dtype, device=options.device)
        return str(
            vitkit.explain(
                case.OP, q, q, q, segment_lengths=case.LENGTHS, dilation_ratios=case.RATIOS,
                backend=options.backend,
            )
        )  # fmt: skip
    x = torch.empty(_integers(options.shape, 4, "--shape"), dtype=dtype, device=options.device)
    return str(vitkit.explain("group_norm_silu", x, options.groups, backend=options.backend))


if __name__ == "__main__":
    sys.exit(main())
