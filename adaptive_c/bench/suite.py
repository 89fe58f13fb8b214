"""The rows, and how they are measured: contenders in processes of their own take turns for many rounds.

For each row the seconds of every round are kept.  Ratios are taken within a round.  Their median is given with an
interval that holds the true median with a chance of 95%, whatever the distribution of the noise, provided that the
rounds are independent (order statistics and the binomial distribution).  The interval holds for one allocation of the
arrays; another one may give another time, because it matters where arrays lie.  A ratio whose interval holds 1 is not
shown.
"""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import __version__, optimizers
from .._native import build_info, counted, get_num_threads, isa, processors
from . import rows as by_rows
from .contenders import CONTENDERS, Task
from .worker import told, told_bytes

OURS, DROP_IN = "adaptive_c", "adaptive_c.torch"
ENOUGH = 5  # rounds for a contender that is ten times slower

# Each rule as it is by default, and options with which some of them sweep over more arrays.
MORE: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Adam": {"amsgrad": True},
}
RULES: list[tuple[str, dict[str, Any]]] = [
    (rule, options) for rule in optimizers.__all__ for options in ({}, MORE.get(rule)) if options is not None
]
FUSED = {"SGD", "Adagrad", "Adam", "AdamW"}  # the rules that PyTorch has fused CPU kernels for
# GPT-2 124M: token and position embeddings, twelve blocks and the last norm are 148 arrays with 124,439,808 numbers.
GPT2 = (50257 * 768, 1024 * 768, *12 * (768, 768, 768 * 2304, 2304, 768 * 768, 768, 768, 768, 768 * 3072, 3072,
                                        3072 * 768, 768), 768, 768)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What is measured, and how often.  A TOML file given with ``--config`` may set any of these names."""

    groups: tuple[str, ...] = (
        "sizes", "rules", "float64", "whole", "formats", "lists", "drop-in", "threads", "rows", "import", "memory",
    )  # fmt: skip
    rounds: int = 21
    seconds: float = 0.04  # the length of one timing, which has at least one step
    large: int = 1 << 26
    sizes: tuple[int, ...] = tuple(1 << i for i in (8, 10, 12, 14, 16, 17, 18, 20, 22, 24, 26, 27))
    everybody_up_to: int = 1 << 24  # larger sizes are measured for the fast contenders only
    contenders: tuple[str, ...] = tuple(CONTENDERS)


QUICK = Settings(rounds=7, seconds=0.01, large=1 << 22, sizes=tuple(1 << i for i in (10, 14, 17, 20, 22)))


def settings(file: str | None, quick: bool, groups: Sequence[str], rounds: int | None) -> Settings:
    """The checked settings of a command line.  Raises OSError or ValueError for a file that can't be used."""
    chosen = QUICK if quick else Settings()
    if file is not None:
        given = tomllib.loads(Path(file).read_text())
        if unknown := [name for name in given if name not in asdict(chosen)]:
            raise ValueError(f"{file}: {unknown[0]!r} is no setting; there are {', '.join(asdict(chosen))}")
        lists: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        for name, value in lists.items():
            if not _fits(value, getattr(chosen, name)):
                raise ValueError(f"{file}: {name} must be like {getattr(chosen, name)!r}, got {value!r}")
        chosen = replace(chosen, **lists)
    if groups:
        chosen = replace(chosen, groups=tuple(groups))
    if rounds is not None:
        chosen = replace(chosen, rounds=rounds)
    if unknown := [group for group in chosen.groups if group not in Settings.groups]:
        raise ValueError(f"there are no rows {unknown[0]!r}; there are {', '.join(Settings.groups)}")
    if unknown := [name for name in chosen.contenders if name not in CONTENDERS]:
        raise ValueError(f"there is no contender {unknown[0]!r}; there are {', '.join(CONTENDERS)}")
    if OURS not in chosen.contenders:
        raise ValueError(f"contenders must include {OURS}: all ratios are to it")
    if not 5 <= chosen.rounds <= 1000:
        raise ValueError(f"rounds must be in 5 .. 1000, got {chosen.rounds}: fewer tell nothing about the noise")
    if not min(chosen.large, *chosen.sizes, 1 << 60) >= 64:
        raise ValueError("sizes are 64 elements or more")
    if not 0 < chosen.seconds < 10:
        raise ValueError(f"seconds must be in (0, 10), got {chosen.seconds}")
    return chosen


def _fits(value: Any, like: Any) -> bool:
    """Whether a value from a TOML file has the type of a setting.  A whole number is accepted for any number."""
    if isinstance(like, tuple):
        return isinstance(value, tuple) and all(_fits(x, like[0]) for x in value)
    return type(value) is type(like) or (isinstance(like, float) and type(value) is int)


FAST = (OURS, "torch fused", "DeepSpeed CPUAdam", "numba by hand", "NumPy in place")


@dataclass
class Row:
    """One row of a table: a task, who does it, and what was measured."""

    group: str
    label: str
    task: Task
    names: Sequence[str]
    results: dict[str, dict[str, Any]] = field(default_factory=dict)  # by the contender's name, and "ceiling"


def rows(settings: Settings) -> Iterator[Row]:
    """The rows that the settings ask for; a row without any of the wanted contenders is left out."""
    every = [name for name, c in CONTENDERS.items()
             if c.bits == 32 and not (c.dtype or c.rows or "call by call" in name or name == DROP_IN)]  # fmt: skip
    n, cached = settings.large, min(settings.large, 1 << 13)
    state_formats = [("float32", None), ("float32", "bfloat16"), ("float32", "uint8"), ("bfloat16", "bfloat16"),
                     ("bfloat16", "uint8")]  # fmt: skip

    def plan() -> Iterator[Row]:
        for size in settings.sizes:
            names = every if size <= settings.everybody_up_to else FAST
            yield Row("sizes", f"{size:,}", Task((size,)), names)
        for rule, options in RULES:
            label = " ".join([rule, *(f"{k}={v}" for k, v in options.items())])
            names = [OURS, *(["torch fused"] if rule in FUSED else [])]
            yield Row("rules", label, Task((n,), rule, options), names)
            yield Row("in cache", label, Task((cached,), rule, options, threads=1), [OURS])
        yield Row("float64", f"{n // 2:,}", Task((n // 2,), dtype="float64"), [*FAST[:2], *FAST[3:], "optax jitted"])
        yield Row("whole", f"{n:,}", Task((n,), whole=True), [OURS, "torch, call by call"])
        yield Row("in cache", "whole step", Task((cached,), whole=True, threads=1), [OURS])
        for dtype, state in state_formats:
            label = f"{dtype} parameters, {state or dtype} state"
            eight = ["bitsandbytes AdamW8bit", "torchao AdamW8bit"] if (dtype, state) == ("float32", "uint8") else []
            for size in (n, n // 4) if state else (n,):
                names = [OURS, "torch fused", *(["torch fused float32"] if dtype != "float32" else [])]
                extra = eight if size == n // 4 else []
                yield Row("formats", f"{label}, {size:,}", Task((size,), dtype=dtype, state_dtype=state),
                          [*names, *extra])  # fmt: skip
            yield Row("in cache", label, Task((cached,), dtype=dtype, state_dtype=state, threads=1), [OURS])
            if state:
                uneven = Task((n // 4,), dtype=dtype, state_dtype=state, uneven=True)
                yield Row("formats", f"{label}, uneven gradients, {n // 4:,}", uneven, [OURS, "torch fused"])
                yield Row("in cache", f"{label}, uneven gradients", replace(uneven, sizes=(cached,), threads=1), [OURS])
        many = 10_000 if n >= 1 << 24 else 1000
        gpt2 = GPT2 if n >= 1 << 24 else tuple(-(-size // 64) for size in GPT2)
        label = "GPT-2 124M, 148 arrays" + ("" if gpt2 is GPT2 else ", each cut to a 64th")
        lists = {f"{many:,} arrays of 1,000": (1000,) * many, label: gpt2}
        for label, sizes in lists.items():
            more = ["scikit-learn Adam"] if sizes is not gpt2 else []
            yield Row("lists", label, Task(sizes), [OURS, *every[1:5], *more])
        for label, sizes in {"20 arrays of 1,000": (1000,) * 20, **lists}.items():
            yield Row("drop-in", label, Task(sizes), [OURS, DROP_IN, "torch fused"])
        task = Task((n,), whole=True, copy=False)
        yield Row("drop-in", f"whole step, {n:,}", task, [OURS, DROP_IN, "torch, call by call"])
        for threads in range(1, get_num_threads() + 1):
            yield Row("threads", counted(threads, "thread"), Task((n,), threads=threads), [*FAST[:4]])
        for label, task, peers in by_rows.plan(n):
            yield Row("rows", label, task, [OURS, *peers])
        yield Row("memory", f"{n // 4:,}", Task((n // 4,)), every)
        yield Row("memory", f"{n // 4:,}, uint8 state", Task((n // 4,), state_dtype="uint8"),
                  [OURS, "bitsandbytes AdamW8bit", "torchao AdamW8bit"])  # fmt: skip

    for row in plan():
        row.names = [name for name in row.names if name in settings.contenders]
        if row.names and (row.group in settings.groups or (row.group == "in cache" and "rules" in settings.groups)):
            yield row


class Process:
    """The process of a contender; it serves all rows that have the same number of threads."""

    def __init__(self, name: str, threads: int | None) -> None:
        self.name = name
        self.facts: dict[str, Any] = {}  # what the worker reported of the last task
        env = dict(os.environ)
        if threads:
            env |= dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), str(threads))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "adaptive_c.bench.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env=env,
        )  # fmt: skip

    def build(self, task: Task) -> dict[str, Any]:
        """Have the process make its contender for a task, and check it."""
        self.facts = self.ask(build=self.name, task=asdict(task))
        return self.facts

    def ask(self, **order: Any) -> Any:
        """Send an order to the process, and return its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(order), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        return json.loads(line) if line else {"failed": f"its process ended with {self._process.wait()}"}

    def stop(self) -> None:
        self._process.kill()
        with suppress(BrokenPipeError):
            self._process.communicate()


class Processes:
    """One process for each contender and number of threads, started when it is first needed."""

    def __init__(self) -> None:
        self._running: dict[tuple[str, int | None], Process] = {}
        self.missing: dict[str, dict[str, Any]] = {}  # what a contender reported that can't be imported here

    def get(self, name: str, threads: int | None) -> Process:
        key = name, threads
        if key not in self._running:
            self._running[key] = Process(name, threads)
        return self._running[key]

    def stop(self, name: str, threads: int | None) -> None:
        if process := self._running.pop((name, threads), None):
            process.stop()

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._running.values():
            process.stop()


def free_memory() -> float:
    """The bytes that new processes may take; infinite if the system does not tell."""
    return told_bytes("meminfo", "MemAvailable") or math.inf


def measure(row: Row, settings: Settings, processes: Processes, say: Callable[[str], None],
            advance: Callable[[float], None]) -> None:  # fmt: skip
    """Fill in row.results.  `advance` is called with each share of the row that has been done."""
    task, ready = row.task, []
    itemsize = {"float64": 8, "float32": 4, "bfloat16": 2}[task.dtype]
    for name in row.names:
        if name in processes.missing:
            row.results[name] = processes.missing[name]
        elif 8 * task.elements * itemsize > 0.9 * free_memory():
            row.results[name] = {"failed": "not enough free memory beside the others"}
        else:
            if row.group == "memory":  # in an old process, memory that it has freed would count
                processes.stop(name, task.threads)
            process = processes.get(name, task.threads)
            row.results[name] = process.build(task)
        facts = row.results[name]
        why = next((why for why in ("missing", "failed", "wrong") if facts.get(why)), "")
        if not why:
            ready.append(process)
            continue
        processes.stop(name, task.threads)
        if why == "missing":
            processes.missing[name] = facts  # run tells of all of them at once
        else:
            say(f"{row.group}, {row.label}: {name} is left out ({why}: {facts[why]})")
    turns = [(process, what) for process in ready for what in process.facts["steps"]]
    seconds: dict[tuple[Process, str], list[float]] = {turn: [] for turn in turns}
    for number in range(settings.rounds if row.group != "memory" else 0):
        turns = [*turns[1:], *turns[:1]]  # a different contender begins each round
        for process, what in [turn for turn in turns if turn in seconds]:
            once = process.facts["seconds"]
            if number < ENOUGH or once < 10 * ready[0].facts["seconds"]:
                repeat = max(1, min(5000, int(settings.seconds / max(once, 1e-7))))
                if len(ready) > 1:
                    # Until the threads of the previous contender have stopped spinning.
                    time.sleep(min(0.02, 10 * settings.seconds))
                took = process.ask(time=what, repeat=repeat)
                if isinstance(took, dict):  # the process died, perhaps for lack of memory
                    row.results[process.name] = took
                    say(f"{row.group}, {row.label}: {process.name} is left out (failed: {took['failed']})")
                    seconds = {turn: times for turn, times in seconds.items() if turn[0] is not process}
                    continue
                seconds[process, what].append(took)
        advance(1 / settings.rounds)
    for (process, what), times in seconds.items():
        row.results.setdefault(process.name if what == "step" else "ceiling", {})["rounds"] = times
    for process in ready:
        if row.group in ("memory", "threads"):
            processes.stop(process.name, task.threads)
        else:
            process.ask(drop=True)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """An interval that holds the true median with a chance of 95% (for 5 values 94%, the most that is possible)."""
    ordered, n = sorted(values), len(values)
    below, tail = 0, 0.5**n
    while tail + math.comb(n, below + 1) * 0.5**n <= 0.025 and below + 1 < n // 2:
        below += 1
        tail += math.comb(n, below) * 0.5**n
    return ordered[below], ordered[n - 1 - below]


def compare(row: Row, name: str, base: str = OURS) -> dict[str, float] | None:
    """How many times as long as `base` contender `name` takes: median and interval of the ratios within each round."""
    pair = [row.results.get(x, {}).get("rounds") for x in (name, base)]
    if not pair[0] or not pair[1]:
        return None
    ratios = [a / b for a, b in zip(*pair, strict=False)]
    low, high = interval(ratios)
    return {"ratio": statistics.median(ratios), "low": low, "high": high}


def summary(row: Row) -> dict[str, Any]:
    """A row in the form that the JSON file holds."""
    out: dict[str, Any] = {"group": row.group, "label": row.label, "task": _short(row.task), "contenders": {}}
    for name, facts in row.results.items():
        kept: dict[str, Any] = {key: facts[key] for key in ("missing", "failed") if key in facts}
        if facts.get("wrong"):
            kept["wrong"] = facts["wrong"]
        if row.group == "memory" and "peak" in facts:
            kept["peak_bytes_per_element"] = facts["peak"] / row.task.elements
        if times := facts.get("rounds"):
            quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
            kept |= {"median": statistics.median(times), "quartiles": [quartiles[0], quartiles[2]], "rounds": times}
            if facts.get("bytes"):
                kept["bytes_per_element"] = facts["bytes"]
            if name != OURS and (ratio := compare(row, name)):
                kept["times_ours"] = ratio
        out["contenders"][name] = kept
    return out


def _short(task: Task) -> dict[str, Any]:
    """A task as the JSON file has it, without thousands of sizes."""
    return {**asdict(task), "sizes": list(task.sizes) if len(task.sizes) < 10 else f"{len(task.sizes)} arrays",
            "elements": task.rows * by_rows.COLUMNS or task.elements}  # fmt: skip


IMPORTS = {
    OURS: "import adaptive_c; adaptive_c.AdamW",
    "torch fused": "import torch.optim",
    "DeepSpeed CPUAdam": "from deepspeed.ops.adam import DeepSpeedCPUAdam",
    "bitsandbytes AdamW8bit": "import bitsandbytes.optim",
    "torchao AdamW8bit": "import torchao.optim",
    "numba by hand": "import numba",
    "optax jitted": "import jax, optax",
    "thinc Adam": "import thinc.api",
    "scikit-learn Adam": "import sklearn.neural_network",
}


def imports(settings: Settings, advance: Callable[[float], None]) -> dict[str, Any]:
    """Seconds to import each library after NumPy, measured in turn in new processes."""
    script = "import time, numpy; start = time.perf_counter(); {}; print(time.perf_counter() - start)"
    names = [name for name in IMPORTS if name in settings.contenders]
    rounds: dict[str, list[float]] = {name: [] for name in names}
    total = min(settings.rounds, ENOUGH)
    for _ in range(total):
        for name in list(names):
            command = [sys.executable, "-P", "-c", script.format(IMPORTS[name])]
            env = {**os.environ, "DS_ACCELERATOR": "cpu"}
            out = subprocess.run(command, capture_output=True, text=True, env=env)
            if out.returncode == 0:
                rounds[name].append(float(out.stdout.split()[-1]))
            else:
                names.remove(name)
        advance(1 / total)
    found = {name: {"median": statistics.median(times), "rounds": times} for name, times in rounds.items() if times}
    return {"group": "import", "label": "after NumPy", "contenders": found}


def environment() -> dict[str, Any]:
    """A description of the machine, the compiler and its flags, the versions and the commit."""
    info = build_info()
    names = ("adaptive_c", "numpy", "torch", "deepspeed", "bitsandbytes", "torchao", "numba", "jax", "optax", "thinc",
             "scikit-learn", "fbgemm-gpu-cpu")  # fmt: skip
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "processor": told("cpuinfo", "model name") or platform.processor() or platform.machine(),
        "processors": len(processors()),
        "threads": get_num_threads(),
        "memory": free_memory() if math.isfinite(free_memory()) else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "instruction_set": isa,
        "compiler": info.get("version") or info["compiler"],
        "flags": " ".join(info["flags"]),
        "openmp": info["openmp"],
        "commit": info.get("commit") or "unknown (not built in a git clone)",
        "adaptive_c": __version__,
        "versions": versions,
        "variables": {
            name: value for name, value in os.environ.items() if name.startswith(("OMP_", "OPENBLAS_", "GOMP_"))
        },
    }


@contextmanager
def progress(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[str], None], Callable[[float], None]]]:
    """Three functions: to print a line, to name the row that is being measured, and to advance by a share of a row."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    except ImportError:
        done = 0.0

        def advance(share: float) -> None:
            nonlocal done
            done += share

        def name(label: str) -> None:
            print(f"[{done / total:4.0%}] {label}", file=sys.stderr, flush=True)

        yield (lambda text: print(text, file=sys.stderr, flush=True)), name, advance
        return
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:40.40}"), BarColumn(), TextColumn("{task.percentage:3.0f}%"),
               TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, speed_estimate_period=600) as bar:
        task = bar.add_task("", total=total)
        yield (
            lambda text: console.print(text, highlight=False, markup=False),
            lambda label: bar.update(task, description=label),
            lambda share: bar.advance(task, share),
        )


def left_out(missing: dict[str, dict[str, Any]]) -> str:
    """What to say about the contenders that can't be imported: one line for each thing to install."""
    alike: dict[str, list[str]] = {}
    for name, facts in missing.items():
        alike.setdefault(f"({facts['missing']}; {CONTENDERS[name].install})", []).append(name)
    return "\n".join(["left out, because they can't be imported here:",
                      *(f"  {'; '.join(names)} {why}" for why, names in alike.items())])  # fmt: skip


def run(settings: Settings, folder: Path) -> dict[str, Any]:
    """Measure everything and show a progress bar; the JSON file is written after every row."""
    planned = list(rows(settings))
    results: dict[str, Any] = {"environment": environment(), "settings": asdict(settings), "rows": []}
    file = folder / "adaptive-c-bench.json"
    file.write_text(json.dumps(results, indent=1) + "\n")
    total = len(planned) + ("import" in settings.groups)
    with Processes() as processes, progress(total) as (say, name, advance):
        for row in planned:
            name(f"{row.group}: {row.label}")
            done = 0.0

            def count(share: float) -> None:
                nonlocal done
                done += share
                advance(share)

            measure(row, settings, processes, say, count)
            advance(1 - done)
            results["rows"].append(summary(row))
            file.write_text(json.dumps(results, indent=1) + "\n")
        if "import" in settings.groups:
            name("import time")
            results["rows"].append(imports(settings, advance))
            file.write_text(json.dumps(results, indent=1) + "\n")
        if processes.missing:
            say(left_out(processes.missing))
    return results
