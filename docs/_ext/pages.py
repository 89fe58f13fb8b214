"""Pages that are read on a forge as they are, as pages of the site.

- A link to a file that has a page of its own on the site (an example's script, a module, CONTRIBUTING.md) leads there.
- A page whose lists or tables begin their lines with links to pages is the table of contents of these.
- The page of a rule gets its picture.
"""

import os
import re
from pathlib import Path
from typing import Any

import generate

LINK = re.compile(r"(\]\()([^)#:\s]+)((?:#[^)\s]*)?\))")
ENTRY = re.compile(r"^(?:- |\| )\[[^\]]*\]\(([^)#:\s]+)\)", re.M)
CODE = re.compile(r"(^```.*?^```|`[^`\n]*`)", re.M | re.S)


def as_page(docname: str, text: str) -> str:
    """The text of a page with links that are right on the site, and with its table of contents."""
    page = generate.DOCS / docname
    origin = next((source for source, place in generate.COPIES.items() if place.with_suffix("") == page), page)

    def moved(match: re.Match[str]) -> str:
        target = (origin.parent / match[2]).resolve()
        target = generate.PLACES.get(target, target)
        return match[1] + os.path.relpath(target, page.parent) + match[3]

    text = "".join(part if part.startswith("`") else LINK.sub(moved, part) for part in CODE.split(text))
    entries = [str(Path(target).with_suffix("")) for target in dict.fromkeys(ENTRY.findall(text))
               if (page.parent / target).suffix in (".md", ".rst")]  # fmt: skip
    if entries and docname in CONTENTS:
        text += "\n\n```{toctree}\n:hidden:\n\n" + "\n".join(entries) + "\n```\n"
    return text


CONTENTS = ("index", "guide", "update_rules", "api", "developers")


def _read(app: Any, docname: str, source: list[str]) -> None:
    if app.env.doc2path(docname).suffix == ".md":
        source[0] = as_page(docname, source[0])


def setup(app: Any) -> dict[str, Any]:
    app.connect("source-read", _read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
