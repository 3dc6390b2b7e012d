import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))]
# tests/test_docs.py compares what the guides print
EXAMPLES = [page for page in PAGES if not page.startswith(("docs/guide/", "docs/api/"))]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # the compiler's imports
@pytest.mark.filterwarnings("ignore:.*LeafSpec")  # Lightning on torch's newer pytree
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("page", EXAMPLES)
def test_examples_run(page):
    """One after the other, as a reader would."""
    names = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page):
    text = (ROOT / page).read_text()
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name
    for path in re.findall(r"`((?:docs|scripts|tests|torchref|triton_kernels)/[\w/]+\.\w+)`", text):
        assert (ROOT / path).exists(), path


def test_the_first_example_is_on_the_first_screen():
    assert README[: README.index("```python")].count("\n") < 15
    first = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    statements = [line for line in first.splitlines() if line and line[0] not in "#"]
    assert len(statements) <= 10


def test_it_says_what_would_fail():
    """The softmax without its maximum, as the README invites one to try."""
    from torchref.testing import assert_parity

    def my_softmax(x):
        return x.exp() / x.exp().sum(1, keepdim=True)

    with pytest.raises(AssertionError):
        assert_parity(my_softmax, lambda x: torch.softmax(x, 1), torch.randn(4, 10) * 100)


def test_every_file_of_a_piece_is_in_the_table():
    root = Path(__file__).parent.parent / "torchref"
    for folder in ("nn", "optim"):
        for path in (root / folder).glob("[a-z]*.py"):
            if path.name not in ("functional.py",):
                assert path.name in README, path.name
