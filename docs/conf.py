"""Sphinx configuration; `make docs` builds with warnings as errors."""

project = "fastweights"
author = "The fastweights developers"
extensions = ["myst_parser"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing", "toc.not_readable"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "fastweights"
