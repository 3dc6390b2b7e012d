"""The site: ``sphinx-build -W --keep-going -b html docs docs/_build/html``."""

import re

from docutils import nodes

import torchref

project = "torchref"
author = copyright = "the torchref contributors"
version = release = torchref.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

add_module_names = False
autodoc_default_options = {"members": True}
autodoc_inherit_docstrings = False  # what torch says of a method stands in torch's documentation
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # a module by its name, not with a path of this machine
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True

html_theme = "furo"
pygments_dark_style = "monokai"
html_title = "torchref"
html_theme_options = {  # lines of 92 characters fit
    "light_css_variables": {"code-font-size": "var(--font-size--small--3)"},
}
html_show_copyright = False
html_copy_source = False

TORCH_PAGE = re.compile(
    r"torch\.nn\.(functional\.\w+|[A-Z]\w+)|torch\.optim\.(?!Optimizer)[A-Z]\w+"
)


def find_reference(app, env, node, contnode):
    """Docstrings name ours as code does, where it stands (``softmax``), and torch's in full."""
    target = node.get("reftarget", "")
    if TORCH_PAGE.fullmatch(target):
        uri = f"https://docs.pytorch.org/docs/stable/generated/{target}.html"
        return nodes.reference("", "", contnode, internal=False, refuri=uri)
    if node.get("refdomain") != "py" or not target:
        return None
    found = [name for name in env.domains["py"].objects if name.endswith(f".{target}")]
    if len(found) != 1:
        return None
    return env.domains["py"].resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], found[0], node, contnode
    )


def make_parsable(app, what, name, obj, options, signature, returns):
    """A dataclass's ``<factory>`` is no expression, and its signature would be shown raw."""
    return (signature and signature.replace("<factory>", "..."), returns)


def setup(app):
    app.connect("autodoc-process-signature", make_parsable)
    app.connect("missing-reference", find_reference)
