"""What is made of benchmark rows: tables, comparisons, plots, and the page in a real browser."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from browser import assert_readable, on_a_phone

from vitkit.benchmarks import compare, own, plots, report, run
from vitkit.benchmarks.harness import Case, Row, modelled
from vitkit.benchmarks.timing import Clock, interval, last_level_cache

FACTS = {
    "device": "toy", "threads": 1, "cpu_isa": "avx2", "torch": "2", "vitkit": "0", "commit": "abc",
    "date": "2026-01-01", "gemm_gflops": {"float32": 100.0, "bfloat16": 1.0}, "copy_gbytes": 20.0,
}  # fmt: skip


def row(name="toy", microseconds=100.0, rival=150.0, noise=0.01, **other):
    def around(median):
        return (median * (1 - noise), median * (1 + noise))

    values = dict(
        op="sine", name=name, mode="forward", dtype="float32", layout="flat", shape="8x16",
        provider="vitkit", microseconds=microseconds, spread=noise, rivals={"eager": rival},
        best_rival="eager", ratio=rival / microseconds, target=None, max_error=1e-7,
        error_limit=1e-6, eager_error=2e-7, gflops=1e3 / microseconds, gbytes=1.0,
        floor_fraction=0.5, peak_mbytes=1.0, best_rival_peak_mbytes=2.0, first_call_ms=1.0,
        interval=around(microseconds), rival_interval=around(rival), scale=1.0,
    )  # fmt: skip
    return Row(**(values | other))


def curve_rows():
    points = [row(f"{n} items", 10.0 * n, 30.0 * n, curve="items", size=n) for n in (1, 10, 100)]
    case = Case(
        "sine", "1000 items", "forward", torch.float32, "flat", "1000", None, 5e6, 1e3, 1,
        curve="items", size=1000.0,
    )  # fmt: skip
    return [*points, modelled(case, points[-1])]


# ---- tables and comparisons ----


def test_a_modelled_point_follows_the_rate_of_the_last_measured_one():
    *_, last, guess = curve_rows()
    assert guess.microseconds == pytest.approx(5e6 / (last.gflops * 1e9) * 1e6)
    assert guess.peak_mbytes == 10 * last.peak_mbytes and math.isnan(guess.max_error)
    assert guess.rivals == {} and guess.modelled and not last.modelled
    table = report.markdown(FACTS, curve_rows())
    assert "(modelled)" in table and "geometric mean" not in table


def test_points_beyond_the_time_box_are_modelled(monkeypatch):
    """Two points are cheap, the third would take longer than the box."""
    monkeypatch.setattr(run, "measure", lambda case, *a: row(case.name, curve="items", gflops=1.0))
    cases = [
        Case("sine", str(f), "forward", torch.float32, "flat", "", None, f, 1.0, 1, curve="items")
        for f in (1e6, 1e8, 1e10)
    ]
    cases[0].size, cases[1].size, cases[2].size = 1, 2, 3
    monkeypatch.setattr(run, "modelled", lambda case, last: row(case.name, modelled=True))
    monkeypatch.setattr(run, "environment", lambda *a: FACTS)
    found = run.run(cases, "cpu", run.Manner(time_box=1.0))
    assert not found.failures and [r.modelled for r in found.rows] == [False, False, True]


def test_unknown_numbers_survive_storage_as_null(tmp_path):
    path = tmp_path / "rows.json"
    report.store(path, FACTS, curve_rows(), {})
    assert "NaN" not in path.read_text()
    assert repr(report.load(path)[1]) == repr(curve_rows())


@pytest.mark.parametrize(
    ("rival", "noise", "verdict"),
    [(150.0, 0.01, "same"), (100.0, 0.01, "slower"), (100.0, 0.5, "same"), (200.0, 0.01, "faster")],
)
def test_a_change_counts_only_beyond_its_noise(rival, noise, verdict):
    (change,) = compare.changes([row()], [row(rival=rival, noise=noise)])
    assert change.verdict == verdict


def test_a_comparison_matches_cases_and_puts_the_worst_first():
    old = [row("a"), row("b"), row("gone")]
    new = [row("b", rival=160.0), row("a", rival=75.0), row("fresh")]
    table = compare.markdown(FACTS, old, FACTS, new)
    assert "2 cases in both runs, 1 slower, 1 faster, 1 without a counterpart" in table
    assert table.index("sine a forward") < table.index("sine b forward")
    other = dataclasses.replace(new[1], best_rival="flex", rivals={"flex": 75.0})
    assert compare.changes(old, [other])[0].verdict == "new rival"


# ---- clocks ----


def test_a_cold_clock_sweeps_the_cache_outside_the_time():
    assert last_level_cache("cpu") >= 64 << 10
    calls = []
    seconds = Clock("cpu", "cold").sample(lambda: calls.append(1), 3)
    assert len(calls) == 3 and 0 < seconds < 1e-3
    with pytest.raises(ValueError, match="cache must be one of warm, cold"):
        Clock("cpu", "lukewarm")


def test_the_interval_holds_the_middle_of_the_samples():
    assert interval(range(11)) == (2, 8)
    assert interval([3.0]) == (3.0, 3.0)


# ---- shapes of one's own ----


@pytest.mark.parametrize(
    ("arguments", "op", "shape"),
    [
        (["--q", "2x9x3x16", "--k", "2x5x3x16", "--bias", "keys"], "flash_attention", "kv 5"),
        (["--map", "1x9x8x2x16", "--window", "4", "--shift", "2"], "window_attention", "window 4"),
        (["--images", "2x3x32x32", "--embed", "8", "--uint8"], "patch_embed", "patch 16x16"),
        (["layer_norm_modulate", "--shape", "2x5x8"], "layer_norm_modulate", "per sample"),
        (["swiglu", "--shape", "2x5x8"], "swiglu", "2x5x8"),
        (["gelu", "--shape", "2x5x8"], "gelu", "2x5x8"),
        (["rope_2d", "--shape", "2x5x2x8"], "rope_2d", "2x5x2x8"),
        (["gated_residual", "--shape", "2x5x8"], "gated_residual", "gate 2x8"),
        (["geglu", "--shape", "2x5x8", "--backward"], "geglu", "2x5x8"),
    ],
)
def test_every_op_takes_your_shape(arguments, op, shape):
    options = run._parser().parse_args([*arguments, "--device", "cpu", "--dtype", "bf16"])
    (case,) = run.selected_cases(options)
    assert case.op == op and shape in case.shape and case.dtype == torch.bfloat16
    assert case.mode == ("forward+backward" if options.backward else "forward")
    providers, exact = case.make()
    for ours, truth in zip(providers[0].call(), exact(), strict=True):
        assert ours.shape == truth.shape
    assert "would run on 'cpu'" in own.explanation(options, op, case.dtype)


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["swiglu", "--shape", "2x5x7"], "even size"),
        (["--images", "2x3x30x30"], "--patch must divide"),
        (["--map", "1x8x8x2x16", "--shift", "9"], "--shift must lie in 0..6"),
        (["--shape", "1x9x4x4"], "--groups must divide"),
        (["--q", "1x2x3x8", "--tokens", "4"], "must not go together"),
        (["gelu", "--q", "1x2x3x8"], "must go with one op of flash_attention"),
    ],
)
def test_shapes_that_are_none_are_explained(arguments, rule):
    with pytest.raises(SystemExit, match=re.escape(rule)):
        run.main([*arguments, "--device", "cpu"])


def test_the_backend_asked_for_is_the_one_measured():
    from vitkit import backends

    before = backends.DEFAULT
    with run.preferred("reference"):
        assert backends.DEFAULT == "reference"
    assert before == backends.DEFAULT


# ---- the page ----


def page():
    rows = [row(f"case {i}", 100.0, 60.0 * (i + 1)) for i in range(4)]
    rows += [dataclasses.replace(r, dtype="bfloat16", op="cosine") for r in rows]
    return report.html(FACTS, rows + curve_rows())


def test_the_page_is_self_contained_and_shows_every_row():
    text = page()
    assert text.count('class="slow"') == 2
    assert not re.search(r'(src|href)="(http|//)', text)
    assert all(f"case {i}" in text for i in range(4))
    titles = [p.title for p in plots.all_plots(FACTS, curve_rows())]
    assert titles[:2] == ["sine, float32, forward: time", "sine, float32, forward: peak memory"]
    assert "#0102" not in text and "vitkit, modelled" in text


@on_a_phone
def test_a_browser_shows_the_page_on_a_phone(tmp_path, bright):
    assert_readable(page(), bright, tmp_path)
