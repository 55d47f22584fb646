"""How Sphinx builds these pages: python -m sphinx -W -n -b html docs OUT."""

import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.util import logging

sys.path.insert(0, str(Path(__file__).parents[1]))

from jaxgrpo import __version__
from scripts.reference import PAGES

project = "jaxgrpo"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_math_renderer = "mathml"  # what browsers draw themselves: MathJax would come from a network
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_show_copyright = False
html_title = f"jaxgrpo {release}"
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 4  # as GitHub makes them

autodoc_typehints = "none"  # shapes and dtypes, which say more, stand in the docstrings
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # as they are written, not as they print
napoleon_numpy_docstring = False
napoleon_use_rtype = False  # what comes before a colon is no name of a type


def fill(app: Any, page: str, source: list[str]) -> None:
    """Puts generated text where a page asks for it, and stays among the pages."""
    source[0] = source[0].replace("](../SECURITY.md", "](security.md")
    source[0] = re.sub(r"<!-- generated: (\w+) -->", lambda m: PAGES[m[1]](), source[0])


def mark_code(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Makes literals of `code` in docstrings, which are written as Markdown has it."""
    lines[:] = [re.sub(r"`([^`]+)`", r"``\1``\\ ", line) for line in lines]


def formula(translator: Any, node: Any) -> None:
    """Writes a formula as MathML, or warns of a command that is not known.

    Raises:
      nodes.SkipNode: always, as nothing is left to write.
    """
    block = isinstance(node, nodes.math_block)
    written = convert(node.astext(), display="block" if block else "inline")
    if "\\" in written:
        logging.getLogger(__name__).warning("no MathML: %s", written, location=node)
    translator.body.append(written)
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
    app.connect("source-read", fill)
    app.connect("autodoc-process-docstring", mark_code)
