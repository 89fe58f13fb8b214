"""The site: `python -m sphinx -W --keep-going -b html docs build/site`.

docs/ is also read as it is, on a forge; docs/_ext has what turns it into a site: pages.py the links and the tables of
contents, generate.py the pages that are made of code, mathml.py the formulas.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import generate

import adaptive_c

project = "adaptive_c"
author = "the authors of adaptive_c"
release = version = adaptive_c.__version__
extensions = [
    "sphinx.ext.autodoc", "sphinx.ext.autosummary", "numpydoc", "myst_parser", "sphinx_gallery.gen_gallery",
    "pages", "generate", "mathml", "attributes",
]  # fmt: skip
exclude_patterns = ["_ext", "gallery", "generated/scripts"]
nitpicky = True
nitpick_ignore_regex = [("py:obj", ".*")]  # `words` of docstrings that are not names
suppress_warnings = ["config.cache"]  # functions in sphinx_gallery_conf

myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 4
myst_highlight_code_blocks = True

autosummary_generate = False  # generate.py writes the pages that the tables lead to
autodoc_typehints = "none"
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
default_role = "autolink"

sphinx_gallery_conf = generate.GALLERY_CONFIG

html_theme = "pydata_sphinx_theme"
html_title = "adaptive_c"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {
    "header_links_before_dropdown": 8,
    "navbar_align": "left",
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": [],
    "footer_end": [],
    "show_prev_next": True,
}
html_sidebars = {"install": [], "quickstart": [], "questions": []}
