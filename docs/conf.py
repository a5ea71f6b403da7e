"""The documentation site: `make docs`. What it needs is in the package and in this directory; no network is used."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

import pyworkflow_ray  # noqa: E402

project = "pyworkflow-ray"
author = "The pyworkflow-ray developers"
release = version = pyworkflow_ray.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_click",
    "docstrings",
    "from_code",
    "state_diagram",
]
exclude_patterns = ["_ext", "_static"]

# Markdown as GitHub shows it: headings can be linked to, links go to files.
myst_heading_anchors = 3
myst_links_external_new_tab = False

# Docstrings: Google form, single backticks for code. Signatures stay as they are written.
default_role = "literal"
smartquotes = False  # --option stays --option
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True
add_module_names = False

html_theme = "pydata_sphinx_theme"
html_title = f"pyworkflow-ray {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "logo": {"text": "pyworkflow-ray"},
    "navbar_align": "left",
    "show_prev_next": True,
    "show_toc_level": 2,
    "footer_start": ["last-updated"],
    "footer_end": [],
    "navbar_end": ["theme-switcher"],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_sidebars = {"index": [], "tutorial": []}
