# The core: everything that is compiled once for each instruction set.  Cython translates it once, as _core.pyx;
# setup.py compiles that C as _baseline, _v3 and _v4, each with its own flags; adaptive_c/_native.py loads one of them.

from cython cimport floating
from cython.parallel cimport prange

include "rules.pxi"
include "stages.pxi"
include "sweep.pxi"
include "reduce.pxi"
include "passes.pxi"
include "threads.pxi"
include "plan.pxi"
include "ceiling.pxi"
