"""Which build of the core this process uses, and how many threads it takes.

The core is compiled once for each instruction set; the best that the processor runs is loaded here, when the first
optimizer is used.  ``ADAPTIVE_C_ISA=baseline|v3|v4`` forces one.
"""

import contextlib
import copyreg
import ctypes
import importlib
import json
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from . import _IMPORTED_IN, __version__

LEVELS = ("v4", "v3", "baseline")
_REBUILD = "rebuild it with: pip install --force-reinstall --no-cache-dir adaptive_c (from a clone: pip install .)"


def _load(level: str) -> Any:
    """Import the core of an instruction set."""
    try:
        return importlib.import_module(f"adaptive_c._{level}")
    except ImportError as error:
        tree = Path(__file__).resolve().parents[1]
        here = f"this is the source tree, {tree}: run Python in another folder, or pip install -e ."
        remedy = here if (tree / "setup.py").exists() else _REBUILD
        raise ImportError(f"adaptive_c's extension _{level} is missing or broken ({error}); {remedy}") from error


@cache
def build_info() -> dict[str, Any]:
    """What setup.py decided: compiler, flags, commit, and why a build is missing."""
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


# --- which processors OpenMP's threads run on ------------------------------------------------------------------------

# With one of these, libgomp binds the thread that loads it to a processor, and the others to the next ones.
_BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY")
_TO_PRIMARY = 2  # what omp_get_proc_bind() says where all threads share the first one's place


def _affinity() -> set[int]:
    """The processors on which the system lets the calling thread run."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _bound_to(library: str, everywhere: bool = False) -> set[int]:
    """The processors to which the OpenMP runtime of a loaded library binds its threads; empty where it binds none.

    everywhere: all that it could use, though OMP_PROC_BIND=primary keeps the threads together.
    """
    processors: set[int] = set()
    with contextlib.suppress(OSError, AttributeError):  # replaced on disk; built without OpenMP, or an old runtime
        runtime = ctypes.CDLL(library)
        together = not everywhere and runtime.omp_get_proc_bind() == _TO_PRIMARY
        for place in [0] if together else range(runtime.omp_get_num_places()):
            ids = (ctypes.c_int * runtime.omp_get_place_num_procs(place))()
            runtime.omp_get_place_proc_ids(place, ids)
            processors.update(ids)
    return processors


def _openmp_runtimes() -> list[str]:
    """The files of the OpenMP runtimes in this process."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    return sorted(set(re.findall(r"/.*/lib(?:gomp|omp|iomp)[^/\n]*$", maps, re.M)))


@contextlib.contextmanager
def _every_processor() -> Iterator[None]:
    """A block in which this thread may use every processor, though an OpenMP runtime may have bound it to one.

    A runtime uses the processors of the thread that loads it.  Where an earlier one (scikit-learn brings its own) has
    bound this thread to one of them, ours would bind all its threads to that one.
    """
    now = _affinity()
    seen = set()
    if any(os.environ.get(name) for name in _BINDING):
        seen = now.union(*(_bound_to(runtime, everywhere=True) for runtime in _openmp_runtimes()))
    if not seen > now:
        yield
        return
    os.sched_setaffinity(0, seen)
    try:
        yield
    finally:
        os.sched_setaffinity(0, now)


with _every_processor():
    core, isa, unused_levels = _choose()

Rows, counted = core.Rows, core.counted


def _rows(indices: Any, values: Any, offsets: Any, weights: Any) -> Any:
    """Make `Rows` for pickle.  It is in this module because the reader of a pickle may have loaded another build."""
    return Rows(indices, values, offsets, weights)


copyreg.pickle(Rows, lambda rows: (_rows, (rows.indices, rows.values, rows.offsets, rows.weights)))


# --- threads ---------------------------------------------------------------------------------------------------------


def cgroup_quota(root: Path = Path("/sys/fs/cgroup"), self_cgroup: Path = Path("/proc/self/cgroup")) -> float:
    """The processors that the control groups of this process allow, infinite where they set no quota."""
    quota = float("inf")
    try:
        lines = [line.split(":", 2) for line in self_cgroup.read_text().splitlines()]
    except OSError:
        return quota
    for _, controllers, path in lines:
        if controllers == "":  # version 2
            base, files = root, ["cpu.max"]
        elif "cpu" in controllers.split(","):
            base, files = root / "cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        folder = base / path.lstrip("/")
        for place in [folder, *folder.parents]:  # a limit holds for everything below it
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # no such file; no number, such as "max"
                limit, period = (int(word) for file in files for word in (place / file).read_text().split())
                if limit > 0:
                    quota = min(quota, limit / period)
            if place == root:
                break
    return quota


def processors() -> set[int]:
    """The processors that the threads of a step may use: where OpenMP binds them, else this thread's affinity."""
    return _bound_to(core.__file__) or _affinity()


def _machine_threads() -> tuple[int, str]:
    """How many threads None means, before OpenMP's own limit, and why."""
    wish = os.environ.get("OMP_NUM_THREADS", "")
    number = r"[ \t]*\+?0*([1-9]\d{0,8})[ \t]*"
    if match := re.fullmatch(f"{number}(?:,{number})*", wish):  # else libgomp says that it ignores the variable
        return int(match[1]), f"OMP_NUM_THREADS={wish}"
    n, quota = len(processors()), cgroup_quota()
    if quota < n:
        return max(1, int(quota)), f"cgroup quota of {quota:g} processor{'s' * (quota != 1)}"
    if _bound_to(core.__file__):
        names = " ".join(f"{name}={os.environ[name]}" for name in _BINDING if os.environ.get(name))
        return n, f"{names} binds them to {counted(n, 'processor')}"
    return n, f"{counted(n, 'processor')} in this process's affinity"


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
    """Set how many threads a large step takes, in every optimizer that has no ``n_threads`` of its own.

    Parameters
    ----------
    n : int in [1, 4096] or None
        The number, used as given unless OMP_THREAD_LIMIT or OMP_MAX_ACTIVE_LEVELS=0 allows fewer.  None goes back to
        the default: OMP_NUM_THREADS if set, else the smaller of CPU affinity and cgroup quota as they are now, and
        never more than OpenMP itself allows at each step, so that threadpoolctl's limits hold.  OpenMP allows as many
        as the process had processors when it was loaded: if it has more since, give the number.  Where OMP_PLACES,
        OMP_PROC_BIND or GOMP_CPU_AFFINITY binds the threads, the processors they are bound to count as the affinity.

    Raises
    ------
    TypeError, ValueError
        If n is no integer, or out of its range.

    Notes
    -----
    In a forked child steps are serial until a number is set: libgomp hangs there if it was used before the fork.

    Examples
    --------
    >>> import adaptive_c
    >>> adaptive_c.set_num_threads(2)
    >>> adaptive_c.get_num_threads()
    2
    >>> adaptive_c.set_num_threads(None)
    """
    global _machine, _why
    default = checked_threads(n)
    if n is None:
        _machine, _why = _machine_threads()
    core.set_threads(default, _machine)


def get_num_threads() -> int:
    """Tell how many threads a large step takes now.

    Returns
    -------
    int
        The number for optimizers without an ``n_threads`` of their own; 1 in a build without OpenMP.

    Examples
    --------
    >>> import adaptive_c
    >>> adaptive_c.get_num_threads() >= 1
    True
    """
    n: int = core.get_threads()
    return n


def show_config() -> None:
    """Print version, instruction set, missing builds and why, the OpenMP runtime, and how many threads and why.

    Examples
    --------
    >>> import adaptive_c
    >>> adaptive_c.show_config()  # doctest: +ELLIPSIS
    adaptive_c ...
      instruction set  ...
      a large step     ...
    """
    info = build_info()
    print(f"adaptive_c {__version__}")
    forced = " (forced by ADAPTIVE_C_ISA)" if "ADAPTIVE_C_ISA" in os.environ else ""
    print(f"  instruction set  {isa}{forced}")
    for level, why in unused_levels.items():
        print(f"                   {level} is not used: {why}")
    print(f"  compiler         {info['compiler']} {' '.join(info['flags'])}")
    if core.openmp():
        print(f"  OpenMP           {core.openmp()}, {', '.join(_openmp_runtimes()) or 'runtime unknown'}")
    else:
        print(f"  OpenMP           {info['openmp']}; every step is serial")
    print(f"  a large step     {counted(get_num_threads(), 'thread')}: {_thread_reason()}")


def _thread_reason() -> str:
    """Why a step uses as many threads as it does."""
    if not core.openmp():
        return "built without OpenMP"
    n, default, child = core.threads()
    if default:
        return "set_num_threads" if get_num_threads() == default else f"OpenMP's own limit (set_num_threads({default}))"
    if child:
        return "a forked child steps serially (libgomp may hang in it); set_num_threads(n) overrides this"
    return _why if n == _machine else f"OpenMP's own limit ({_why})"
