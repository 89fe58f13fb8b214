# The core: everything that is compiled once for each instruction set.  _baseline.pyx, _v3.pyx and _v4.pyx are this
# file under three names; setup.py gives each its flags, adaptive_c/_config.py loads one of them.
#

from cython cimport floating
from cython.parallel cimport prange

include "numbers.pxi"
include "rules.pxi"
include "formats.pxi"
include "stages.pxi"
include "sweep.pxi"
include "reduce.pxi"
include "passes.pxi"
include "plan.pxi"
include "ceiling.pxi"
