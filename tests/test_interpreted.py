"""The parity suite once more, through the kernels, in processes of Triton's interpreter.

``TRITON_INTERPRET=1`` must be set before Triton is imported, so these tests start pytest anew, a
process for each file; under it the triton backend takes tensors on the CPU. To run one by hand:

    TRITON_INTERPRET=1 TORCHREF_BACKEND=triton python -m pytest tests/nn/test_softmax.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    *sorted((ROOT / "tests" / "nn").glob("test_*.py")),
    *sorted((ROOT / "tests" / "triton_kernels").glob("test_*.py")),
    ROOT / "tests" / "test_databases.py",
    ROOT / "tests" / "test_model.py",
    ROOT / "tests" / "test_opaque.py",
]
ENVIRONMENT = {**os.environ, "TRITON_INTERPRET": "1", "TORCHREF_BACKEND": "triton"}

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="already in the interpreter"
)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT / "tests")))
def test_through_the_kernels(path):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    result = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout.splitlines()[-1]
