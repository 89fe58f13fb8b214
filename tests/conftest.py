"""What holds for every test, and for the processes that it starts: set before anything loads NumPy or OpenMP."""

import gc
import os

# Two processes run tests on the same processors.  Threads that wait for work in a loop, as both libraries have them do,
# would take the processors from the threads that have work: most tests of several threads would take three times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def pytest_collection_finish():
    """Thousands of tests and the libraries stay to the end: no collection of garbage need look through them again."""
    gc.collect()
    gc.freeze()
