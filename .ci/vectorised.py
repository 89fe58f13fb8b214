"""Ask the compiler whether every loop of the rules and stages was vectorised, in every build, in both dtypes.

An inline loop is compiled once for each place that calls it with constants of its own, and must be reported as often.
Needs Cython and gcc; run it in the root of a clone.  Exits with 1 and the list of loops that were not vectorised.
"""

import ast
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

WIDTH = {"baseline": 16, "v3": 32, "v4": 32}
settings = {
    node.targets[0].id: ast.literal_eval(node.value)
    for node in ast.parse(Path("setup.py").read_text()).body
    if isinstance(node, ast.Assign) and node.targets[0].id in ("FLAGS", "LEVELS")
}


def loops():
    """(file, line, function, how often it must be vectorised) of each loop over elements."""
    for path in (Path("src/rules.pxi"), Path("src/stages.pxi"), Path("src/reduce.pxi"), Path("src/ceiling.pxi")):
        text = path.read_text()
        function, variants = "", 1
        for number, line in enumerate(text.splitlines(), 1):
            if match := re.match(r"cdef (inline )?\w+ (\w+)\(", line):
                function = match[2]
                variants = 2 if "floating" in line else 1
                variants *= len(re.findall(rf"^ +{function}\(", text, re.M)) if match[1] else 1
            if re.match(r" +for i in range\(n\):", line):
                yield str(path), number, function, variants


missed = 0
for level, flags in settings["LEVELS"].items():
    with tempfile.TemporaryDirectory() as folder:
        source, report = f"{folder}/core.c", f"{folder}/report"
        subprocess.run(["cython", "--line-directives", f"src/_{level}.pyx", "-o", source], check=True)
        subprocess.run(
            ["gcc", "-c", "-fPIC", "-fopenmp", *settings["FLAGS"], *flags, f"-I{sysconfig.get_paths()['include']}",
             source, "-o", f"{folder}/core.o", f"-fopt-info-vec-optimized={report}"],
            check=True,
        )  # fmt: skip
        notes = re.findall(
            r"^(\S+?):(\d+):\d+: optimized: loop vectorized using (\d+) byte", Path(report).read_text(), re.M
        )
    for path, number, function, wanted in loops():
        found = notes.count((path, str(number), str(WIDTH[level])))
        if (level, function) == ("baseline", "largest64"):  # SSE2 compares no 64-bit integers
            continue
        if found < wanted:
            missed += 1
            print(f"{level}: {path}:{number} {function}: {found} of {wanted} loops use {WIDTH[level]}-byte vectors")
    print(f"{level}: {sum(1 for _ in loops())} loops checked")
sys.exit(missed > 0)
