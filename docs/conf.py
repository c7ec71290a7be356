"""The site: `make docs` builds it from the pages of this folder and the docstrings."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # autodoc imports Keras and its backend

import polus

project = "Polus"
author = "The Polus developers"
version = release = polus.__version__

extensions = [
    "myst_nb",  # Markdown, and pages that are notebooks
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
html_theme = "furo"
html_title = f"Polus {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3  # links such as training.md#data

# Notebooks are run with each build; one that fails ends it.
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

# Docstrings name code in single backticks, as in Markdown.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signatures have the types
autodoc_default_options = {"members": True, "inherited-members": False}
napoleon_numpy_docstring = False
# A signature shows a default by its name, not by its value.
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
napoleon_use_ivar = True  # a named tuple's fields are described once
suppress_warnings = ["myst.header"]  # tables are written with headings of the third level
exclude_patterns = ["_build"]


def convert_fences(app, what, name, obj, options, lines):
    """Rewrites the Markdown code blocks of a docstring as reStructuredText, in place."""
    converted, inside = [], False
    for line in lines:
        if line.strip().startswith("```"):
            inside = not inside
            converted += ["", ".. code-block:: python", ""] if inside else [""]
        else:
            converted.append("    " + line if inside else line)
    lines[:] = converted


def setup(app):
    """Called by Sphinx. Before napoleon, which reads sections."""
    app.connect("autodoc-process-docstring", convert_fences, priority=400)
