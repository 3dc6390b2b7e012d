"""The parity suite once more, through the kernels, in processes of Triton's interpreter.

``TRITON_INTERPRET=1`` must be set before Triton is imported, so these tests start pytest anew, a
process for each file; under it the triton backend takes tensors on the CPU. To run one by hand:

    TRITON_INTERPRET=1 TORCHREF_BACKEND=triton python -m pytest tests/nn/test_softmax.py
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    *sorted((ROOT / "tests" / "nn").glob("test_*.py")),
    *sorted((ROOT / "tests" / "triton_kernels").glob("test_*.py")),
    ROOT / "tests" / "test_databases.py",
    ROOT / "tests" / "test_model.py",
    ROOT / "tests" / "test_opaque.py",
]
# Of the optimizers' own tests those that reach a kernel: the rest are in float64, choose another
# backend or want torch's very bits. test_multi_tensor.py has every option in every type.
OPTIMIZERS = [
    "default-torch.float32",  # test_error_against_torchs_own
    "in_one_launch",
    "half_types",
    "the_scale_divides",
    "overflow",
    "max_norm_is_of_gradients",
    "come_back_from_torch",
    "state_dicts_keep",
    "sharded",
]
ENVIRONMENT = {**os.environ, "TRITON_INTERPRET": "1", "TORCHREF_BACKEND": "triton"}
ENVIRONMENT["OMP_NUM_THREADS"] = "1"  # the interpreter has one, and two processes run at a time

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="already in the interpreter"
)


@pytest.fixture(scope="module")
def outcomes(request):
    """Of the files that were asked for, two at a time."""
    chosen = [item.callspec.params["path"] for item in request.session.items if is_a_file(item)]
    with ThreadPoolExecutor(2) as pool:
        yield {path: pool.submit(run, str(path)) for path in chosen}
        pool.shutdown(cancel_futures=True)  # where one has failed under -x


def is_a_file(item):
    return getattr(item, "originalname", "") == "test_through_the_kernels"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT / "tests")))
def test_through_the_kernels(path, outcomes):
    outcomes[path].result()


def test_optimizers_through_the_kernels():
    run("tests/optim", "-k", " or ".join(OPTIMIZERS))


@pytest.mark.parametrize("marker", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_fuzz_through_the_kernels(marker, tmp_path, record_testsuite_property):
    report = tmp_path / "junit.xml"
    run("tests/test_fuzz.py", "-m", marker, f"--junitxml={report}")
    properties = [p.attrib for p in ElementTree.parse(report).iter("property")]
    tried = sum(int(p["value"]) for p in properties if p["name"] == "fuzz cases")
    assert tried > 0
    record_testsuite_property("fuzz cases", tried)


def run(*arguments: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout.splitlines()[-1]
