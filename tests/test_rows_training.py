"""The factor model of benchmarks/rows.py in a short form: a real training by rows, through the public interface."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "rows.py"


@pytest.mark.skipif(not SCRIPT.is_file(), reason="not in a clone")
@pytest.mark.parametrize("rule", ["AdamW", "Adagrad"])
def test_a_factor_model_trained_three_ways(rule, capsys):
    spec = importlib.util.spec_from_file_location("rows", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    lr = {"AdamW": "0.03", "Adagrad": "0.2"}[rule]
    decay = {"AdamW": "0.1", "Adagrad": "0"}[rule]
    found = script.main(["--ratings", "50000", "--epochs", "6", "--seeds", "1", "--rule", rule, "--lr", lr,
                         "--weight-decay", decay])  # fmt: skip
    assert "dense and exact tables are the same" in capsys.readouterr().out
    dense, exact, lazy = (found[way][0][0] for way in ("dense", "exact", "lazy"))
    assert exact == dense
    assert dense[-1] < 0.8 * dense[0]  # it learns
    if rule == "AdamW":
        assert lazy != dense
    else:  # without decay, a gradient of 0 moves nothing
        assert lazy == dense
