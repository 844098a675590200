"""make models: what is run, kept, left out and shown."""

from __future__ import annotations

import json

import pytest

from vitkit.benchmarks import models
from vitkit.models import create

FACTS = {
    "device": "toy", "cpu_isa": "avx2", "threads": 1, "libraries": {"torch": "2"}, "python": "3",
    "clock": "wall",
}  # fmt: skip


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """Runs the command with rows that cost nothing; returns the exit code and the file."""
    monkeypatch.setattr(models, "environment", lambda clock: FACTS)
    path = tmp_path / "rows.json"

    def run(*arguments):
        return models.main([*arguments, "--json", str(path)]), json.loads(path.read_text())

    return run


def row(**other):
    fields = {
        "inputs": "1x3x8x8", "baseline": "", "replaced": 3, "left": 1, "own": 0, "ok": True,
        "kernel_calls": {"gelu_fwd": 2, "swiglu_fwd": 1}, "problems": [], "max_error": 1e-6,
        "closeness": 0.25, "milliseconds": [30.0, 20.0], "speedup": 1.5, "spread": [1.25, 2.0],
        "rounds": 5,
        "peak_mbytes": [4.0, 2.0], "date": "2026-01-01", "commit": "abc",
    }  # fmt: skip
    return fields | other


def test_a_row_is_what_verify_found(monkeypatch):
    def small(name):
        model = create(name, reduced=True)
        return model, (model.example_inputs(), {})

    monkeypatch.setattr(models, "_make", small)
    found = models.measure("vit_s16", 0.01)
    assert found["ok"] and found["own"] > 0 and found["inputs"].startswith("1x3x")
    assert found["kernel_calls"]["flash_attention_fwd"] > 0 and 0 < found["closeness"] < 1
    assert found["speedup"] > 0 and min(found["milliseconds"] + found["peak_mbytes"]) > 0
    assert found["spread"][0] <= found["speedup"] <= found["spread"][1]
    json.dumps(found)


def test_what_is_stored_is_kept_and_what_was_left_out_is_tried_again(stored, monkeypatch, capsys):
    tried = []

    def attempt(name, count, options):
        tried.append(name)
        return row() if len(tried) != 2 else {"reason": "takes more than 60 s"}

    monkeypatch.setattr(models, "attempt", attempt)
    code, data = stored("dit_s*", "swin_t")
    assert code == 0 and data["environment"] == FACTS
    assert tried == ["swin_t", "dit_s2", "dit_s4", "dit_s8"], "the smallest first"
    assert "dit_s2: not run, takes more than 60 s" in capsys.readouterr().out
    stored("dit_s*")
    assert tried[4:] == ["dit_s2"]
    stored("swin_t", "--again")
    assert tried[5:] == ["swin_t"]
    monkeypatch.setattr(models, "environment", lambda clock: {**FACTS, "threads": 2})
    with pytest.raises(SystemExit, match="must come from this machine and these versions"):
        stored("swin_t")


def test_a_model_that_fails_fails_the_command(stored, monkeypatch):
    monkeypatch.setattr(models, "attempt", lambda *a: row(ok=False, problems=["output: TOO LARGE"]))
    code, data = stored("dit_s2")
    assert code == 1 and not data["rows"]["dit_s2"]["ok"]
    assert models.cells("dit_s2", data["rows"])[1] == "**missed**"


def test_limits_leave_models_out(stored):
    code, data = stored("dalle", "--memory", "8")
    assert code == 0 and data["rows"]["dalle"]["reason"] == "needs about 139 GiB"
    _, data = stored("dit_s2", "--time-box", "0.1")
    assert data["rows"]["dit_s2"]["reason"] == "takes more than 0.1 s"
    assert models.cells("dalle", data["rows"]) == ("not run: needs about 139 GiB", "", "")
    assert models.cells("uni", data["rows"]) == ("not run", "", "")
    with pytest.raises(SystemExit, match="nothing is called 'vit_b17'"):
        stored("vit_b17")


def test_the_table_of_the_hosts():
    name = models.MODELS[0].name
    table = models.hosts_table({"environment": FACTS, "rows": {name: row()}})
    assert f"| {name} | 1x3x8x8 | 3, 1 | 3 | 0.25 | 1.50x (1.25 to 2.00) | 4 to 2 |" in table
    assert table.count("not run") == len(models.HOSTS) - 1
    assert "float32 on toy, avx2 kernels, 1 threads; torch 2; vitkit abc, 2026-01-01" in table
    empty = models.hosts_table({"environment": {}, "rows": {}})
    assert empty.endswith("Nothing was measured yet.")
