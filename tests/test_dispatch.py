import importlib
import os
import subprocess
import sys
import threading

import pytest
import torch

import torchref
import torchref.nn.functional as ours
from torchref import dispatch


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True
    )


def test_auto_is_the_formula_on_the_cpu(monkeypatch):
    monkeypatch.setattr(dispatch, "find_kernel", lambda *_: pytest.fail("looked for a kernel"))
    assert torchref.get_backend() == "auto"
    ours.relu(torch.ones(2))


def test_choices_nest_and_survive_errors():
    with torchref.backend("reference"):
        with pytest.raises(KeyError), torchref.backend("compiled"):
            raise KeyError
        assert torchref.get_backend() == "reference"
    assert torchref.get_backend() == "auto"


def test_a_choice_inside_a_block_holds_to_its_end():
    with torchref.backend("reference"):
        torchref.set_backend("compiled")
        with torchref.backend("auto"):
            pass
        assert torchref.get_backend() == "compiled"
    assert torchref.get_backend() == "auto"


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="expected one of auto.*got 'cuda'"):
        torchref.set_backend("cuda")
    process = python("import torchref", TORCHREF_BACKEND="gpu")
    assert "TORCHREF_BACKEND: expected one of auto" in process.stderr
    assert process.returncode == 1


def test_the_environment_chooses():
    code = "import torchref; print(torchref.get_backend())"
    assert python(code, TORCHREF_BACKEND="reference").stdout.strip() == "reference"


def test_triton_says_why_it_cannot_run(monkeypatch):
    for reason in ("no CUDA or ROCm device", "triton is not installed"):
        monkeypatch.setattr(dispatch, "why_no_kernels", lambda reason=reason: reason)
        with pytest.raises(RuntimeError, match=f"set_backend: .*cannot run here: {reason}"):
            torchref.set_backend("triton")
    monkeypatch.setattr(dispatch._process, "choice", "triton")
    monkeypatch.setattr(dispatch, "find_kernel", lambda *_: None)
    with pytest.raises(RuntimeError, match="relu_fwd: the triton backend cannot run it: triton is"):
        ours.relu(torch.ones(2))
    monkeypatch.setattr(dispatch, "why_no_kernels", lambda: None)
    with pytest.raises(RuntimeError, match="relu_fwd has no kernel yet"):
        ours.relu(torch.ones(2))
    monkeypatch.setattr(dispatch, "find_kernel", lambda *_: torch.relu)
    with pytest.raises(RuntimeError, match="expected tensors on a CUDA or ROCm device, got cpu"):
        ours.relu(torch.ones(2))


def test_reasons_without_a_gpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not installed" in dispatch.why_no_kernels()


def test_a_fallback_is_said_once(monkeypatch):
    find_kernel = dispatch.find_kernel.__wrapped__
    dispatch._say_no_kernels.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="formulas run instead.*triton is not installed"):
        assert find_kernel("softmax", "softmax_fwd") is None
    assert find_kernel("softmax", "softmax_bwd") is None  # warnings are errors here


def test_a_gpu_that_is_too_old_is_said_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla V100")
    dispatch._serves.cache_clear()
    with pytest.warns(UserWarning, match=r"Tesla V100 is older.*capability 8\.0"):
        assert not dispatch._serves(0)
    assert not dispatch._serves(0)
    dispatch._serves.cache_clear()


def test_what_kernels_take():
    x = torch.ones(2)
    assert dispatch.kernel_takes((x, None, 0.5))
    assert dispatch.kernel_takes((x.half(), torch.tensor([1]), True))
    for other in (x.double(), x.long(), x.bool(), x.to(torch.complex64), torch.empty(0)):
        assert not dispatch.kernel_takes((other,))
    assert not dispatch.kernel_takes((x, torch.empty(0, 3)))
    assert not dispatch.kernel_takes((x, x > 0))
    assert not dispatch.kernel_takes((x, torch.empty(2, device="meta")))


def test_backward_keeps_what_forward_chose(monkeypatch):
    """In whatever thread autograd runs it, and whatever the choice is by then."""
    seen = []

    def kernel(*args):
        seen.append((threading.get_ident(), dispatch.get_backend()))
        return torch.zeros_like(args[0])

    monkeypatch.setattr(dispatch, "find_kernel", lambda *_: kernel)
    monkeypatch.setattr(dispatch, "interprets", lambda: True)
    monkeypatch.setattr(dispatch._process, "choice", "triton")
    y = ours.sigmoid(torch.ones(2, requires_grad=True))
    monkeypatch.setattr(dispatch._process, "choice", "reference")
    thread = threading.Thread(target=lambda: y.sum().backward())
    thread.start()
    thread.join()
    assert [choice for _, choice in seen] == ["triton", "triton"]
    assert seen[0][0] != seen[1][0]
    assert torchref.get_backend() == "reference"


def test_find_kernel_knows_files_and_names():
    assert dispatch.find_kernel("no_such_piece", "f") is None
    assert dispatch.find_kernel("softmax", "no_such_function") is None


def test_importing_torchref_is_light():
    code = (
        "import sys, torchref, torch; bad = [m for m in ('lightning', 'triton.runtime', 'sklearn',"
        " 'torchref.triton_kernels') if m in sys.modules]; print(bad, torch.cuda.is_initialized())"
    )
    assert python(code).stdout.strip() == "[] False"
