"""Pages that are read on a forge as they are, as pages of the site.

- A link to a file that has a page of its own on the site (an example's script, a module, CONTRIBUTING.md) leads there.
- Of the pages in CONTENTS, a link at the beginning of a row or an item is an entry of the table of contents.
- The page of a rule gets its picture, and a link to its class.
"""

import os
import re
from pathlib import Path
from typing import Any

import generate

CONTENTS = ("index", "guide", "update_rules", "api", "developers")  # pages that are tables of contents of others
LINK = re.compile(r"(\]\()([^)#:\s]+)((?:#[^)\s]*)?\))")
ENTRY = re.compile(r"^(?:- |\| )\[([^\]]*)\]\(([^)#:\s]+)\)", re.M)
CODE = re.compile(r"(^```.*?^```|`[^`\n]*`)", re.M | re.S)


def as_page(docname: str, text: str) -> str:
    """The text of a page with links that are right on the site, its table of contents and its picture."""
    page = generate.DOCS / docname
    origin = next((source for source, place in generate.COPIES.items() if place.with_suffix("") == page), page)

    def moved(match: re.Match[str]) -> str:
        target = (origin.parent / match[2]).resolve()
        target = generate.PLACES.get(target, target)
        return match[1] + os.path.relpath(target, page.parent) + match[3]

    text = "".join(part if part.startswith("`") else LINK.sub(moved, part) for part in CODE.split(text))
    if page.parent.name == "optimizers":
        text = text.replace("## At work\n", f"## At work\n\n{generate.at_work(page.name)}\n")
        text += f"\n[The class {page.name}](../generated/api/adaptive_c.{page.name}.rst) in the API.\n"
    entries = [f"{title.strip('`')} <{Path(target).with_suffix('')}>" for title, target in ENTRY.findall(text)]
    if docname in CONTENTS:
        text += "\n\n```{toctree}\n:hidden:\n\n" + "\n".join(entries) + "\n```\n"
    return text


def _read(app: Any, docname: str, source: list[str]) -> None:
    if app.env.doc2path(docname).suffix == ".md":
        source[0] = as_page(docname, source[0])


def setup(app: Any) -> dict[str, Any]:
    app.connect("source-read", _read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
