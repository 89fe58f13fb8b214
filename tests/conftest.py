"""What holds for every test, and for the processes that it starts: set before anything loads NumPy or OpenMP."""

import gc
import importlib.util
import os
import re

import pytest
from hypothesis import HealthCheck, settings

# Two processes run tests on the same processors.  Threads that wait for work in a loop, as both libraries have them do,
# would take the processors from the threads that have work: most tests of several threads would take three times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# What else the shell says of OpenMP would change how many threads the tests see, and where.
for name in ("NUM_THREADS", "THREAD_LIMIT", "DYNAMIC", "MAX_ACTIVE_LEVELS", "PROC_BIND", "PLACES", "STACKSIZE"):
    os.environ.pop(f"OMP_{name}", None)
os.environ.pop("GOMP_CPU_AFFINITY", None)

# No example is judged by the time that it takes.
settings.register_profile("without a clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("without a clock")

# The files that take longest, longest first.  They are begun first, so that no process waits for another one's at the end.
LONGEST = ("mpi", "browser", "bench", "figures", "disk_faults", "explore", "clients", "torch_wrappers", "torch_door", "threads",
           "demo", "formats", "bits", "resume", "file", "scale", "typing", "build", "safety")  # fmt: skip


def pytest_configure(config):
    config.option.loadscopereorder = False  # by the numbers of tests in files, which say nothing of their time


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    place = {f"test_{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish():
    """Thousands of tests and the libraries stay to the end: no collection of garbage need look through them again."""
    gc.collect()
    gc.freeze()


# --- tests that are run later -------------------------------------------------------------------------------------------

# .ci/run installs these after the other tests.
LATER = re.compile(r"\b(torch|thinc|transformers|accelerate|lightning)\b")


def pytest_runtest_setup(item):
    for mark in item.iter_markers("later"):
        for name in mark.args:
            if importlib.util.find_spec(name) is None:
                pytest.skip(f"needs {name}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """What is skipped for the want of such a module, and is not marked, would never run in .ci/run: it fails."""
    report = yield
    why = str(call.excinfo.value) if call.excinfo else ""
    if report.skipped and not hasattr(report, "wasxfail") and LATER.search(why):
        if not item.get_closest_marker("later"):
            report.outcome, report.longrepr = "failed", f"{why}: mark it @pytest.mark.later"
        elif item.config.option.markexpr == "later":
            report.outcome, report.longrepr = "failed", f"{why}, and this is when it runs: install it"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Nor may whole files be skipped when they are to be run."""
    report = yield
    why = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)
    if report.skipped and LATER.search(why) and collector.config.option.markexpr == "later":
        report.outcome, report.longrepr = "failed", f"{why}, and this is when it runs: install it"
    return report
