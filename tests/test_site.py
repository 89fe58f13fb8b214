"""The pages as a forge shows them, and what the site is made of.  `.ci/run` builds the site itself."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in (*ROOT.glob("*.md"), *DOCS.rglob("*.md"), ROOT / "benchmarks" / "README.md")
               if "generated" not in path.parts)  # fmt: skip
SCRIPTS = sorted((DOCS / "gallery").glob("*.py"))
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.M | re.S)

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="not in a clone")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as forges and the site make them."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub(lambda match: match[0].strip("`"), page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_somewhere(page):
    broken = []
    for link in LINK.findall(CODE.sub("", page.read_text())):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        path = (page.parent / target).resolve() if target else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(link)
    assert not broken, f"{page}: {broken}"


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(script, marks=pytest.mark.later("torch") if "torch" in script.read_text() else ())
        for script in SCRIPTS
    ],
    ids=lambda script: script.stem,
)
def test_the_programs_of_the_gallery(script, tmp_path, monkeypatch):
    """The site runs them too, and shows what they draw."""
    text = script.read_text()
    for library in ("matplotlib", "scipy"):
        if library in text:
            pytest.importorskip(library)
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    monkeypatch.chdir(tmp_path)
    with mpl.rc_context():
        runpy.run_path(str(script), run_name="__main__")
    pyplot.close("all")
