"""Formulas as MathML, which browsers typeset by themselves: no script, no font and no network is needed.

docutils translates LaTeX to MathML; a formula that it does not know is a warning, and so an error of the build.
"""

from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

log = logging.getLogger(__name__)


def _write(translator: Any, node: nodes.Element, *, block: bool) -> None:
    try:
        translator.body.append(tex2mathml(node.astext(), as_block=block))
    except MathError as error:
        log.warning("formula %r: %s", node.astext(), error, location=node)
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, Any]:
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(lambda self, node: _write(self, node, block=False), None),
        block_renderers=(lambda self, node: _write(self, node, block=True), None),
    )
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
