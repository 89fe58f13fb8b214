"""The figures that pages quote from the recorded run of the benchmarks: `benchmarks/record.py` writes them."""

import copy
import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "record.py"

pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="not in a clone")


@pytest.fixture(scope="module")
def record():
    spec = importlib.util.spec_from_file_location("record", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def results(record):
    return json.loads((ROOT / record.COPIED["json"]).read_text())


def test_pages_say_what_was_recorded(record, results):
    for page in record.PAGES:
        text = (ROOT / page).read_text()
        assert record.QUOTED.search(text), page
        assert record.quoted(text, results) == text, f"{page}: run benchmarks/record.py"
    # Elsewhere such a comment would be left as it is; and at the beginning of a line it would end the paragraph.
    for path in (ROOT / "docs").rglob("*.md"):
        if "generated" not in path.parts:
            assert "<!-- recorded" not in path.read_text() or str(path.relative_to(ROOT)) in record.PAGES
            assert not re.search(r"^\s*<!-- recorded .*?-->.", path.read_text(), re.M), path


def test_a_new_run_changes_every_figure(record, results):
    new = copy.deepcopy(results)
    for row in new["rows"]:
        for facts in row["contenders"].values():
            if "median" in facts and row["group"] != "import":
                facts["median"] *= 1.5
            for key in facts.get("times_ours", ()):
                facts["times_ours"][key] += 5
    new["environment"]["python"] = "3.99"
    for page in record.PAGES:
        text = (ROOT / page).read_text()
        for old, now in zip(
            record.QUOTED.finditer(text), record.QUOTED.finditer(record.quoted(text, new)), strict=True
        ):
            assert old[2] == now[2]
            if "no such rows" not in old[0]:
                assert old[0] != now[0]


def test_rules_rows_and_the_classes_for_tensors_are_shown_when_they_are_measured(record, results):
    def like(group, label, name):
        """A row that the run does not have, with the figures of another one."""
        row = next(copy.deepcopy(row) for row in results["rows"] if row["group"] == group)
        return {**row, "label": label, "contenders": {**row["contenders"], name: row["contenders"]["torch fused"]}}

    new = ("Yogi", "AdaBelief"), ("rows", "drop-in")
    results["rows"] = [row for row in results["rows"] if row["label"] not in new[0] and row["group"] not in new[1]]
    assert "Newer than the recorded run: Yogi and AdaBelief." in record.Record(results).rules()
    for rule in ("Yogi", "AdaBelief"):
        results["rows"] += [
            like("rules", rule, "torch fused"),
            {**like("rules", rule, "torch fused"), "group": "in cache"},
        ]
    rows = {**like("sizes", "AdamW, 8,192 of 2,000,000 rows", "torch SparseAdam"), "group": "rows"}
    tensors = {**like("lists", "20 arrays of 1,000", "adaptive_c.torch"), "group": "drop-in"}
    results["rows"] += [rows, tensors]
    found = record.Record(results)
    assert "| Yogi |" in found.rules()
    assert "Newer" not in found.rules()
    assert "torch SparseAdam" in found.table("rows")
    assert "adaptive_c.torch" in found.table("drop-in")
    assert "| 8,192 rows of 2,000,000 |" in found.honest()


def test_a_row_that_was_not_measured_is_no_error(record, results):
    assert record.quoted("x <!-- recorded longer; lists; 3 arrays; torch fused -->2<!-- end -->", results) == (
        "x <!-- recorded longer; lists; 3 arrays; torch fused -->(not in the recorded run)<!-- end -->"
    )
    with pytest.raises(ValueError, match="there is no quotation 'slower'; there are ratio, longer"):
        record.quoted("<!-- recorded slower; lists -->2<!-- end -->", results)


def test_a_run_is_copied_and_quoted(record, results, tmp_path, monkeypatch):
    folder, root = tmp_path / "run", tmp_path / "clone"
    for part in (folder, root / "benchmarks", root / "docs"):
        part.mkdir(parents=True)
    results["environment"]["processor"] = "Another processor"
    (folder / "adaptive-c-bench.json").write_text(json.dumps(results))
    for name in (".md", "-sizes.png", "-roofline.png"):
        (folder / f"adaptive-c-bench{name}").write_text(name)
    for page in record.PAGES:
        (root / page).write_text((ROOT / page).read_text())
    monkeypatch.setattr(record, "ROOT", root)
    monkeypatch.setattr("sys.argv", ["record.py", str(folder)])
    record.main()
    assert "Another processor" in (root / "README.md").read_text()
    assert (root / "docs" / "performance-roofline.png").read_text() == "-roofline.png"
    assert (root / "benchmarks" / "recorded.md").read_text() == ".md"
