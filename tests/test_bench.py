"""The benchmark suite: what it measures, what it refuses to believe, and what a user gets from it."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_c.__main__ import main
from adaptive_c._native import core
from adaptive_c.bench import contenders, model, report, suite, worker
from adaptive_c.bench.contenders import CONTENDERS, Task

OURS = suite.OURS
SMALL = {"rounds": 5, "seconds": 1e-4, "large": 1 << 14, "sizes": [64, 1 << 12]}


def line(folder, *arguments, settings=SMALL):
    """The arguments of the program."""
    config = Path(folder, "settings.toml")
    config.write_text("".join(f"{key} = {value!r}\n" for key, value in settings.items()))
    return ["bench", "--config", str(config), "--out", str(Path(folder, "out")), *arguments]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run with nothing but NumPy: every peer, git, matplotlib and rich missing."""
    folder = tmp_path_factory.mktemp("alone")
    names = ("torch", "deepspeed", "bitsandbytes", "torchao", "numba", "jax", "optax", "thinc", "sklearn", "matplotlib",
             "rich", "fbgemm_gpu")  # fmt: skip
    for name in names:
        (folder / f"{name}.py").write_text(f"raise ImportError('no {name} here', name='{name}')")
    command = [sys.executable, "-m", "adaptive_c", *line(folder)]  # as a user does, outside the clone
    env = {**os.environ, "PYTHONPATH": str(folder), "PATH": "/nowhere"}
    return folder, subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env, timeout=300)


def test_with_all_peers_missing_it_measures_and_says_how_to_install_them(alone):
    folder, out = alone
    assert out.returncode == 0, out.stderr
    told = out.stderr.partition("left out, because they can't be imported here:\n")[2].splitlines()
    for name, contender in CONTENDERS.items():
        if contender.install:
            assert sum(name in line.partition(" (")[0].strip().split("; ") for line in told) == 1, name
    assert "  numba by hand (no numba here; pip install numba)" in told
    assert len(told) < 12
    assert "no pictures: pip install matplotlib" in out.stdout
    assert "[100%]" not in out.stderr
    assert "%] sizes: 64\n" in out.stderr  # without rich, lines take the place of the bar
    assert {path.name for path in (folder / "out").iterdir()} == {"adaptive-c-bench.json", "adaptive-c-bench.md"}


def test_every_row_is_there_with_every_rule(alone):
    results = json.loads((alone[0] / "out" / "adaptive-c-bench.json").read_text())
    assert {row["group"] for row in results["rows"]} == {*suite.Settings.groups, "in cache"}
    assert len([row for row in results["rows"] if row["group"] == "rules"]) == len(suite.RULES)
    for row in results["rows"]:
        mine = row["contenders"][OURS]
        if row["group"] == "memory":
            assert "peak_bytes_per_element" in mine
        elif row["group"] != "import":
            assert len(mine["rounds"]) == 5, row
            assert mine["quartiles"][0] <= mine["median"] <= mine["quartiles"][1]
    env = results["environment"]
    assert env["versions"]["numpy"] == np.__version__
    for key in ("processor", "compiler", "flags", "commit", "instruction_set", "python", "threads"):
        assert env[key], key


def test_the_markdown_has_a_table_of_each_group(alone):
    text = (alone[0] / "out" / "adaptive-c-bench.md").read_text()
    for group in suite.Settings.groups:
        assert f"## {report.TITLES[group]}" in text
    assert "| 4,096 | " in text
    assert "missing" in text


def test_pictures_are_drawn(alone, tmp_path):
    pytest.importorskip("matplotlib")
    results = json.loads((alone[0] / "out" / "adaptive-c-bench.json").read_text())
    for row in results["rows"]:  # the rows are too small for a ceiling, and the machine may have one thread
        mine = row["contenders"][OURS]
        if row["group"] in ("rules", "whole", "formats"):
            mine["bytes_per_element"] = 28.0
            row["contenders"]["ceiling"] = {
                "median": mine["median"] * 0.9,
                "quartiles": [q * 0.9 for q in mine["quartiles"]],
                "times_ours": {"ratio": 0.9, "low": 0.8, "high": 1.0},
            }
    thread_rows = [row for row in results["rows"] if row["group"] == "threads"]
    results["rows"].append({**thread_rows[0], "task": {**thread_rows[0]["task"], "threads": 2}})
    names = {path.name for path in report.pictures(results, tmp_path)}
    assert names == {f"adaptive-c-bench-{kind}.{ending}" for kind in ("sizes", "roofline", "whole_step", "threads")
                     for ending in ("png", "svg")}  # fmt: skip
    assert all(path.stat().st_size > 5000 for path in tmp_path.iterdir())
    axis = pytest.importorskip("matplotlib.figure").Figure().subplots()
    assert report.roofline(axis, results)
    shown = [label.get_text() for label in axis.get_yticklabels()]
    assert len(set(shown)) == len(shown)
    assert {"AdamW", "float32 parameters, uint8 state", "whole step"} <= set(shown)
    assert "float32 parameters, float32 state" not in shown  # that is the rule AdamW again


# --- the checks --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes():
    """By what was installed for those that they have run; the one for "nothing" could not import what it should."""
    kept = {}
    yield kept
    for process in kept.values():
        process.stop()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[pytest.mark.later(x) for x in ("torch", "thinc") if f"pip install {x}" in contender.install]
        )
        for name, contender in CONTENDERS.items()
    ],
)
def test_every_contender_that_is_here_passes_its_check(name, processes):
    """Those that need the same library share a process, since its import takes most of the time."""
    task = Task((8192,), whole=name == "torch, call by call")
    if CONTENDERS[name].rows:
        rule = "Adagrad" if name in ("torch sparse", "FBGEMM") else "AdamW"
        task = Task((8192,), rule, {"rows": "exact"} if name == "dense gradients" else {}, rows=32)
    needed = CONTENDERS[name].install
    process = processes.pop(needed, None) or processes.pop("nothing", None) or suite.Process(name, None)
    facts = process.ask(build=name, task=asdict(task))
    missing = "missing" in facts and name != OURS
    processes["nothing" if missing else needed] = process
    if missing:
        pytest.skip(facts["missing"])
    assert not {"missing", "failed"} & set(facts), facts
    assert facts["wrong"] == ""
    assert facts["seconds"] > 0


@pytest.mark.parametrize(
    "task",
    [
        Task((5000,), whole=True),
        Task((1000,) * 40),
        Task((3000,), dtype="float64"),
        Task((5000,), state_dtype="uint8"),
        Task((5000,), state_dtype="bfloat16"),
        Task((8192,), rows=32),
        Task((8192,), "Adagrad", {"second_moment": "row"}, rows=32),
        Task((8192,), rows=300, spread="zipf"),
        Task((8192,), rows=32, spread="half"),
        Task((8192,), options={"rows": "exact", "flush_denormals": True}, rows=32),
        Task((5000,), dtype="bfloat16", state_dtype="uint8"),
        *(Task((2000,), rule, options) for rule, options in suite.RULES),
    ],
    ids=str,
)
def test_our_own_rows_pass_their_checks(task):
    assert worker.build(OURS, task)[1]["wrong"] == ""


@pytest.mark.parametrize("slip", [{"betas": (0.9, 0.99)}, {"weight_decay": 0.0}, {"lr": 1.01e-3}, {"eps": 1e-3}])
def test_a_contender_that_computes_something_else_is_found(slip, monkeypatch):
    def wrong(task):
        import adaptive_c as ac

        (p,), (g,) = task.arrays()
        opt = ac.AdamW(p, **{"lr": 1e-3, **slip})
        return contenders.Subject(lambda: opt.step(g), lambda: [p], lambda: contenders.double(g))

    monkeypatch.setitem(CONTENDERS, "wrong", contenders.Contender("wrong", wrong, ""))
    assert "after 3 steps a parameter is" in worker.build("wrong", Task((5000,)))[1]["wrong"]


def test_a_contender_that_does_nothing_or_only_half_is_found(monkeypatch):
    def idle(task):
        (p,), _ = task.arrays()
        return contenders.Subject(lambda: None, lambda: [p], lambda: None)

    monkeypatch.setitem(CONTENDERS, "idle", contenders.Contender("idle", idle, "", bits=8))
    assert worker.build("idle", Task((5000,)))[1]["wrong"]


def test_a_process_that_dies_is_told(monkeypatch):
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    with suite.Processes() as processes:
        process = processes.get(OURS, None)
        started[0].kill()
        assert "its process ended with -9" in process.build(Task((64,)))["failed"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize(("state", "held"), [(None, 8), ("uint8", 2.03)])
def test_peak_memory_is_what_an_optimizer_is_known_to_hold(state, held):
    n = 1 << 24  # a megabyte or so of pages is used again
    with suite.Processes() as processes:
        facts = processes.get(OURS, None).build(Task((n,), state_dtype=state))
    assert 8 + held - 0.1 < facts["peak"] / n < 8 + held + 0.5  # with parameters and gradients


# --- the statistics ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "below"), [(5, 0), (6, 0), (7, 0), (9, 1), (15, 3), (21, 5), (31, 9)])
def test_the_interval_is_that_of_the_sign_test(n, below):  # tables of the binomial distribution
    assert suite.interval(range(n)) == (below, n - 1 - below)


@given(st.floats(0.5, 2.0), st.integers(5, 31))
def test_no_ratio_is_shown_where_noise_is_larger_than_the_difference(factor, n):
    row = suite.Row("sizes", "", Task((64,)), [OURS])
    noise = [1 + 0.3 * (-1) ** i for i in range(n)]
    row.results = {OURS: {"rounds": [1.0] * n}, "peer": {"rounds": [factor * x for x in noise]}}
    shown = report.ratio(suite.compare(row, "peer"))
    if factor * 0.7 <= 1 <= factor * 1.3:
        assert shown.startswith("=")
    else:
        assert shown.startswith(f"{suite.compare(row, 'peer')['ratio']:.2f}x [")


def test_ratios_are_paired_by_round():
    row = suite.Row("sizes", "", Task((64,)), [OURS])
    drift = [1.0, 2.0, 4.0, 8.0, 16.0]  # the machine became slower; the ratio did not change
    row.results = {OURS: {"rounds": drift}, "peer": {"rounds": [2 * x for x in drift]}}
    assert suite.compare(row, "peer") == {"ratio": 2.0, "low": 2.0, "high": 2.0}
    assert suite.compare(row, "no contender") is None


def test_quartiles_have_the_unit_of_the_median():
    for median, quartiles, shown in (
        (873e-9, [722e-9, 1.11e-6], "| 873 ns (722-1.11e+03) |"),
        (0.0521, [0.05, 0.06], "| 52.1 ms (50-60) |"),
    ):
        mine = {OURS: {"median": median, "quartiles": quartiles}}
        row = {"group": "sizes", "label": "64", "task": {"elements": 64}, "contenders": mine}
        assert shown in report.table([row])[-1]


# --- the ceiling -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 63, 64, 5000, 300_000])
def test_the_ceiling_leaves_what_it_updates_and_writes_all_of_what_it_writes(n):
    rng = np.random.default_rng(0)
    read, update = rng.random(n, "float32"), [rng.random(n), rng.integers(0, 9, n, "uint8")]
    write = np.ones(n, "uint16")
    kept = [x.copy() for x in (read, *update)]
    core.ceiling((read,), tuple(update), (write,), 2)
    assert all((a == b).all() for a, b in zip(kept, (read, *update), strict=True))
    assert not write[: n // 4 * 4].any()
    core.ceiling((read,), (update[0],), (), 2, key=1)
    assert (update[0] != kept[1]).all()  # every element was visited


def test_the_ceiling_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="1 to 8 arrays of one length"):
        core.ceiling((np.zeros(3),), (np.zeros(4),))
    with pytest.raises(ValueError, match="1 to 8 arrays of one length"):
        core.ceiling(())


# --- the model and the settings ----------------------------------------------------------------------------------


def test_the_model_is_the_slower_of_memory_and_work_and_a_part_of_the_other():
    memory_bound = model.predict(10**8, 28, 50e9, 0.1e-9, 2)
    assert memory_bound == pytest.approx(0.056 + model.UNHIDDEN * 0.005, rel=1e-4)
    assert model.predict(10**8, 10, 50e9, 1e-9, 2) == pytest.approx(0.05 + model.UNHIDDEN * 0.02, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"round": 5}, (), "'round' is no setting; there are groups, rounds,"),
        ({"contenders": ["adaptive_c", "tinygrad"]}, (), "there is no contender 'tinygrad'; there are adaptive_c, "),
        ({"contenders": ["NumPy naive"]}, (), "contenders must include adaptive_c"),
        ({"large": 1e6}, (), "large must be like 67108864, got 1000000.0"),
        ({"sizes": 1024}, (), "sizes must be like (256, "),
        ({"sizes": ["1024"]}, (), "sizes must be like (256, "),
        ({"seconds": -1}, (), "seconds must be in (0, 10), got -1"),
        ({"rounds": 3}, (), "rounds must be in 5 .. 1000, got 3"),
        ({}, ("speed",), "there are no rows 'speed'; there are sizes, rules, "),
    ],
)
def test_settings_are_checked(tmp_path, capsys, settings, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        main(line(tmp_path, *arguments, settings=settings))
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "out").write_text("")
    with pytest.raises(SystemExit, match="1"):
        main(line(tmp_path, "whole"))
    assert "adaptive-c bench: can't write to --out" in capsys.readouterr().err


def test_gpt2_has_its_148_arrays():
    assert (len(suite.GPT2), sum(suite.GPT2)) == (148, 124_439_808)


def test_the_recorded_settings_are_valid():
    file = Path(__file__).parents[1] / "benchmarks" / "recorded.toml"
    if file.exists():
        assert replace(suite.settings(str(file), False, [], None)).groups == suite.Settings.groups
