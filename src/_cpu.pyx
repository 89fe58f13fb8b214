# cython: language_level=3
"""Which instruction-set build this processor can run.  Compiled for the baseline alone."""

cdef extern from *:
    """
    #if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    static int adaptive_c_level(void) {
        __builtin_cpu_init();
        if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi")
              && __builtin_cpu_supports("bmi2")))
            return 0;
    #if __GNUC__ >= 11 || __clang_major__ >= 14
        if (!(__builtin_cpu_supports("f16c") && __builtin_cpu_supports("lzcnt") && __builtin_cpu_supports("movbe")))
            return 0;
    #endif
        if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
              && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq")
              && __builtin_cpu_supports("avx512vl")))
            return 3;
        return 4;
    }
    #else
    static int adaptive_c_level(void) { return 0; }
    #endif
    """
    int adaptive_c_level()


def supported():
    """The instruction-set levels that the processor and the operating system support, best first."""
    return {0: ("baseline",), 3: ("v3", "baseline"), 4: ("v4", "v3", "baseline")}[adaptive_c_level()]
