import contextlib
import importlib
import inspect
import io
import re
import subprocess
import sys
from pathlib import Path

import draw_kernels
import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
GUIDES = sorted((DOCS / "guide").glob("*.md"))
PACKAGES = [
    ".".join(path.relative_to(ROOT).parent.parts) for path in ROOT.glob("torchref/**/__init__.py")
]
MODULES = [*PACKAGES, "torchref.nn.functional", "torchref.nn.init", "torchref.testing"]
SECTIONS = [
    "What is a Neural Network?",
    "How a neuron works?",
    "Why do we use activation functions?",
    "General structure of a neural network",
    "Forward propagation",
    "Backpropagation",
    "Multi Class Classification using Softmax regression",
    "Mini Batch Gradient Descent",
    "Exponentially weighted average",
    "Gradient Descent with momentum",
    "RMSProp",
    "Adam method for gradient descent",
    "Batch Normalization",
    "The vanishing gradient problem",
    "Normalizing inputs",
    "Weight initialization",
    "Hyperparameters of a neural network",
    "Overfitting in neural networks",
    "Train, Dev, Test sets for training a neural network",
    "Bias and variance of a model",
    "Regularization",
    "L1 and L2 regularization",
    "Drop out regularization",
    "Data augmentation",
    "Early stopping",
]
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)


def page_name(path):
    return str(path.relative_to(DOCS))


def public_names(module):
    """The functions and classes of ours that a module offers."""
    return [
        name
        for name, value in vars(importlib.import_module(module)).items()
        if (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__.startswith("torchref")
        and not name.startswith("_")
    ]


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_on_an_api_page(module):
    text = "".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    documented = re.findall(r"^\.\. auto(?:class|function):: (\S+)$", text, re.MULTILINE)
    missing = [n for n in public_names(module) if documented.count(f"{module}.{n}") != 1]
    assert not missing


def test_public_names_are_seen():
    """The test above says nothing where none are found."""
    assert {"softmax", "batch_norm"} <= set(public_names("torchref.nn.functional"))
    assert {"convert", "backend", "Tracer"} <= set(public_names("torchref"))
    assert "Tensor" not in public_names("torchref.nn.init")


def test_every_page_is_in_one_table_of_contents():
    entries = []
    for path in PAGES:
        for tree in re.findall(r"```\{toctree\}\n(.*?)```", path.read_text(), re.DOTALL):
            lines = [line for line in tree.split("\n") if line and line[0] != ":"]
            entries += [(path.parent / f"{line}.md").resolve() for line in lines]
    assert sorted([*entries, DOCS / "index.md"]) == PAGES


def anchors(path):
    """Of a page's headings, as GitHub and MyST make them."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.is_file(), target
        assert found.is_relative_to(DOCS), target  # what lies outside is not on the site
        assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_no_page_names_a_folder_of_the_machine_it_was_written_on(path):
    assert not re.search(r"(?<![\w.])/(?:work|tmp|home|root)\b", path.read_text())


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # the compiler's imports
@pytest.mark.filterwarnings("ignore:.*LeafSpec")  # Lightning on torch's newer pytree
@pytest.mark.parametrize("path", GUIDES, ids=page_name)
def test_blocks_print_what_the_page_shows(path):
    """One after the other in one namespace; what has no output beside it prints nothing."""
    names = {}
    for code, shown in BLOCK.findall(path.read_text()):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(path), "exec"), names)
        assert printed.getvalue() == shown


def test_every_section_of_the_course_has_a_row():
    rows = (DOCS / "guide" / "index.md").read_text()
    named = [line.split("|")[1] for line in rows.split("\n") if line.startswith("| ")]
    for section in SECTIONS:
        assert any(section in name for name in named), section
    for guide in GUIDES:
        assert guide.name == "index.md" or f"]({guide.name})" in rows, guide.name


def test_pictures_are_what_the_script_draws(tmp_path):
    draw_kernels.main(tmp_path)
    drawn = {path.name: png_size(path) for path in tmp_path.iterdir()}
    assert drawn == {path.name: png_size(path) for path in (DOCS / "kernels").iterdir()}
    shown = re.findall(r"!\[[^]]+\]\(kernels/(\S+)\)", (DOCS / "kernels.md").read_text())
    assert sorted(shown) == sorted(drawn)


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return data[16:24]


def test_the_site_builds_without_a_warning(tmp_path):
    for name in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(name, reason="pip install -e '.[docs]'")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    built = subprocess.run([*command, DOCS, tmp_path], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*.html")}
    for name, text in pages.items():
        assert str(ROOT) not in text, name  # as a default that is a module would show it
    assert 'class="math' in pages["api/functional.html"]
    softmax = "https://docs.pytorch.org/docs/stable/generated/torch.nn.Softmax.html"
    assert softmax in pages["api/nn.html"]
