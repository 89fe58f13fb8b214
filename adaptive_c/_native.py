"""Which build of the core this process uses, and how many threads it takes.

The core is compiled once for each instruction set; the best that the processor runs is loaded here, when the first
optimizer is used.  ``ADAPTIVE_C_ISA=baseline|v3|v4`` forces one.
"""

import importlib
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from . import _IMPORTED_IN, __version__

LEVELS = ("v4", "v3", "baseline")
_REBUILD = "rebuild it with: pip install --force-reinstall --no-cache-dir adaptive_c (from a clone: pip install .)"


def _load(level: str) -> Any:
    try:
        return importlib.import_module(f"adaptive_c._{level}")
    except ImportError as error:
        tree = Path(__file__).resolve().parents[1]
        here = f"this is the source tree, {tree}: run Python in another folder, or pip install -e ."
        remedy = here if (tree / "setup.py").exists() else _REBUILD
        raise ImportError(f"adaptive_c's extension _{level} is missing or broken ({error}); {remedy}") from error


@cache
def build_info() -> dict[str, Any]:
    """What setup.py decided."""
    try:
        info: dict[str, Any] = json.loads(Path(__file__).with_name("_build.json").read_text())
    except (OSError, ValueError):
        info = {"compiler": "unknown", "flags": [], "openmp": "unknown", "missing": {}}
    return info


def _choose() -> tuple[Any, str, dict[str, str]]:
    """The core, its level, and why each better level is not used."""
    supported = _load("cpu").supported()
    wanted = os.environ.get("ADAPTIVE_C_ISA") or None
    reasons = {level: f"not built: {why}" for level, why in build_info()["missing"].items()}
    reasons |= {level: "this processor does not support it" for level in LEVELS if level not in supported}
    if wanted is not None:
        if wanted not in LEVELS:
            raise ImportError(
                f"ADAPTIVE_C_ISA={wanted!r} is unknown; use one of {', '.join(reversed(LEVELS))}, or unset it"
            )
        if wanted in reasons:
            raise ImportError(f"ADAPTIVE_C_ISA={wanted}: {reasons[wanted]}; unset it, or use {supported[-1]}")
        return _load(wanted), wanted, reasons
    for level in LEVELS[:-1]:
        if level not in reasons:
            try:
                return _load(level), level, reasons
            except ImportError as error:  # a slower build is better than none, and show_config says why
                reasons[level] = str(error)
    return _load("baseline"), "baseline", reasons


core, isa, unused_levels = _choose()


# --- threads ---------------------------------------------------------------------------------------------------------


def _cgroup_quota(root: Path = Path("/sys/fs/cgroup"), self_cgroup: Path = Path("/proc/self/cgroup")) -> float:
    """The processors that the control groups of this process allow, infinite where they set no quota."""
    quota = float("inf")
    try:
        lines = [line.split(":", 2) for line in self_cgroup.read_text().splitlines()]
    except OSError:
        return quota
    for _, controllers, path in lines:
        if controllers == "":  # version 2
            limit_file, period_file, base = "cpu.max", "", root
        elif "cpu" in controllers.split(","):
            limit_file, period_file, base = "cpu.cfs_quota_us", "cpu.cfs_period_us", root / "cpu"
        else:
            continue
        folder = base / path.lstrip("/")
        for place in [folder, *folder.parents]:  # a limit holds for everything below it
            try:
                words = (place / limit_file).read_text().split()
                words += (place / period_file).read_text().split() if period_file else []
                if words[0] not in ("max", "-1"):
                    quota = min(quota, int(words[0]) / int(words[1]))
            except (OSError, ValueError, IndexError, ZeroDivisionError):
                pass
            if place == root:
                break
    return quota


_NO_LIMIT = 1 << 30


def _machine_threads() -> tuple[int, str]:
    """How many threads None means, before OpenMP's own limit, and why."""
    if wish := os.environ.get("OMP_NUM_THREADS"):
        return _NO_LIMIT, f"OMP_NUM_THREADS={wish}"
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota()
    if quota < n:
        return max(1, int(quota)), f"cgroup quota of {quota:g} processors"
    return n, f"{n} processors in this process's affinity"


_machine, _why = _machine_threads()
core.set_threads(machine=_machine, child=os.getpid() != _IMPORTED_IN)  # forked since the package was imported
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: core.set_threads(child=True))


def checked_threads(n: int | None) -> int:
    """A number of threads as the core takes it: 0 for None."""
    if n is None:
        return 0
    if isinstance(n, bool) or not hasattr(n, "__index__"):
        raise TypeError(f"n_threads must be an integer or None, got {n!r}")
    if not 1 <= n.__index__() <= 4096:
        raise ValueError(f"n_threads must be in 1 .. 4096 or None, got {n}")
    return n.__index__()


def set_num_threads(n: int | None) -> None:
    """Set how many threads a large step takes, in every optimizer without an ``n_threads`` of its own.

    None goes back to the default: OMP_NUM_THREADS if set, else the smaller of CPU affinity and cgroup quota, and never
    more than OpenMP itself allows at the call, so that threadpoolctl's limits hold.  A number is used as given.  In a
    forked child steps are serial until this is called: libgomp hangs there if anybody used it before the fork.
    """
    core.set_threads(default=checked_threads(n))


def get_num_threads() -> int:
    """How many threads a large step takes now."""
    n: int = core.get_threads()
    return n


def _openmp_runtimes() -> str:
    try:
        paths = {
            line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line
        }
    except (OSError, IndexError):
        return ""
    names = sorted(path for path in paths if os.path.basename(path).startswith(("libgomp", "libomp", "libiomp")))
    return ", ".join(names)


def show_config() -> None:
    """Print version, instruction set, missing builds and why, the OpenMP runtime, and the threads and why that many."""
    info = build_info()
    print(f"adaptive_c {__version__}")
    forced = " (forced by ADAPTIVE_C_ISA)" if "ADAPTIVE_C_ISA" in os.environ else ""
    print(f"  instruction set  {isa}{forced}")
    for level, why in unused_levels.items():
        print(f"                   {level} is not used: {why}")
    print(f"  compiler         {info['compiler']} {' '.join(info['flags'])}")
    if core.openmp():
        print(f"  OpenMP           {core.openmp()}, {_openmp_runtimes() or 'runtime unknown'}")
    else:
        print(f"  OpenMP           {info['openmp']}; every step is serial")
    print(f"  threads          {get_num_threads()}: {_thread_reason()}")


def _thread_reason() -> str:
    if not core.openmp():
        return "built without OpenMP"
    n, default, child = core.threads()
    if child:
        return "a forked child runs serial (libgomp may hang in it); set_num_threads overrides this"
    if default:
        return "set_num_threads"
    return _why if _machine in (n, _NO_LIMIT) else f"OpenMP's own limit ({_why})"
