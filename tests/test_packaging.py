import ast
import importlib.metadata
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
# Each layer may import those after it. `data` stands apart.
LAYERS = [
    "scripts",
    "training",
    "diagnostics",
    "convert",
    "nn",
    "optim",
    "autograd",
    "dispatch",
    "triton_kernels",
]


def run(*command: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    target = tmp_path_factory.mktemp("wheel")
    source = target / "source"
    for pattern in (
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "torchref/**/*",
        "triton_kernels/**/*",
    ):
        for path in ROOT.glob(pattern):
            if path.is_file() and "__pycache__" not in path.parts:
                copied = source / path.relative_to(ROOT)
                copied.parent.mkdir(parents=True, exist_ok=True)
                copied.write_bytes(path.read_bytes())
    build = "from setuptools.build_meta import build_wheel; build_wheel('..')"
    result = run(sys.executable, "-c", build, cwd=source)
    assert result.returncode == 0, result.stderr
    (path,) = target.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_claims_only_torchref(wheel):
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == {"torchref"}
    (top_level,) = [n for n in wheel.namelist() if n.endswith("top_level.txt")]
    assert wheel.read(top_level).decode().split() == ["torchref"]
    assert wheel.filename.split("/")[-1].startswith("torchref_triton-")


def test_the_wheel_holds_every_file(wheel):
    expected = {
        str(
            Path("torchref", path.relative_to(ROOT))
            if path.parts[-2] == "triton_kernels"
            else path.relative_to(ROOT)
        )
        for folder in ("torchref", "triton_kernels")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {n for n in wheel.namelist() if n.endswith(".py")} == expected
    assert "torchref/py.typed" in wheel.namelist()
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_metadata():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == "torchref-triton"
    assert importlib.metadata.version("torchref-triton") == project["version"]
    import torchref

    assert torchref.__version__ == project["version"]


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ASKED = {  # each requirement by name, with its extra
    requirement.name: (extra, requirement)
    for extra, texts in {
        "": PROJECT["dependencies"],
        **PROJECT["optional-dependencies"],
    }.items()
    for requirement in map(Requirement, texts)
    if requirement.name != PROJECT["name"]
}
DISTRIBUTIONS = {
    "PIL": "pillow",
    "imblearn": "imbalanced-learn",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}


def test_malware_is_excluded():
    allowed = ASKED["lightning"][1].specifier
    assert "2.6.6" in allowed
    for version in ("2.6.2", "2.6.3", "2.6.5", "3.0"):  # 2.6.5 calls what a checkpoint names
        assert version not in allowed


def test_the_lock_fits_what_is_asked_for():
    lines = (ROOT / ".ci" / "constraints-cpu.txt").read_text().splitlines()
    locked = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    for name, (_, requirement) in ASKED.items():
        assert locked[name] in requirement.specifier, name


def test_licenses_are_listed():
    page = (ROOT / "docs" / "licenses.md").read_text()
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    listed = {row[0]: row[1:4] for row in rows if len(row) == 5 and row[0] in ASKED}
    assert list(listed) == list(ASKED)
    for name, (version, extra, license) in listed.items():
        assert extra == ASKED[name][0], name
        assert Requirement(f"{name}{version}").specifier == ASKED[name][1].specifier
        try:
            about = importlib.metadata.metadata(name)
        except importlib.metadata.PackageNotFoundError:  # of another extra
            continue
        text = about.get("License", "")
        is_expression = " AND " in text and "\n" not in text
        if expression := about.get("License-Expression", text if is_expression else None):
            assert license == expression, name
        else:  # free text and classifiers, as Apache 2.0 License
            said = [text, *about.get_all("Classifier", [])]
            if name == "torch":  # 2.11 names of its licenses one, which is not the first
                said.append(license if "BSD-3-Clause" in text else "")
            assert license.replace("-", " ").split()[0] in " ".join(said), name


def foreign(nodes) -> set[str]:
    """The distributions that are imported, but for Python's and ours."""
    ours = {"torchref", "benchmarks"}
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {n.module for n in nodes if isinstance(n, ast.ImportFrom) and not n.level and n.module}
    tops = {name.split(".")[0] for name in found} - sys.stdlib_module_names - ours
    return {DISTRIBUTIONS.get(name, name) for name in tops}


def test_what_is_imported_is_asked_for():
    for path in FILES:
        tree = ast.parse(path.read_text())
        unlisted = foreign([*ast.walk(tree)]) - ASKED.keys()
        assert unlisted <= {"nltk"}, path  # in no extra: where it is installed
        layer = path.relative_to(ROOT).parts[:2]
        if layer[0] == "scripts" or layer[1] in ("data", "diagnostics", "training"):
            continue
        assert {ASKED[name][0] for name in foreign(tree.body)} <= {""}, path


def imports(path: Path) -> set[str]:
    """The names of ours that a file imports, whole files and absolute names only."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {
        name for name in found if name.split(".")[0] in ("torchref", "triton_kernels", "lightning")
    }


def layer_of(name: str) -> str | None:
    parts = name.split(".")
    return next((p for p in parts[:2] if p in [*LAYERS, "data", "testing"]), None)


FILES = [
    p
    for folder in ("torchref", "triton_kernels", "scripts")
    for p in sorted((ROOT / folder).rglob("*.py"))
]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    own = layer_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for name in imports(path):
        assert not name.startswith("triton_kernels"), "installed as torchref.triton_kernels"
        if name.startswith("lightning"):
            assert own in ("training", "scripts"), name
            continue
        used = layer_of(name)
        if own == "triton_kernels":
            pytest.fail(f"a kernel file imports {name}")
        if own == "data":
            assert used in (None, "data"), name
        elif own in LAYERS and used in LAYERS:
            assert LAYERS.index(used) >= LAYERS.index(own), name


def test_the_module_prints_where_it_runs():
    result = run(sys.executable, "-m", "torchref", cwd=ROOT)
    assert result.returncode == 0, result.stderr
    for word in ("torchref", "torch", "triton", "backend", "auto: ", "name clashes: none"):
        assert word in result.stdout


def test_the_module_names_clashes(tmp_path):
    for name in ("torchref", "triton_kernels"):
        info = tmp_path / f"foreign_{name}-9.9.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: foreign-{name}\nVersion: 9.9\n"
        )
        (info / "top_level.txt").write_text(f"{name}\n")
        (info / "RECORD").write_text(f"{name}/__init__.py,,\n")
    result = run(
        sys.executable, "-m", "torchref", cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)}
    )
    assert "torchref: also installed by foreign-torchref 9.9" in result.stdout
    assert "triton_kernels: installed by foreign-triton_kernels 9.9" in result.stdout
