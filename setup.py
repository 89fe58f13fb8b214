"""Builds the extensions: the core once for each instruction set, and _cpu, which tells them apart at import.

Everything else is in pyproject.toml.  Three environment variables: ADAPTIVE_C_NO_OPENMP=1 builds without OpenMP, CC
chooses the compiler as usual, and CFLAGS=-g keeps the debug information, which is most of an extension's size.
What was decided is printed, and kept for adaptive_c.show_config().
"""

import json
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# No contraction and no -ffast-math: every build gives the same bits, and sqrt still vectorises.  Jump threading turns
# selections on one condition into branches, which don't.  Strict aliasing is off because numbers are read as bits.
FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-thread-jumps",
         "-fno-strict-aliasing"]  # fmt: skip
LEVELS = {"baseline": [], "v3": ["-march=x86-64-v3"], "v4": ["-march=x86-64-v4", "-mprefer-vector-width=256"]}
NOTHING = "int main(void) { return 0; }"
OPENMP_PROGRAM = """#include <omp.h>
int main(void) {
    int n = 0;
    #pragma omp parallel reduction(+:n)
    n += 1;
    return n < 1 || omp_get_max_threads() < 1;
}
"""


class BuildExt(build_ext):
    def build_extensions(self):
        if self.refused(f"#include <Python.h>\n{NOTHING}", []):
            raise CompileError("no C compiler works here with Python's headers: apt install gcc python3-dev, or alike")
        msvc = self.compiler.compiler_type == "msvc"
        flags = ["/O2", "/fp:precise"] if msvc else FLAGS + ["-g0"] * ("-g" not in os.environ.get("CFLAGS", "").split())
        openmp, why = self.openmp("/openmp" if msvc else "-fopenmp")
        missing = {level: reason for level in LEVELS if (reason := self.unusable(level))}
        compiler = " ".join(getattr(self.compiler, "compiler", [self.compiler.compiler_type])[:1])
        config = {"compiler": compiler, "flags": flags, "openmp": why, "missing": missing}
        config["version"] = first_line(f"{compiler} --version")
        config["commit"] = first_line("git describe --always --dirty --abbrev=12 --exclude *")
        print("adaptive_c:", json.dumps(config))
        self.config_file = Path(self.get_ext_fullpath("adaptive_c._cpu")).with_name("_build.json")
        self.config_file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(config, indent=1)
        if not self.config_file.exists() or self.config_file.read_text() != text:
            self.config_file.write_text(text)
        core, cpu = cythonize([Extension(f"adaptive_c.{name}", [f"src/{name}.pyx"]) for name in ("_core", "_cpu")],
                              build_dir="build/cython", compiler_directives={"emit_code_comments": False})  # fmt: skip
        self.extensions = [x for x in self.extensions if x.name.rpartition("_")[2] not in missing]
        for extension in self.extensions:
            level = extension.name.rpartition("_")[2]
            extension.sources = cpu.sources if level == "cpu" else [self.named(level)]
            extension.depends = [*core.sources, str(self.config_file)]
            extension.extra_compile_args = flags + LEVELS.get(level, []) + openmp
            extension.extra_link_args = [] if msvc else openmp + ["-s"] * ("-g0" in flags)
        self.parallel = self.parallel or len(self.extensions)
        super().build_extensions()

    def named(self, level):
        """A C file that is the core, which Cython writes only once, under the level's name."""
        path = Path(f"build/cython/src/_{level}.c")
        if not path.exists():
            path.write_text(f'#define PyInit__core PyInit__{level}\n#include "_core.c"\n')
        return str(path)

    def copy_extensions_to_source(self):  # an editable install
        super().copy_extensions_to_source()
        shutil.copy(self.config_file, "adaptive_c/_build.json")

    def unusable(self, level):
        """Why this level can't be built here, or nothing."""
        if level == "baseline":
            return ""
        if self.compiler.compiler_type == "msvc":
            return "MSVC builds the baseline alone"
        if platform.machine().lower() not in ("x86_64", "amd64"):
            return f"not an x86-64 processor ({platform.machine()})"
        return self.refused(NOTHING, LEVELS[level])

    def openmp(self, flag):
        """The OpenMP flags, and what to say of them."""
        if os.environ.get("ADAPTIVE_C_NO_OPENMP", "0") not in ("", "0"):
            return [], "off: ADAPTIVE_C_NO_OPENMP was set at build time"
        reason = self.refused(OPENMP_PROGRAM, [flag], run=True)
        return ([], f"off: {reason}") if reason else ([flag], "on")

    def refused(self, program, flags, run=False):
        """Compile, link and perhaps run a program with flags; returns what went wrong, or nothing."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.c")
            source.write_text(program)
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=flags)
                self.compiler.link_executable(objects, f"{folder}/probe", extra_postargs=flags if run else [])
                if run:
                    subprocess.run([f"{folder}/probe"], check=True, timeout=60)
            except Exception as error:  # distutils' compile and link errors, and a program that fails
                return f"the compiler or its program failed with {' '.join(flags)} ({type(error).__name__})"
        return ""


def first_line(command):
    """What a command prints first, or nothing: for benchmarks to tell."""
    try:
        return subprocess.run(command.split(), capture_output=True, text=True).stdout.partition("\n")[0]
    except OSError:
        return ""


# The highest level takes longest to compile: it is begun first, and the others are compiled beside it.
extensions = [Extension(f"adaptive_c._{name}", []) for name in (*reversed(LEVELS), "cpu")]  # sources: see BuildExt
setup(ext_modules=extensions, cmdclass={"build_ext": BuildExt})
