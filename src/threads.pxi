# How many threads a large step takes.  adaptive_c/_native.py finds out what the machine allows, and says why.

cdef extern from *:
    """
    #ifdef _OPENMP
    #include <omp.h>
    #define ADAPTIVE_C_OPENMP _OPENMP
    #if _OPENMP < 200805  /* before OpenMP 3.0, as MSVC's, there were no such limits */
    #define omp_get_thread_limit() 0x7fffffff
    #define omp_get_max_active_levels() 1
    #endif
    #else
    #define ADAPTIVE_C_OPENMP 0
    static int omp_get_max_threads(void) { return 1; }
    static int omp_get_thread_limit(void) { return 1; }
    static int omp_get_max_active_levels(void) { return 0; }
    #endif
    """
    const int ADAPTIVE_C_OPENMP
    int omp_get_max_threads() nogil
    int omp_get_thread_limit() nogil
    int omp_get_max_active_levels() nogil

cdef int default_threads = 0   # set_num_threads: 0 means that `machine_threads` and OpenMP decide
cdef int machine_threads = 1   # what affinity and cgroup quota allow
cdef bint forked = False       # libgomp hangs in a forked child if anybody used it in the parent


def set_threads(int default=-1, int machine=-1, bint child=False):
    """Set the process-wide number of threads, what the machine allows, or that this process is a forked child."""
    global default_threads, machine_threads, forked
    if child:
        forked = True
        default = 0  # the parent's choice is not the child's
    if default >= 0:
        default_threads = default
    if machine >= 0:
        machine_threads = machine


cdef int granted(int n) noexcept nogil:
    """How many of n threads OpenMP gives at most: OMP_THREAD_LIMIT and OMP_MAX_ACTIVE_LEVELS can't be overridden."""
    return min(n, omp_get_thread_limit()) if omp_get_max_active_levels() > 0 else 1


cpdef int get_threads(int n_threads=0) noexcept nogil:
    """The number of threads that a large step takes now; n_threads: an optimizer's own choice, 0 for none."""
    if not ADAPTIVE_C_OPENMP or (forked and not default_threads):
        return 1
    return granted(n_threads or default_threads or min(machine_threads, omp_get_max_threads()))


def threads():
    """What OpenMP and the machine allow, what set_threads said, and whether this is a forked child."""
    return granted(min(machine_threads, omp_get_max_threads())), default_threads, forked


def openmp():
    """The _OPENMP macro of this build (yyyymm), 0 for a serial build."""
    return ADAPTIVE_C_OPENMP
