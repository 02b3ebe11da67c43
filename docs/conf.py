"""The documentation site: `make docs` builds it, offline, with every warning an error."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import vision_remember  # noqa: E402

project = "vision-remember"
author = "The vision-remember authors"
copyright = author
version = release = vision_remember.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # "Attributes" beside annotated fields would be listed twice

html_theme = "furo"
html_title = f"vision-remember {version}"
copybutton_prompt_text = r"\$ "
copybutton_prompt_is_regexp = True
