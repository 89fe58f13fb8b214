"""What was built and installed, what an import costs, and that nothing public is without its parts."""

import ast
import functools
import importlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cases
import numpy as np
import pytest
from support import CHUNK, spec, step_range

import adaptive_c as ac
from adaptive_c import _native, optimizers, reference
from adaptive_c.bench import suite

ROOT = Path(__file__).resolve().parents[1]


def python(*arguments, **env):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd="/",
                          env={**os.environ, **env})  # fmt: skip


def test_the_installed_package_is_tested_not_the_source_tree():
    for file in (ac.__file__, _native.core.__file__):  # a virtual environment may well lie inside the clone
        assert Path(file).resolve().parent != ROOT / "adaptive_c", f"{file}: install it with pip install '.[test]'"


def test_built_with_openmp_unless_told_otherwise():
    if os.environ.get("ADAPTIVE_C_NO_OPENMP"):
        assert not _native.core.openmp()
        assert ac.get_num_threads() == 1 or _native.core.threads()[1]
    else:
        assert _native.core.openmp(), _native.build_info()


def test_the_best_supported_level_is_loaded():
    if "ADAPTIVE_C_ISA" not in os.environ:
        supported = importlib.import_module("adaptive_c._cpu").supported()
        assert _native.isa == next(level for level in supported if level not in _native.build_info()["missing"])


@pytest.mark.parametrize("level", _native.LEVELS)
def test_isa_can_be_forced(level):
    out = python("-c", "import adaptive_c as ac; ac.show_config()", ADAPTIVE_C_ISA=level)
    if level in _native.unused_levels:
        assert f"ADAPTIVE_C_ISA={level}: " in out.stderr
    else:
        assert f"instruction set  {level} (forced by ADAPTIVE_C_ISA)" in out.stdout


def test_an_unknown_isa_is_a_clear_import_error():
    out = python("-c", "import adaptive_c as ac; ac.SGD", ADAPTIVE_C_ISA="avx9")
    assert "ImportError: ADAPTIVE_C_ISA='avx9' is unknown; use one of baseline, v3, v4, or unset it" in out.stderr


def copied(tmp_path, *without):
    """The installed package's files in a folder, but some; returns the environment that imports it from there."""
    target = tmp_path / "adaptive_c"
    shutil.copytree(Path(ac.__file__).parent, target, ignore=shutil.ignore_patterns("__pycache__", *without))
    return {"PYTHONPATH": str(tmp_path)}


def test_the_reference_works_without_extensions_and_an_optimizer_says_what_to_do(tmp_path):
    env = copied(tmp_path, "*.so", "*.pyd")
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import adaptive_c; "
    out = python(
        "-c", script + "from adaptive_c import reference; print(reference.sgd(1.0, 2.0, {}, 1, lr=0.5))", **env
    )
    assert out.stdout == "0.0\n", out.stderr
    out = python("-c", script + "print(adaptive_c.schedules.linear(1.0, 2)(1))", **env)
    assert out.stdout == "0.5\n", out.stderr
    out = python("-c", script + "adaptive_c.AdamW", **env)
    assert "ImportError: adaptive_c's extension _cpu is missing or broken" in out.stderr
    assert "pip install --force-reinstall" in out.stderr


def test_a_missing_build_falls_back_and_show_config_says_so(tmp_path):
    env = copied(tmp_path, f"_{_native.isa}.*so")
    out = python("-c", "import adaptive_c as ac; ac.show_config()", **env)
    if _native.isa == "baseline":
        assert "ImportError" in out.stderr
    else:
        assert f"{_native.isa} is not used: adaptive_c's extension _{_native.isa} is missing or broken" in out.stdout


def test_show_config(capsys):
    ac.show_config()
    out = capsys.readouterr().out
    assert f"adaptive_c {ac.__version__}" in out
    assert f"instruction set  {_native.isa}" in out
    assert re.search(r"a large step +(1 thread|\d+ threads): ", out)
    ac.set_num_threads(3)
    ac.show_config()
    ac.set_num_threads(None)
    assert "a large step     3 threads: set_num_threads" in capsys.readouterr().out or not _native.core.openmp()


@pytest.mark.skipif(sys.platform != "linux" or "-g" in os.environ.get("CFLAGS", ""), reason="built otherwise")
def test_the_extensions_carry_no_debug_information():
    built = list(Path(_native.core.__file__).parent.glob("_*.so"))
    assert built
    for path in built:
        assert b".debug_info" not in path.read_bytes(), path


def test_an_import_loads_little_beyond_numpy():
    """Counted, not timed: some modules of the standard library and our own, none of another package."""
    script = (
        "import sys, numpy; before = set(sys.modules); import adaptive_c; adaptive_c.AdamW\n"
        "print(*(name for name in sys.modules if name not in before))"
    )
    loaded = python("-c", script).stdout.split()
    ours = [name for name in loaded if name.partition(".")[0] == "adaptive_c"]
    assert "adaptive_c.optimizers" in ours
    assert not [name for name in ours if "bench" in name or "demo" in name]
    roots = {name.partition(".")[0] for name in loaded} - set(sys.stdlib_module_names)
    assert roots <= {"adaptive_c", "numpy", "cython_runtime", *(r for r in roots if r.startswith("_cython_"))}
    assert len(loaded) < 70  # 45, of which 12 are ours


def disassembly(level):
    path = Path(_native.core.__file__)
    (built,) = path.parent.glob(f"_{level}.*so")
    return subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", built], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.skipif(not shutil.which("objdump") or _native.isa == "baseline", reason="needs objdump on x86-64")
def test_wide_registers_only_where_they_belong():
    assert not re.search(r"%[yz]mm", disassembly("baseline"))
    assert not re.search(r"%[yz]mm", disassembly("cpu"))
    assert "ldmxcsr" not in disassembly("cpu")  # the core's is under flush_denormals
    assert re.search(r"vsqrtps .*%ymm", disassembly("v3"))
    assert not re.search(r"%zmm", disassembly("v3"))
    for level in ("baseline", "v3", "v4"):
        assert not re.search(r"\bvf[n]?m(add|sub)\d+[ps][sd]\b", disassembly(level)), "a contracted product"


# --- a rule and its parts --------------------------------------------------------------------------------------------

CLASSES = [name for name, cls in vars(optimizers).items()
           if isinstance(cls, type) and issubclass(cls, ac.Optimizer) and cls is not ac.Optimizer]  # fmt: skip


def text(place):
    return (ROOT / place).read_text()


def kernels_without_class():
    """The names in the table of kernels that no class gives; in a clone."""
    source = text("src/rules.pxi") if (ROOT / "src/rules.pxi").is_file() else "cdef dict RULES = {}"
    table = re.search(r"^cdef dict RULES = \{(.*?)\}", source, re.M | re.S)[1]
    return set(re.findall(r'"(\w+)":', table)) - {getattr(optimizers, name).rule.name for name in CLASSES}


RULES = sorted({*CLASSES, *optimizers.__all__, *(case[1] for case in cases.CASES), *kernels_without_class()})


def kernel(name):
    """The name that a class gives its kernel; some share one."""
    return getattr(getattr(getattr(optimizers, name, None), "rule", None), "name", name.lower())


def body(function):
    return re.search(rf"^cdef void {function}\(.*?(?=^\S|\Z)", text("src/rules.pxi"), re.M | re.S)[0]


def loop(name):
    """The loop that steps a rule, as the dispatch says."""
    found = re.search(rf"\brule == {kernel(name).upper()}\b.*:\n +(\w+)\(", body("apply_rule"))
    return found[1] if found else kernel(name)


@functools.cache
def nodes_of(file):
    return list(ast.walk(ast.parse(text(file))))


@functools.cache
def recorded_loops():
    return json.loads(text("benchmarks/instructions.json"))["loops"]


def in_reference(name):
    function = name.lower()
    return {f"the function {function}": callable(getattr(reference, function, None)),
            f"{function} in __all__": function in reference.__all__}  # fmt: skip


def in_loops(name):
    found = re.search(rf"^cdef (inline )?void {loop(name)}(_loop)?\(", text("src/rules.pxi"), re.M)
    return {f"the loop {loop(name)}": found}


def in_dispatch(name):
    rule, source = kernel(name).upper(), text("src/rules.pxi")
    return {
        f"{rule} in the enum Rule": re.search(rf"^cdef enum Rule:\n[^:]*\b{rule}\b", source, re.M),
        f"{rule} in RULES": re.search(rf'"{kernel(name)}": {rule}\b', source),
        f"{rule} in form_step": re.search(rf"\brule == {rule}\b", body("form_step")),
        f"{rule} in apply_rule": re.search(rf"\brule == {rule}\b", body("apply_rule")),
    }


def in_optimizers(name):
    cls = getattr(optimizers, name, None)
    parts = {
        f"{part!r} in the docstring": part in (cls.__doc__ or "") for part in ("Paper:", "Other libraries:", ">>> ")
    }
    short = cls is not None and len(inspect.getsource(cls).splitlines()) <= 40
    return {f"the class {name}": cls, f"{name} in __all__": name in optimizers.__all__, **parts,
            "a class of at most 40 lines": short}  # fmt: skip


def in_cases(name):
    return {f"a case of {name}": any(case[1] == name for case in cases.CASES)}


def in_golden(name):
    """In the test by its name or as an attribute, for a mention in a comment is none; or in a file of numbers."""
    nodes = nodes_of("tests/test_golden.py")
    mentioned = {node.value for node in nodes if isinstance(node, ast.Constant)}
    mentioned |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    recorded = any(f'"{name}"' in path.read_text() for path in (ROOT / "tests" / "data").glob("*.json"))
    return {"numbers that do not come from the reference": name in mentioned or recorded}


def in_docs(name):
    """A page of its own, and its row in the table of rules."""
    path = ROOT / "docs" / "optimizers" / f"{name}.md"
    page = path.read_text() if path.is_file() else ""
    parts = ("```math", "## At work", "## Arguments", "## Properties", "## Paper", "## Differs from")
    return {f"the row of {name}": f"| [{name}](optimizers/{name}.md) | " in text("docs/update_rules.md"),
            **{f"{part!r} on the page optimizers/{name}.md": part in page for part in parts}}  # fmt: skip


def in_record(name):
    record = recorded_loops()
    return {
        f"the record of the loop {loop(name)} for {level}, {dtype}": any(
            re.fullmatch(rf"{loop(name)}(_loop\(.*\))? {dtype}", recorded) for recorded in record[level]
        )
        for level in record
        for dtype in (("float32",) if level == "v4 wide" else ("float32", "float64"))  # float64 has no narrow numbers
    }


def in_readme(name):
    rows = [line for line in text("README.md").splitlines() if line.startswith("| ")]
    return {f"`{name}` in the table of rules": any(f"`{name}`" in row for row in rows)}


def in_torch(name):
    found = nodes_of("adaptive_c/torch/__init__.py")
    classes = [node.name for node in found if isinstance(node, ast.ClassDef)]
    names = [node.value for node in found if isinstance(node, ast.Constant)]
    typed = re.search(rf"^class {name}\(", text("adaptive_c/torch/__init__.pyi"), re.M)
    return {f"class {name}": name in classes, f"{name!r} in __all__": name in names, f"{name} in __init__.pyi": typed}


PLACES = {  # in the order of CONTRIBUTING.md
    "adaptive_c/reference.py": in_reference,
    "src/rules.pxi, loop": in_loops,
    "src/rules.pxi, dispatch": in_dispatch,
    "adaptive_c/optimizers.py": in_optimizers,
    "tests/cases.py": in_cases,
    "tests/test_golden.py": in_golden,
    "docs/update_rules.md": in_docs,
    "benchmarks/instructions.json": in_record,
    "README.md": in_readme,
    "adaptive_c/torch/__init__.py": in_torch,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", RULES)
def test_every_rule_has_all_its_parts(name, place):
    if not (ROOT / place.partition(",")[0]).is_file():
        pytest.skip("not in a clone")
    missing = [part for part, found in PLACES[place](name).items() if not found]
    assert not missing, f"{name} is not complete: {place} lacks {'; '.join(missing)}"


def test_every_rule_of_the_reference_has_a_class():
    assert set(CLASSES) == set(optimizers.__all__) < set(ac.__all__)
    rules = {name for name, function in inspect.getmembers(reference, inspect.isfunction)
             if list(inspect.signature(function).parameters)[:4] == ["p", "g", "s", "t"]}  # fmt: skip
    assert rules == {spec(name).__name__ for name in CLASSES}


def test_the_bench_has_rows_of_every_rule():
    """Beside other libraries, and alone in the cache."""
    rows = {(row.group, row.task.rule) for row in suite.rows(suite.Settings())}
    assert {(group, name) for group in ("rules", "in cache") for name in CLASSES} <= rows


def test_every_option_of_every_rule_is_switched_on_in_a_case():
    for name in CLASSES:
        options = set(inspect.signature(getattr(ac, name).__init__).parameters) - {"self", "params", "shared"}
        used = set().union(*(case[2] for case in cases.CASES if case[1] == name))
        assert options - used <= {"eps", "rho", "betas", "momentum", "lr_decay"}, (name, options - used)


def test_the_chunk_of_the_tests_is_the_cores():
    opt = ac.SGD(np.zeros(CHUNK + 1))
    step_range(opt, np.zeros(CHUNK + 1), lo=CHUNK)
    with pytest.raises(ValueError, match=f"multiples of {CHUNK}"):
        step_range(opt, np.zeros(CHUNK + 1), lo=CHUNK // 2)


PAGES = [
    page.relative_to(ROOT)
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if "generated" not in page.parts
]  # those are the site's copies of others
DOORS = ("scipy", "sklearn", "ml_dtypes")  # which an example may import
# test_clients.py and test_mpi.py run these
CLIENTS = re.compile("import (transformers|lightning)|from (transformers|lightning|mpi4py)")


def blocks(page):
    """The examples of a page, but for those."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S) if (ROOT / page).is_file() else []
    return [block for block in found if not CLIENTS.search(block)]


def needed(block):
    """Which of these an example imports that the tests have later than the others."""
    return tuple(name for name in ("torch", "thinc") if re.search(rf"\b{name}\b", block))


@pytest.mark.parametrize(
    ("page", "needs"),
    [
        pytest.param(page, needs, marks=[pytest.mark.later(name) for name in needs], id=" ".join((str(page), *needs)))
        for page in PAGES
        for needs in sorted({(), *map(needed, blocks(page))})
    ],
)
def test_the_examples_of_the_pages(page, needs, capsys, tmp_path, monkeypatch):
    if not (ROOT / page).is_file():
        pytest.skip("not in a clone")
    monkeypatch.chdir(tmp_path)  # some save a file
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # and some would save when the process is stopped
    for block in blocks(page):
        if needed(block) == needs and all(
            importlib.util.find_spec(name) or not re.search(rf"\b{name}\b", block) for name in DOORS
        ):
            exec(compile(block, str(page), "exec"), {"__name__": "__main__"})


@pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not in a clone")
def test_the_project_stands_alone_and_has_no_open_ends():
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 120
    for folder in ("adaptive_c", "src", "tests", "docs", "benchmarks"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".pyx", ".pxi", ".md", ".pyi") and path != Path(__file__).resolve():
                text = path.read_text()
                assert "../shared" not in text, path
                assert not re.search(r"\bTODO\b|\bFIXME\b", text), path


def test_the_reference_imports_no_kernel():
    """Nor anything else to compute with: what is imported beside NumPy completes its docstrings."""
    used = {"reference.py": {"math", "numpy", "_formats", "_docstrings"}, "_formats.py": {"numpy"}}
    for name, allowed in used.items():
        tree = ast.parse(Path(inspect.getsourcefile(reference)).with_name(name).read_text())
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert names == allowed
    script = "import sys, adaptive_c.reference; print(*(x for x in sys.modules if x.startswith('adaptive_c')))"
    assert not {f"adaptive_c._{level}" for level in _native.LEVELS} & set(python("-c", script).stdout.split())
