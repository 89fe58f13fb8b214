"""The gate of the inner loops: is each one still vectorised, and no longer than it was recorded?

    python .ci/loops.py            check
    python .ci/loops.py --record   check the vectorisation, and write benchmarks/instructions.json anew

This compiles the core once for each instruction set and runs nothing, so the same source and compiler give the same
answer on any machine, however busy it is.  It needs Cython, gcc (CC names another one) and binutils.

1.  gcc's own report must say that every loop over elements was vectorised in the level's width, for each dtype.  An
    inline loop is compiled once for each call of it, with the constants of that call, and each copy must be vectorised.
2.  The vector loop is found in the machine code by its debug information.  The instructions of one iteration are
    counted and divided by the number of elements that an iteration handles; if there are several copies, the longest
    one counts.  The copies that v4 compiles for 512 bits (WIDE in sweep.pxi) are called "v4 wide".  A loop may exceed
    its record by 5% or by one instruction per iteration, whichever is more; this leaves room for what another minor
    version of gcc does to addresses and register copies.  A run that passes does not change the record, so small rises
    can't add up.  Divisions and square roots, which decide the time of most rules, may not rise at all.  A loop that is
    only in the record or only in the build is an error.

If the major version of gcc differs from that of the record, only the vectorisation is checked.  The gate does not cover
what runs once per call (heads, remainders, the scalar loop for overlapping arrays), the sweep, the plan, or time
itself: a count knows nothing of latencies or memory.
"""

import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks" / "instructions.json"
GCC = os.environ.get("CC", "gcc").split()
WIDTH = {"baseline": 16, "v3": 32, "v4": 32, "v4 wide": 64}  # bytes
SIZE = {"char": 1, "float": 4, "double": 8} | {f"{u}int{8 * n}_t": n for u in ("", "u") for n in (1, 2, 4, 8)}
# Cython copies the source line into a comment above the C loop that it makes of it.
LOOP = re.compile(r" \* +for (i in range\(n\)|block in range\(\(n - i\) // LANES\)):.* # <<<")


def run(*command, **options):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **options).stdout


def source_loops(text):
    """{C function: (name, first and last line of its loop, bytes of an element, {line of a call: constants})}."""
    lines, loops, parameters, function = text.splitlines(), {}, {}, None
    for number, line in enumerate(lines, 1):
        if line.startswith("static ") and line.endswith(") {"):
            head, function, near = line, re.search(r"(\w+)\(", line)[1], False
        elif LOOP.match(line):
            near = True
        elif function and near and (match := re.match(r"( +)(for|while) \(", line)):
            near, end = False, lines.index(match[1] + "}", number) + 1
            assert function not in loops, f"{function} has two loops over elements: make it two functions"
            used = set(re.findall(r"(__pyx_v_\w+)\[\(?__pyx_v_i\b", "\n".join(lines[number:end])))
            pointers = re.findall(r"(\w+) (?:const )?\*(__pyx_v_\w+)", head)
            name = re.sub(r".*__pyx_f_\d+_[a-z0-9]+_", "", function)
            dtype = {"__pyx_fuse_0": " float32", "__pyx_fuse_1": " float64"}.get(function[:12], "")
            loops[function] = name + dtype, number, end, max(SIZE[t] for t, x in pointers if x in used), {}
            if "CYTHON_INLINE" in head:
                parameters[function] = re.findall(r"__pyx_v_(\w+)[,)]", head)
    for number, line in enumerate(lines, 1):
        if (match := re.match(r" +(\w+)\((.*)\);$", line)) and match[1] in parameters:
            given = zip(parameters[match[1]], match[2].split(", "), strict=True)
            constants = [f"{name}={re.sub('.*_(?=[A-Z]+_)', '', x)}" for name, x in given if "__pyx_v_" not in x]
            loops[match[1]][4][number] = f"({', '.join(constants)})"
    return loops


def vector_loops(disassembly):
    """(function, address of the jump back, instructions) of each loop that is one basic block with vector registers."""
    for line in disassembly.splitlines():
        if match := re.match(r"[0-9a-f]+ <(.+)>:$", line):
            function, block, starts = match[1], [], {}
        elif match := re.match(r" *([0-9a-f]+):\t(.*?) *(?:[#<].*)?$", line):
            starts[match[1]] = len(block)
            block.append(match[2])
            if match[2].startswith(("j", "ret")):  # the end of a block
                start = starts.get(match[2].split()[-1])
                if start is not None and "mm" in "".join(block[start:]):
                    yield function, match[1], block[start:]
                block, starts = [], {}


def width(instructions):
    return max({"x": 16, "y": 32, "z": 64}[x] for x in re.findall(r"%([xyz])mm", "".join(instructions)))


def count(instructions, size):
    """[instructions, elements, divisions and square roots per element] of one iteration; size is that of an element."""
    step, slow, text = Counter(), 0, "\n".join(instructions)
    for sign, by, register in re.findall(r"^(add|sub) +\$(0x[0-9a-f]+),(%r\w+)$", text, re.M):
        by = (int(by, 16) + 2**63) % 2**64 - 2**63
        step[register] += by if sign == "add" else -by
    addresses = re.findall(r"\((%r\w+)(?:,(%r\w+),(\d))?\)", text)
    elements = max(abs(step[base] + step[index] * int(scale or 0)) for base, index, scale in addresses) // size
    for packed, kind, rest in re.findall(r"^v?(?:div|sqrt)([ps])([sd]) +(.*)$", text, re.M):
        slow += width([rest]) // {"s": 4, "d": 8}[kind] if packed == "p" else 1
    return [len(instructions), elements, round(slow / max(elements, 1), 3)]


def build(level, flags, folder):
    """Compile core.c for a level; returns the loops without vectors, and {level or "v4 wide": {loop: count}}."""
    source, program, report = f"{folder}/core.c", f"{folder}/core.o", Path(folder, level)
    python = ["-fwrapv", "-DNDEBUG", "-fPIC", f"-I{sysconfig.get_paths()['include']}"]  # as every build of CPython has
    run(*GCC, "-c", "-g", "-fno-var-tracking", "-fopenmp", *python, *flags, source, "-o", program,
        f"-fopt-info-vec-optimized={report}")  # fmt: skip
    text = Path(source).read_text()
    loops, missed, counts = source_loops(text), [], {level: {}}
    notes = re.findall(r"core\.c:(\d+):\d+: optimized: +loop vectorized using (\d+) byte", report.read_text())
    notes = [(0, 0), *((int(line), int(by)) for line, by in notes)]
    notes = [new for old, new in pairwise(notes) if new[0] != old[0] or new[1] >= old[1]]  # drops the remainders' notes
    for name, first, last, _, calls in loops.values():
        found = sum(first <= line <= last and by == WIDTH[level] for line, by in notes)
        wanted = max(len(calls), 1)
        if (level, name) == ("baseline", "largest64"):
            wanted = 0  # SSE2 can't compare 64-bit integers
        if found < wanted:
            missed.append(f"{level}: {name}: {found} of {wanted} loops use {WIDTH[level]}-byte vectors")
    wide = re.findall(r"^static WIDE (\w+)\(.*{$", text, re.M) if level == "v4" else []
    found = list(vector_loops(run("objdump", "-d", "--no-show-raw-insn", "-j", ".text", program)))
    places = run("addr2line", "-a", "-i", "-f", "-j", ".text", "-e", program, input="\n".join(x[1] for x in found))
    for (symbol, _, instructions), place in zip(found, re.split("^0x", places, flags=re.M)[1:], strict=True):
        frames = [*re.findall(r"^([\w.]+)\n.*:(\d+)", place, re.M), ("", 0)]  # the innermost call comes first
        kind = f"{level} wide" if symbol.split(".")[0] in wide else level
        for (function, line), (_, caller) in pairwise(frames):
            if function in loops and loops[function][1] <= int(line) <= loops[function][2]:
                name, _, _, size, calls = loops[function]
                new = count(instructions, size)
                if width(instructions) == WIDTH[kind] <= new[1] * size:  # otherwise the loop handles a remainder
                    name = re.sub("(?= |$)", calls.get(int(caller), ""), name, count=1)  # goes before the dtype
                    old = counts.setdefault(kind, {}).setdefault(name, new)
                    counts[kind][name] = max(old, new, key=lambda x: x[0] / x[1])
                break
    return missed, counts


def compare(now, then):
    """Yield a line for each count that is wrong; now, then: {level: {loop: [instructions, elements, divisions]}}."""
    for level in sorted({*now, *then}):
        new, old = now.get(level, {}), then.get(level, {})
        for name in sorted({*new, *old}):
            if name not in old or name not in new:
                where = "the record" if name in new else "the build"
                yield f"{level}: {name}: not in {where}; if that is on purpose, run python .ci/loops.py --record"
                continue
            (n, elements, slow), (n_old, elements_old, slow_old) = new[name], old[name]
            before = n_old / elements_old
            bound = max(1.05 * before, before + 1 / elements_old)
            if n / elements > bound:
                yield (f"{level}: {name}: {n / elements:.3f} instructions per element ({n} for {elements}), recorded "
                       f"{before:.3f} ({n_old} for {elements_old}), bound {bound:.3f}")  # fmt: skip
            if slow > slow_old:
                yield f"{level}: {name}: {slow:g} divisions and square roots per element, recorded {slow_old:g}"


def main():
    settings = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(node, ast.Assign) and node.targets[0].id in ("FLAGS", "LEVELS")
    }
    wrong, now = [], {}
    with tempfile.TemporaryDirectory() as folder:
        run("cython", ROOT / "src/_core.pyx", "-o", f"{folder}/core.c")
        for level, flags in settings["LEVELS"].items():
            missed, counts = build(level, [*settings["FLAGS"], *flags], folder)
            wrong += missed
            now |= counts
            print(", ".join(f"{kind}: {len(loops)} loops" for kind, loops in counts.items()))
    gcc = run(*GCC, "-dumpfullversion").strip()
    if "--record" in sys.argv:
        text = json.dumps({"gcc": gcc, "loops": now}, indent=0, sort_keys=True)
        if not wrong:
            # Each loop is written on a line of its own, so that diffs of the record are readable.
            RECORD.write_text(re.sub(r"\[\n(.*),\n(.*),\n(.*)\n\]", r"[\1, \2, \3]", text) + "\n")
    else:
        then = json.loads(RECORD.read_text())
        if gcc.split(".")[0] == then["gcc"].split(".")[0]:
            # A loop that isn't vectorised isn't found either, so that is reported alone.
            wrong = wrong or list(compare(now, then["loops"]))
        else:
            print(f"gcc {gcc}, and the record is of gcc {then['gcc']}: instruction counts were not compared")
    print("\n".join(wrong) or "all well")
    return len(wrong) > 0


if __name__ == "__main__":
    sys.exit(main())
