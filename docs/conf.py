"""How `make docs` builds the pages of this folder. Every Markdown file beside it becomes a page.

Sphinx, since it reads the docstrings, treats every doubtful link or reference as an error (-W), and is alive;
MyST lets the pages be the Markdown that GitHub shows; furo reads well on a phone. Formulas become MathML, so that
no page loads anything from the network.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import capsroute

project = "capsroute"
author = "the capsroute authors"
version = release = capsroute.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "mathml"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
html_math_renderer = "mathml"
html_theme = "furo"
html_title = "capsroute"
html_show_sphinx = False
autodoc_typehints = "none"  # the docstrings give shapes and dtypes, which say more
exclude_patterns = ["_ext"]


def escape_bars(app, what, name, obj, options, lines):
    """|s| is a length in our docstrings, not a substitution of reStructuredText."""
    literal = False
    for k, line in enumerate(lines):
        literal = (literal and (not line or line.startswith(" "))) or (k > 0 and lines[k - 1].endswith("::"))
        lines[k] = line if literal else line.replace("|", r"\|")


def setup(app):
    app.connect("autodoc-process-docstring", escape_bars, priority=600)  # after napoleon
