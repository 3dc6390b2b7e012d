import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_gpu.py"
SPEC = importlib.util.spec_from_file_location("check_gpu", SCRIPT)
check_gpu = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check_gpu)

SUITE = """
import time, warnings
import pytest

def test_passes(record_property):
    record_property("cases", "3 passed")

def test_fails():
    warnings.warn("a torch that is not known yet")
    assert 1 == 2, "not the same"

@pytest.mark.skip(reason="no second device")
def test_skipped():
    pass

@pytest.fixture
def broken():
    raise OSError("no such device")

def test_without_its_fixture(broken):
    pass
"""
SLOW = """
import subprocess, sys, time

def test_quick():
    pass

def test_slow():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open("child", "w").write(str(child.pid))
    time.sleep(600)

def test_later():
    pass
"""


@pytest.fixture
def run(tmp_path):
    """Run a suite as the GPU's is run."""

    def run(suite, seconds=60.0):
        (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
        (tmp_path / "test_suite.py").write_text(suite)
        return check_gpu.run([], seconds, dict(os.environ), tmp_path)

    return run


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """One with a GPU, on which a suite has run."""
    described = {"device": "NVIDIA H100 80GB HBM3", "date": "2026-11-24T20:00:00+00:00"}
    monkeypatch.setattr(check_gpu, "require_machine", lambda: None)
    monkeypatch.setattr(check_gpu, "describe", lambda: dict(described))

    def ran(counts, *failures):
        result = {"counts": counts, "failures": list(failures), "seconds": 61.2}
        monkeypatch.setattr(check_gpu, "run", lambda *_: result)
        return check_gpu.main(["--out", str(tmp_path / "gpu")])

    return ran


def test_without_a_gpu_it_says_so_in_one_line():
    result = subprocess.run(
        [sys.executable, SCRIPT],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "check_gpu: no CUDA or ROCm device\n"


@pytest.mark.parametrize("missing", ["torch", "triton", "pytest"])
def test_what_is_missing_is_named(monkeypatch, capsys, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == missing else find(n))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit) as stopped:
        check_gpu.main([])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"check_gpu: {missing} is not installed\n"


def test_outcomes_are_recorded(run):
    record = run(SUITE)
    assert record["counts"] == {"passed": 1, "failed": 2, "skipped": 1}
    failed, broken = record["failures"]
    assert failed["name"] == "test_suite.py::test_fails"  # by its assertion, not the warning
    assert any("AssertionError: not the same" in line for line in failed["lines"])
    assert any("OSError: no such device" in line for line in broken["lines"])
    assert record["skipped"] == {"test_suite.py::test_skipped": "Skipped: no second device"}
    assert record["cases"] == {"test_suite.py::test_passes": "3 passed"}
    assert set(record["durations"]) == {
        f"test_suite.py::test_{name}"
        for name in ("passes", "fails", "skipped", "without_its_fixture")
    }
    assert record["unfinished"] is None


@pytest.mark.parametrize("suite", ["import no_such_library", "def broken(", ""])
def test_a_suite_that_cannot_be_collected_is_a_failure(run, suite):
    record = run(suite)
    assert not record["counts"].get("passed")
    assert record["failures"]


def test_what_takes_too_long_is_killed_and_reported(run, tmp_path):
    start = time.monotonic()
    record = run(SLOW, 10.0)
    assert time.monotonic() - start < 30
    assert record["counts"] == {"passed": 1}
    assert record["unfinished"] == "test_suite.py::test_slow"
    assert record["failures"] == [
        {"name": "test_suite.py::test_slow", "lines": ["killed after 10 seconds"]}
    ]
    child = int((tmp_path / "child").read_text())
    for _ in range(100):  # a killed process takes a moment to be gone
        if not runs(child):
            break
        time.sleep(0.1)
    assert not runs(child)


def runs(process: int) -> bool:
    listed = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True)
    return listed.stdout.strip()[:1] not in (b"", b"Z")


def test_failures_come_first_and_the_counts_last(machine, capsys, tmp_path):
    failure = {"name": "tests/gpu/test_x.py::test_y", "lines": ["E  assert 1 == 2"]}
    assert machine({"passed": 5, "failed": 1}, failure) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert lines[0].startswith("device NVIDIA H100")
    assert lines[1:3] == ["FAILED tests/gpu/test_x.py::test_y", "E  assert 1 == 2"]
    path = tmp_path / "gpu" / "nvidia-h100-80gb-hbm3-2026-11-24.json"
    assert lines[-1] == f"5 passed, 1 failed, 0 skipped in 61 s; record in {path}"
    assert json.loads(path.read_text())["failures"] == [failure]


def test_the_exit_status(machine):
    assert machine({"passed": 5, "skipped": 2}) == 0
    assert machine({"skipped": 2}) == 1  # nothing was shown


def test_a_checkout_that_pip_cannot_install_is_imported_from_where_it_is(tmp_path):
    """In an isolated interpreter, where the editable installation of this one is not seen."""
    environment = {"PYTHONPATH": check_gpu.mapped_package()}
    code = (
        "import torchref.triton_kernels.dropout as d, torchref.dispatch as p; print(d.__file__);"
        "print(p.find_kernel('softmax', 'softmax_fwd'))"
    )
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.meta_path[:] = [f for f in sys.meta_path if "
            "'editable' not in repr(f).lower()];" + code,
        ],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    kernels = SCRIPT.parents[1] / "triton_kernels"
    assert result.stdout.splitlines()[0] == str(kernels / "dropout.py")
    assert "softmax_fwd" in result.stdout.splitlines()[1]
    assert check_gpu.imports_checkout(environment)
