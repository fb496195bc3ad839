"""Settings of Sphinx for `make docs`. The source folder is the whole tree: pages link to READMEs outside of this folder."""

from __future__ import annotations

from orchestrator import __version__

project = "NoHype orchestrator"
copyright = "NoHype orchestrator developers"
release = __version__

extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "ansible/README.md", "benchmarks/README.md", "examples/README.md", "tests/README.md"]

myst_heading_anchors = 4
# most blocks are transcripts, not programs
highlight_language = "none"

html_theme = "furo"
html_title = f"NoHype {release}"
html_extra_path = ["_redirect"]
html_copy_source = False
html_show_sourcelink = False
# pages of the same commit are the same
html_last_updated_fmt = None
