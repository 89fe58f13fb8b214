# The core: everything that is compiled once for each instruction set.  setup.py compiles it under three names, each
# with its own flags, and adaptive_c/_native.py loads one of them.
#
# Each file uses what stands above it.  First loops over plain pointers, then what is swept over, then what a step does.

from cython cimport floating

include "threads.pxi"    # how many threads
include "numbers.pxi"    # integer types, powers, the floating-point mode
include "options.pxi"    # hyperparameters, and the constants of a step
include "rules.pxi"      # one loop for each update rule
include "formats.pxi"    # one pair of loops for each number format
include "stages.pxi"     # one loop for each extra
include "space.pxi"      # groups, arrays, and the walker over their elements
include "touched.pxi"    # gradients of a few rows, sorted and summed
include "incoming.pxi"   # what is handed in, as a gradient
include "behind.pxi"     # steps that rows have missed, to be replayed
include "blocks.pxi"     # narrow numbers, block by block
include "begin.pxi"      # the first write
include "passes.pxi"     # sums of micro-batches
include "reduce.pxi"     # norms and finite checks
include "simplex.pxi"    # rows that sum to one
include "moments.pxi"    # second moments by row
include "guard.pxi"      # who may touch a run
include "memory.pxi"     # buffers and what overlaps
include "tensors.pxi"    # tensors as buffers
include "group.pxi"      # a bound parameter group
include "undo.pxi"       # what a step overwrites, kept
include "prefetch.pxi"   # memory asked for before its turn
include "sweep.pxi"      # the parallel loop, and a step's stages
include "rows.pxi"       # what is handed in as a gradient of a few rows
include "gradients.pxi"  # the gradients of one call
include "catch_up.pxi"   # rows brought up to date
include "usable.pxi"     # norm, finite check, factor, dynamic loss scale
include "settings.pxi"   # options of the optimizer as a whole, in force
include "once.pxi"       # a learning rate for one call
include "pages.pxi"      # state that is not in memory
include "averages.pxi"   # parameters and averages exchanged
include "arraywise.pxi"  # a step array by array, as gradients arrive
include "binding.pxi"    # groups linked, and their arrays replaced
include "shards.pxi"     # a step of several processes, each of which has a part
include "plan.pxi"       # steps
include "ceiling.pxi"    # the machine's limit, for benchmarks
