"""The site of the documents, which `make docs` builds into build/site, from the Markdown files as they lie.

`NAV` is the order in which a user needs the pages; a page that is not in it is an error of the build.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[2]
NAV = {
    "Begin": ["docs/install", "docs/tutorial", "A notebook <examples/notebook>", "docs/troubleshooting"],
    "Features": ["docs/teachers", "docs/datasets", "docs/costs", "docs/clusters"],
    "Students": ["docs/training", "docs/labels", "docs/recipes", "docs/trackers"],
    "Scores and use": ["docs/evaluation", "docs/segmentation", "docs/detection", "docs/reports", "docs/exports"],
    "Reference": ["docs/settings", "docs/cli", "docs/library", "docs/api", "The format <manifests/README>"],
    "Extend": ["docs/write_a_teacher", "docs/extend", "docs/beside_others", "CONTRIBUTING", "CHANGELOG"],
}

project = "dtpipe"
html_title = "dtpipe"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
root_doc = "README"
source_suffix = {".md": "markdown", ".ipynb": "markdown"}
include_patterns = ["*.md", "docs/*.md", "manifests/README.md", "examples/*.ipynb"]
exclude_patterns = [
    path.name for path in REPO.iterdir() if path.is_dir() and path.name not in ("docs", "manifests", "examples")
]
myst_heading_anchors = 3
default_role = "literal"
add_module_names = False
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_class_signature = "separated"
autodoc_default_options = {"exclude-members": "__init__, __new__"}  # nobody builds these classes

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_theme_options = {"top_of_page_buttons": []}


def markdown_of(_app: Any, docname: str, content: list[str]) -> None:
    """The navigation goes below the first page, where the repository's readers need none; a notebook becomes a page;
    messages are marked, so that they wrap.
    """
    if docname == root_doc:
        for title, pages in NAV.items():
            content[0] += "\n".join(["\n\n```{toctree}", ":hidden:", f":caption: {title}", "", *pages, "```"])
    elif docname == "docs/troubleshooting":
        content[0] = content[0].replace("```text\n", "```{code-block} text\n:class: message\n\n")
    elif docname == "examples/notebook":
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(content[0])["cells"]]
        content[0] = "\n\n".join(f"```python\n{text}\n```" if kind == "code" else text for kind, text in cells)


def name_the_first_page(app: Any, error: Exception | None) -> None:
    """Browsers and servers look for index.html."""
    if error is None and app.builder.format == "html":
        shutil.copy(Path(app.outdir, f"{root_doc}.html"), Path(app.outdir, "index.html"))


def setup(app: Any) -> None:
    app.connect("source-read", markdown_of)
    app.connect("build-finished", name_the_first_page)
