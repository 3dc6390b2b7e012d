"""Every parity case on the GPU, through the kernels: the same files, in processes of their own.

``TORCHREF_TEST_DEVICE`` makes the device the default one, where tests then make their tensors. What
holds on a CPU alone is marked ``cpu`` in its file. To run one by hand:

    TORCHREF_TEST_DEVICE=cuda TORCHREF_BACKEND=triton python -m pytest tests/nn/test_softmax.py
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

import pytest

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
NO_KERNELS = {"test_init.py"}
INTERPRETER_ONLY = {"test_offsets.py", "test_planted_mistakes.py", "test_traffic.py"}
FILES = [
    *sorted(p for p in (TESTS / "nn").glob("test_*.py") if p.name not in NO_KERNELS),
    *sorted(
        p for p in (TESTS / "triton_kernels").glob("test_*.py") if p.name not in INTERPRETER_ONLY
    ),
    TESTS / "test_databases.py",
    TESTS / "test_model.py",
]
SECONDS = 420  # of the 8 minutes that everything may take

_running: dict[Path, tuple[subprocess.Popen, IO[str]]] = {}


def start(path: Path, **environment: str) -> None:
    """Run a file; where the device is the CPU, ``environment`` says so."""
    if path in _running:
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-m", "not slow and not gpu and not cpu", str(path)]
    chosen = {"TORCHREF_TEST_DEVICE": "cuda", "TORCHREF_BACKEND": "triton", **environment}
    output = tempfile.TemporaryFile("w+")  # noqa: SIM115  # a pipe would fill up and stop it
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **chosen}, stdout=output, stderr=subprocess.STDOUT
    )
    _running[path] = process, output


def finish(path: Path) -> tuple[int, str]:
    """The exit status, and all that was printed."""
    process, output = _running.pop(path)
    try:
        status = process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        status = process.wait()
    with output:
        output.seek(0)
        return status, output.read()


def stop() -> None:
    for process, output in _running.values():
        process.kill()
        process.wait()
        output.close()
    _running.clear()


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(TESTS).as_posix())
def test_on_the_gpu(path, record_property):
    start(path)
    status, output = finish(path)
    last = output.splitlines()[-1] if output else ""
    if status == pytest.ExitCode.NO_TESTS_COLLECTED:  # a library that it imports is missing
        pytest.skip(output[-2000:])
    assert status == 0, output[-8000:]
    record_property("cases", last)
    assert " passed" in last
