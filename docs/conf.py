"""Sphinx configuration: ``sphinx-build -W docs docs/_build/html``. Needs no network."""

import importlib
import inspect
import os
import re
import sys
import types
from collections import defaultdict
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert as tex_to_mathml
from sphinx.util import logging

os.environ.setdefault("KEOPS_VERBOSE", "0")
os.environ.setdefault("MPLBACKEND", "Agg")
sys.path.insert(0, str(Path(__file__).parent))  # figures.py

import dualgp

logger = logging.getLogger(__name__)

project = "dualgp"
author = "The dualgp developers"
project_copyright = author
version = release = dualgp.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
    "figures",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"dualgp {release}"
html_math_renderer = "mathml"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/favicon.svg"

myst_enable_extensions = ["amsmath", "dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

highlight_language = "text"  # what is Python says so
default_role = "code"  # single backticks in docstrings are code

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Source", "notes_style")]

# Numbered scripts run at build time, in order; an example that fails, fails the build.
sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "tutorials",
    "filename_pattern": r"/\d\d_\w+\.py$",
    "ignore_pattern": r"/(?!\d\d_)[^/]*\.py$",
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "copyfile_regex": r".*\.rst",
    "show_signature": False,
    "remove_config_comments": True,
    "plot_gallery": "True",
    "capture_repr": (),  # what a cell prints, and its figures
    "image_scrapers": ("figures.scrape",),
}

# What a class has from a base of this package is its own; what it has from torch and Python is not.
AUTOCLASS = ["   :members:", "   :inherited-members: Module, tuple, ABC, Generic", "   :show-inheritance:"]


def public_api() -> str:
    """The names in ``dualgp.__all__`` as autodoc directives, grouped by where they are defined."""
    groups = defaultdict(list)

    def collect(module):
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if isinstance(value, types.ModuleType):
                collect(value)
                continue
            if inspect.isclass(value):
                kind = "autoexception" if issubclass(value, Exception) else "autoclass"
            else:
                kind = "autofunction" if callable(value) else "autodata"
            home = getattr(value, "__module__", module.__name__).split(".")[:2]
            groups[".".join(home)].append((kind, f"{module.__name__}.{name}"))

    collect(dualgp)
    lines = ["```{eval-rst}", ".. automodule:: dualgp", "   :no-members:", "```", ""]
    for home in sorted(groups):
        title = (inspect.getdoc(importlib.import_module(home)) or home).splitlines()[0]
        lines += [f"## {home}", "", title if title != home else "", "", "```{eval-rst}"]
        for kind, name in groups[home]:
            lines += [f".. {kind}:: {name}"]
            lines += AUTOCLASS if kind == "autoclass" else []
            lines += [""]
        lines += ["```", ""]
    return "\n".join(lines)


def fill_in_api(app, docname, source):
    if docname == "api":
        source[0] = source[0].replace("<!-- public names -->", public_api())


def plain_docstring(app, what, name, obj, options, lines):
    """Let docstrings be written for the terminal: shapes like [*batch, N] and |LLᵀ| are no markup.

    Escapes what reStructuredText would read as emphasis, substitution or reference; leaves code in
    backticks, doctests and literal blocks alone; turns a Markdown table into one of its own.
    """
    written = []
    literal = None  # the indent of the line that opened a literal block
    doctest = table = False
    for line in lines:
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        if literal is not None and text and indent <= literal:
            literal = None
        doctest = bool(text) and (doctest or text.startswith(">>>"))
        if literal is None and not doctest and text.startswith("|") and text.endswith("|"):
            pad = " " * indent
            if not table:
                written += [f"{pad}.. list-table::", f"{pad}   :header-rows: 1", ""]
            if set(text) - set("|-: "):
                cells = [escape(cell.strip()) for cell in re.split(r"(?<!\\)\|", text)[1:-1]]
                marks = ["* -"] + ["  -"] * (len(cells) - 1)
                written += [f"{pad}   {mark} {cell}" for mark, cell in zip(marks, cells, strict=True)]
            table = True
            continue
        if table and text:
            written.append("")
        table = False
        written.append(line if doctest or literal is not None else escape(line))
        if text.endswith("::") and not doctest and literal is None:
            literal = indent
    lines[:] = written


def escape(line):
    parts = re.split(r"(`+[^`]*`+)", line)  # every second part is in backticks
    parts[::2] = [re.sub(r"(\*|\||(?<=\w)_(?!\w))", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


# A function's name before what is no bracket: browsers leave no space there.
WORD = re.compile(r"(<mi>(?:log|exp|max|min)</mi>)(?=<m(?:i|row|sub|sup|subsup|frac)>|<mo>&#x0222B;)")


def draw_math(as_block):
    """A visitor that writes a formula as MathML, which browsers draw by themselves."""

    def visit(self, node):
        # The converter numbers align and does not know aligned.
        tex = re.sub(r"\\(begin|end)\{(align|gather)(ed)?\}", r"\\\1{\2*}", node.astext())
        formula = tex_to_mathml(tex, display="block" if as_block else "inline")
        formula = WORD.sub(r'\1<mspace width="0.17em"/>', formula)
        if unknown := re.findall(r">\s*(\\\w+)", formula):
            logger.warning("math: unknown %s in %r", ", ".join(unknown), tex, location=node)
        if as_block:
            formula = f'<div class="math" style="overflow-y: hidden">{formula}</div>'
        self.body.append(formula)
        raise nodes.SkipNode

    return visit


def report_missing(app, env, node, contnode):
    """Warn of a name that a page refers to and the API does not have; types in docstrings go without a link."""
    if node.get("refdomain") == "py" and node.get("refdoc") != "api":
        logger.warning("no such name in the API: %s", node.get("reftarget"), location=node)


def lead_back(app, pagename, templatename, context, doctree):
    """Let "[docs]" beside a source lead to where its object stands in the API, under the name that it is public by."""
    if not pagename.startswith("_modules/"):
        return
    objects = app.env.get_domain("py").objects
    module = pagename.removeprefix("_modules/").replace("/", ".")

    def anchor(match):  # the name may be that of the package which the source is in
        name = match[2].rpartition(".")[2]
        places = (match[2], f"{module}.{name}", f"{module.rpartition('.')[0]}.{name}")
        entry = next((objects[place] for place in places if place in objects), None)
        return match[1] + (entry.node_id if entry else match[2])

    context["body"] = re.sub(r'(viewcode-back" href="[^"#]*#)([\w.]+)', anchor, context["body"])


def setup(app):
    app.connect("html-page-context", lead_back)
    app.connect("missing-reference", report_missing)
    app.connect("source-read", fill_in_api)
    app.connect("autodoc-process-docstring", plain_docstring, priority=400)  # before napoleon
    app.add_html_math_renderer("mathml", (draw_math(False), None), (draw_math(True), None))
