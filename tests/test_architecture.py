"""What docs/architecture.md says: two lists of every file and what it uses, and no use of what is private elsewhere."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE, PACKAGE, SRC = ROOT / "docs" / "architecture.md", ROOT / "adaptive_c", ROOT / "src"
UNLISTED = re.compile(r"(bench|explore|figures)/|\w+/__init__$|(__init__|__main__|demo|ceiling)$")  # as the page says

pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="not in a clone")


def listed(title):
    """Each file of a list -> what it uses, and what of this stands in square brackets."""
    table, last = {}, None
    for line in re.search(rf"^{title}/\n(.*?)\n(?=\n|```)", PAGE.read_text(), re.M | re.S)[1].split("\n"):
        name, uses = re.fullmatch(r"(?:  (\S+) +(?:\S+ )*\S+)?  +(\S.*)", line).groups()
        last = name or last
        table[last] = f"{table.get(last, '')} {re.sub(r'[(].*?[)]', '', uses)}"  # other libraries are in parentheses
    short = {name.split("/")[1]: name for name in table if name.startswith(("_run/", "_checkpoint/"))}
    short |= {name: name for name in table}
    parts = {name: (uses, "".join(re.findall(r"\[.*\]", uses))) for name, uses in table.items()}
    return {
        name: [{short.get(x, x) for x in re.findall(r"[\w/]+", part)} for part in both] for name, both in parts.items()
    }


def imports(at_once=False):
    """Each module -> the modules that it imports, or only those that it imports when it is imported itself."""
    paths = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in PACKAGE.rglob("*.py")}
    found = {name: set() for name in paths}
    for name, path in paths.items():
        nodes = list(ast.walk(ast.parse(path.read_text())))
        later = {x for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
                 or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
                 for part in node.body for x in ast.walk(part)}  # fmt: skip
        for node in (x for x in nodes if isinstance(x, (ast.Import, ast.ImportFrom)) and not (at_once and x in later)):
            folder = ["adaptive_c", *name.split("/")][: -node.level] if getattr(node, "level", 0) else []
            for alias in node.names:  # `from x import y` is of x/y, if there is such a module, else of x
                whole = "/".join(filter(None, [*folder, getattr(node, "module", ""), alias.name])).replace(".", "/")
                top, _, path = whole.partition("/")
                places = [x + end for x in (path, path.rpartition("/")[0]) for end in ("", "/__init__")]
                found[name].update([x for x in places if top == "adaptive_c" and x in paths][:1])
    return {name: uses - {name, "__init__"} for name, uses in found.items()}


def mentions():
    """Each room -> the rooms whose functions, classes, structs, enums and constants it names, outside comments and strings."""
    texts, owner = {}, {}
    token = re.compile(r'f?(?:""".*?"""|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\')|#[^\n]*', re.S)
    for path in sorted(SRC.glob("[!_]*.pxi")):
        text = token.sub(lambda x: " ".join(re.findall(r"\{([^{}]+)", x[0] * (x[0][0] == "f"))), path.read_text())
        text = re.sub(r"^( +(?:cdef|cpdef|def) [^(\n]*?)\w+(?=\()", r"\1", text, flags=re.M)  # a method's own name
        text = re.sub(r"^cdef extern.*((?:\n(?: .*)?)*)", lambda x: re.sub(r"\n +", "\ncdef ", x[1]), text, flags=re.M)
        members = " ".join(re.findall(r"^cdef enum.*:(.*\n(?: .*\n|\n)*)", text, re.M))
        names = [
            *re.findall(r"^(?:cdef|cpdef|def) (?:\(.*?\) )?[^=(\n]*?\b(\w+)\(", text, re.M),
            *re.findall(r"^cdef (?:class|struct|enum) (\w+)", text, re.M),
            *re.findall(r"^(?:cdef \w+ )?([A-Z][A-Z_]+) = ", text, re.M),
            *re.findall(r"\b[A-Z]\w+", re.sub(r"=[^,\n]*", "", members)),
        ]
        owner |= dict.fromkeys(names, path.stem)
        texts[path.stem] = text
    # A local variable may be called like a function: a word in lower case counts if it is called, f(x) or f[float](x).
    words = {name: re.findall(r"(?<![.\w])(?:[a-z_]\w*(?=[(\[])|[A-Z]\w*)", text) for name, text in texts.items()}
    return {name: {owner[x] for x in words[name] if x in owner} - {name} for name in texts if name != "core"}


@pytest.mark.parametrize(("title", "uses"), [("adaptive_c", imports), ("src", mentions)])
def test_a_list_has_all_files_and_all_uses(title, uses):
    table, found = listed(title), uses()
    order = {name: i for i, name in enumerate(table)}
    wrong = [f"{name} is in no line" for name in found.keys() - table.keys() if not UNLISTED.match(name)]
    wrong += [f"{name} is in a line and does not exist" for name in table.keys() - found.keys()]
    for name in order.keys() & found.keys():
        says, marked = table[name]
        wrong += [f"{name} uses {x}, and its line does not say so" for x in found[name] - says]
        wrong += [f"{name} does not use {x}, which its line has" for x in says - found[name]]
        upwards = {x for x in found[name] & order.keys() if order[x] < order[name]}
        wrong += [f"{name} uses {x}, which is above it and in no brackets" for x in upwards - marked]
        wrong += [f"{name} uses {x}, which is below it and in brackets" for x in found[name] & marked - upwards]
    assert not wrong, "\n".join(sorted(wrong))


def test_no_import_closes_a_circle():
    graphlib.TopologicalSorter(imports(at_once=True)).prepare()  # its error names the circle


def test_the_rooms_are_included_as_they_are_listed():
    included = re.findall(r'^include "(\w+)\.pxi"', (SRC / "core.pxi").read_text(), re.M)
    assert included == [*reversed(listed("src")), "ceiling"]


def test_no_module_reaches_into_what_is_private_in_another():
    others = {"_asdict", "_replace", "_version", "_values", "_indices", "_disable_dynamo"}  # of namedtuples and torch's
    found = []
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        own |= {ast.unparse(node).rpartition(".")[2] for node in ast.walk(tree)
                if isinstance(getattr(node, "ctx", None), ast.Store)}  # fmt: skip
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr) and node.attr not in own | others:
                if ast.unparse(node.value) not in ("self", "cls") and node.attr != "_run":
                    found.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {ast.unparse(node)}")
            elif isinstance(node, ast.ImportFrom) and node.level:
                found += [f"{path.relative_to(PACKAGE)}:{node.lineno} {x.name}" for x in node.names
                          if re.match(r"_[^_]", x.name) and node.module]  # fmt: skip
    assert found == []
