"""The harness must refuse what is wrong: numbers, impossible times, tables that drifted."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from vitkit.benchmarks import gpu, report, run
from vitkit.benchmarks.cases import dilated_attention
from vitkit.benchmarks.harness import (
    BeyondRoofline,
    Case,
    LeftOut,
    Provider,
    Roofline,
    WrongNumbers,
    geometric_mean,
    measure,
)

ROOFLINE = Roofline({"float32": 100.0}, 20.0)
X = torch.linspace(-2, 2, 4096)


def case(ours, *rivals, size=1.0):
    providers = [Provider("vitkit", ours, ours=True), Provider("eager", lambda: [X.sin()]), *rivals]
    return Case(
        "sine", "toy", "forward", torch.float32, "flat", "4096",
        lambda: (providers, lambda: [X.double().sin()]), 1.0, size, 1, target=0.01,
    )  # fmt: skip


def slow_sine():
    for _ in range(40):
        y = X.sin()
    return [y]


def test_a_right_provider_is_timed_against_the_best_rival():
    row = measure(case(lambda: [X.sin()], Provider("slow", slow_sine)), "cpu", ROOFLINE, 0.05)
    assert row.best_rival == "eager" and row.rivals["slow"] > row.rivals["eager"]
    assert row.ratio == pytest.approx(row.rivals["eager"] / row.microseconds)
    assert row.max_error <= row.error_limit
    assert row.met and row.peak_mbytes == pytest.approx(X.nbytes / 2**20, rel=0.2)


def test_wrong_numbers_are_not_timed():
    with pytest.raises(WrongNumbers, match="vitkit: max error"):
        measure(case(lambda: [X.sin() + 1e-3]), "cpu", ROOFLINE, 0.05)


def test_an_output_nobody_wrote_is_caught():
    """torch.empty may hold the right answer of the call before; poisoned it cannot."""
    with pytest.raises(WrongNumbers):
        measure(case(lambda: [torch.empty_like(X)]), "cpu", ROOFLINE, 0.05)


def test_numbers_that_go_wrong_while_being_timed_are_caught():
    calls = []

    def drifting():
        calls.append(1)
        return [X.sin() if len(calls) < 5 else X.cos()]

    with pytest.raises(WrongNumbers):
        measure(case(drifting), "cpu", ROOFLINE, 0.05)


def test_a_wrong_rival_is_left_out_and_named():
    rival = Provider("broken", lambda: [X.cos()])
    row = measure(case(lambda: [X.sin()], rival), "cpu", ROOFLINE, 0.05)
    assert "broken" not in row.rivals and "max error" in row.failed["broken"]


def test_faster_than_the_machine_is_refused():
    with pytest.raises(BeyondRoofline, match="below the floor"):
        measure(case(lambda: [X.sin()], size=1e12), "cpu", ROOFLINE, 0.05)


def test_rows_survive_storage_and_tables_show_every_row(tmp_path):
    row = measure(case(lambda: [X.sin()]), "cpu", ROOFLINE, 0.05)
    slow = dataclasses.replace(row, name="slower one", ratio=0.5, target=2.0)
    facts = run.environment("cpu", ROOFLINE)
    path = tmp_path / "rows.json"
    report.store(path, facts, [row, slow], {})
    loaded_facts, rows = report.load(path)
    assert rows == [row, slow] and json.dumps(loaded_facts)
    table = report.markdown(loaded_facts, rows)
    assert "slower one" in table and "**0.50x** | 2.00x missed" in table
    assert f"{geometric_mean([row.ratio, 0.5]):.2f}x the best rival" in table
    page = report.html(facts, rows)
    assert page.count('class="row"') == 3, "the op's mean and two rows"
    assert 'class="slow"' in page


def test_readme_table_drift_is_detected(tmp_path):
    row = measure(case(lambda: [X.sin()]), "cpu", ROOFLINE, 0.05)
    results, readme = tmp_path / "rows.json", tmp_path / "README.md"
    report.store(results, run.environment("cpu", ROOFLINE), [row], {})
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    assert report.main([str(results), "--readme", str(readme), "--check"]) == 1
    assert report.main([str(results), "--readme", str(readme)]) == 0
    assert report.main([str(results), "--readme", str(readme), "--check"]) == 0
    assert report.main([str(results), "--docs", str(readme), "--check"]) == 1
    assert readme.read_text().startswith("before\n") and "toy" in readme.read_text()
    page = tmp_path / "page.html"
    found = [str(results), "--html", str(page)]
    assert report.main([*found, "--check"]) == 1 and not page.exists()
    assert report.main(found) == 0 and report.main([*found, "--check"]) == 0
    page.write_text(page.read_text().replace("toy", "boy"))
    assert report.main([*found, "--check"]) == 1


def test_every_case_of_the_issue_is_there():
    options = run._parser().parse_args(["--set", "full", "--device", "cpu"])
    cases = run.selected_cases(options)
    assert {c.op for c in cases} == set(run.OPS)
    assert len({(c.op, c.name, c.mode, c.dtype, c.layout) for c in cases}) == len(cases)
    smoke = run.selected_cases(run._parser().parse_args(["--set", "smoke", "--device", "cpu"]))
    assert 0 < len(smoke) < len(cases)


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["--q", "8x197x12"],
        ["--q", "1x2x3x8", "--k", "1x2x4x8"],
        ["--shape", "2x0x4x4"],
        ["--tokens", "0"],
    ],
)
def test_bad_options_are_explained(arguments):
    with pytest.raises(SystemExit, match="vitkit bench: "):
        run.main([*arguments, "--device", "cpu"])


def test_a_long_case_says_how_long_it_takes_and_compares_a_sample(monkeypatch, capsys):
    for name, value in (("LONG_FLOPS", 1.0), ("SMALLER_RUN", 64), ("SAMPLED_TOKENS", 9)):
        monkeypatch.setattr(dilated_attention, name, value)
    long = dilated_attention.make_case(
        "toy", 1, 300, 4, 8, torch.float32, False, "cpu", backend="reference"
    )
    row = measure(long, "cpu", ROOFLINE, 0.01)
    assert "9 sampled tokens" in row.shape and row.max_error <= row.error_limit
    told = capsys.readouterr().err
    assert "measured with 64 tokens" in told and told.count("a call in") >= 12
    with pytest.raises(SystemExit, match="must go with fewer tokens"):
        dilated_attention.make_case("toy", 1, 300, 4, 8, torch.float32, True, "cpu")


def test_your_own_shape(capsys):
    shape = ["--shape", "1x8x6x6", "--groups", "4", "--dtype", "fp32"]
    assert run.main([*shape, "--seconds", "0.02", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "would run on 'cpu'" in printed and "your shape" in printed


def test_gpu_entry_without_a_gpu_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "visible_gpu", lambda: None)
    assert gpu.main() == 2
    assert "no GPU is visible" in capsys.readouterr().out


def test_gpu_stages_survive_a_failing_stage(tmp_path):
    stages = [
        gpu.Stage("bad", [sys.executable, "-c", "raise SystemExit(3)"], 20),
        gpu.Stage("slow", [sys.executable, "-c", "import time; time.sleep(20)"], 1),
        gpu.Stage("good", [sys.executable, "-c", "pass"], 20),
    ]
    outcome = gpu.run(stages, {}, tmp_path / "logs" / "gpu.log")
    assert outcome["bad"].startswith("failed (exit code 3)")
    assert outcome["slow"].startswith("stopped after 1 s")
    assert outcome["good"].startswith("ok")


def test_gpu_stages_on_a_machine_with_everything(monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/fake/{name}")
    quick = gpu.stages("cuda", "NVIDIA H100")
    names = [s.name for s in quick]
    assert names[:3] == ["build", "primitives", "tests"] and names[-1] == "benchmarks, fast set"
    assert names[3:-1] == ["memcheck", "racecheck", "synccheck", "initcheck"]
    assert sum(s.seconds for s in quick) <= 600
    for stage in quick:
        files = [a for a in stage.command if a.endswith(".py") and not a.startswith("/")]
        assert all((gpu.ROOT / f).exists() for f in files), stage
    full = [s.command for s in gpu.stages("cuda", "NVIDIA H100", full=True)]
    assert "scaling" in full[-1] and "all" in full[-1]


def test_a_stage_out_of_time_takes_its_children_along(tmp_path):
    code = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); print(p.pid,"
    code += " flush=True); time.sleep(60)"
    log = tmp_path / "gpu.log"
    outcome = gpu.run([gpu.Stage("slow", [sys.executable, "-c", code], 4)], {}, log)
    assert outcome["slow"].startswith("stopped after 4 s")
    child = int(log.read_text().splitlines()[-1])
    state = Path(f"/proc/{child}/stat")
    for _ in range(50):  # until its new parent has collected it
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError(f"process {child} still runs")


def test_gpu_run_collects_what_it_wrote(tmp_path, monkeypatch, capsys):
    results, golden = tmp_path / "results", tmp_path / "golden.json"
    results.mkdir()
    old = results / "old.json"
    old.write_text("{}")
    os.utime(old, (1, 1))
    write = "import pathlib, sys; [pathlib.Path(p).write_text('{}') for p in sys.argv[1:]]"
    files = [str(golden), str(results / "nvidia-h100.json")]
    stages = [
        gpu.Stage("build", [sys.executable, "-c", write, *files], 20),
        gpu.Stage("tests", [str(tmp_path / "absent")], 20),
    ]
    monkeypatch.setattr(gpu, "visible_gpu", lambda: ("NVIDIA H100", "9.0a"))
    monkeypatch.setattr(gpu, "stages", lambda *_: stages)
    monkeypatch.setattr(gpu, "RESULTS", results)
    monkeypatch.setattr(gpu, "GOLDEN", golden)
    out = tmp_path / "out"
    assert gpu.main(["--collect", str(out)]) == 1
    found = sorted(p.name for p in out.iterdir())
    assert found == ["golden.json", "gpu.log", "nvidia-h100.json", "summary.json"]
    facts = json.loads((out / "summary.json").read_text())
    assert facts["stages"]["build"].startswith("ok") and "127" in facts["stages"]["tests"]
    assert "absent" in (out / "gpu.log").read_text() and "build: ok" in capsys.readouterr().out


def test_the_program_for_sanitizers_runs_every_op(monkeypatch, capsys):
    import sanitized_ops

    monkeypatch.setattr(sanitized_ops, "DTYPES", (torch.float32,))
    names = [name for name, _ in sanitized_ops.calls("cpu", "cpu")]
    assert {n.split("-")[0] for n in names} == {s.op for s in sanitized_ops.SAMPLES}
    assert sanitized_ops.main("cpu", "cpu") == 0
    assert f"{len(names)} calls ran, 0 failed, 0 were refused" in capsys.readouterr().out
    assert sanitized_ops.main("cpu", "cuda") == 1


def test_a_budget_gives_every_op_its_share(monkeypatch):
    cases = [case(lambda: [X.sin()]) for _ in range(5)]
    cases = [dataclasses.replace(c, op=op) for c, op in zip(cases, "aaabb", strict=True)]
    assert [c.op for c in run.in_turns(cases)] == list("ababa")
    monkeypatch.setattr(run, "measure_roofline", lambda *_: ROOFLINE)
    found = run.run(cases, "cpu", run.Manner(0.01), budget=-1.0)
    assert found.facts["left_out"] == 5 and not found.rows and not found.failures


def test_a_run_that_was_cut_off_is_continued(monkeypatch):
    """Rows are kept one by one; what is there is not measured again, and nothing of another
    commit is mixed in."""
    monkeypatch.setattr(run, "measure_roofline", lambda *_: ROOFLINE)
    cases = [dataclasses.replace(case(lambda: [X.sin()]), name=n) for n in "abc"]
    before = run.Results({}, [], {})
    kept = []

    def keep(results):
        before.facts, before.rows = results.facts, [*results.rows]
        kept.append([r.name for r in results.rows])
        if len(results.rows) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run(cases[1:], "cpu", run.Manner(0.01), keep=keep)
    assert kept == [["b"], ["b", "c"]]
    times = {r.name: r.microseconds for r in before.rows}
    found = run.run(cases, "cpu", run.Manner(0.01), before=before)
    assert [r.name for r in found.rows] == ["a", "b", "c"]
    assert {r.name: r.microseconds for r in found.rows if r.name in times} == times
    assert found.facts["minutes"] >= before.facts["minutes"]
    before.facts["gemm_gflops"] = {"float32": 1.0, "float16": 7.0}
    before.facts["copy_gbytes"] = 1e6
    highest = run.run(cases, "cpu", run.Manner(0.01), before=before).facts
    assert highest["gemm_gflops"] == ROOFLINE.gemm_gflops | {"float16": 7.0}
    assert highest["copy_gbytes"] == 1e6
    before.facts["commit"] = "another"
    with pytest.raises(SystemExit, match="same commit, got 'another'"):
        run.run(cases, "cpu", run.Manner(0.01), before=before)


def test_rows_of_another_commit_are_renewed_or_say_so(monkeypatch):
    monkeypatch.setattr(run, "measure_roofline", lambda *_: ROOFLINE)
    cases = [dataclasses.replace(case(lambda: [X.sin()]), name=n) for n in "abc"]
    before = run.run(cases, "cpu", run.Manner(0.01))
    now = before.facts["commit"]
    before.facts["commit"] = "0ld"
    manner = run.Manner(0.01)
    found = run.run(cases[1:2], "cpu", manner, before=before, renew=True)
    assert [(r.name, r.commit) for r in found.rows] == [("a", "0ld"), ("b", ""), ("c", "0ld")]
    assert found.facts["commit"] == now
    text = report.markdown(found.facts, found.rows)
    assert "2 of the 3 rows, marked *, were measured at an earlier commit (0ld)." in text
    assert "| c* |" in text and "| b |" in text
    # Going on with it measures what is still old, and nothing else.
    times = {r.name: r.microseconds for r in found.rows}
    again = run.run(cases, "cpu", manner, before=found, renew=True)
    assert not any(r.commit for r in again.rows)
    assert next(r for r in again.rows if r.name == "b").microseconds == times["b"]
    before.facts["threads"] = -1
    with pytest.raises(SystemExit, match="--renew must continue a run of the same threads"):
        run.run(cases, "cpu", manner, before=before, renew=True)


def test_what_takes_too_long_is_left_out_and_named(monkeypatch):
    def refuse():
        raise LeftOut("a call takes an hour")

    monkeypatch.setattr(run, "measure_roofline", lambda *_: ROOFLINE)
    slow = dataclasses.replace(case(lambda: [X.sin()]), make=refuse)
    found = run.run([slow], "cpu", run.Manner(0.01))
    assert not found.failures and list(found.facts["too_long"].values()) == ["a call takes an hour"]
    assert "Left out:" in report.markdown(found.facts, [])
    rate = ROOFLINE.gemm_gflops["float32"] * 1e9
    slow = dataclasses.replace(case(lambda: [X.sin()]), flops=61 * rate)
    found = run.run([slow], "cpu", run.Manner(0.01))
    assert "a call of torch takes about 61 s" in next(iter(found.facts["too_long"].values()))
    assert not found.rows and not found.failures
