import importlib
import os
import subprocess
import sys
import threading

import pytest
import torch
from pieces import PIECES

import torchref
import torchref.nn.functional as ours
from torchref import dispatch


@pytest.fixture
def compilations(monkeypatch):
    """The clones of formulas that were given to torch.compile."""
    made = []
    real = torch.compile

    def spy(function, **kwargs):
        made.append(function.__name__)
        return real(function, **kwargs)

    monkeypatch.setattr(torch, "compile", spy)
    return made


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
    dispatch._say_once.cache_clear()
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


@pytest.mark.parametrize("piece", PIECES, ids=lambda p: p.name)
def test_compiled_equals_torch(piece):
    if piece.random:
        return _test_compiled_mask(MASKED[piece.name])
    inputs = piece.inputs(torch.float32)
    xs = [x for x in inputs if x.requires_grad]
    expected = piece.theirs(*inputs)
    with torchref.backend("compiled"):
        y = piece.ours(*inputs)
        gradients = torch.autograd.grad(y.sum(), xs)
    # float32 roundings in another order: 8 eps of values near 1
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        gradients, torch.autograd.grad(expected.sum(), xs), rtol=1e-5, atol=1e-6
    )


MASKED = {
    "dropout": lambda x: ours.dropout(x, 0.3),
    "bias_act_dropout": lambda x: ours.bias_act_dropout(x - 1, torch.ones(100), 0.3),
}


def _test_compiled_mask(f):
    x = (torch.rand(100, 100) + 0.1).requires_grad_()
    with torchref.backend("compiled"):
        y = f(x)
        y.sum().backward()
    kept = y != 0
    assert kept.float().mean() == pytest.approx(0.7, abs=0.025)  # 5 standard deviations
    torch.testing.assert_close(y[kept], x[kept] / 0.7)
    assert torch.equal(kept, x.grad != 0)
    torch.manual_seed(3)
    with torchref.backend("compiled"):
        first = f(x)
        torch.manual_seed(3)
        assert torch.equal(first, f(x))


def test_compiled_serves_every_shape_and_scalar_with_one_compilation(compilations):
    shapes = [(3, 5), (5, 3), (8, 8), (2, 9), (64, 100), (17, 3), (300, 7), (2, 2), (9, 11), (6, 4)]
    with torchref.backend("compiled"):
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for number, shape in enumerate(shapes):
            x = torch.randn(shape)
            slope = 0.1 + number / 100
            torch.testing.assert_close(
                ours.leaky_relu(x, slope), torch.nn.functional.leaky_relu(x, slope)
            )
        after = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert len(compilations) <= 1
    assert after - before <= 3  # sizes are symbolic; Inductor guards on a range or two


def test_compiled_takes_many_kinds_of_input(compilations):
    """More kinds than Dynamo's limit of eight recompilations, and none of them runs eager."""
    kinds = [torch.randn(2, 3, 4, 5).to(dtype) for dtype in (torch.float32, torch.bfloat16)]
    kinds += [torch.randn((3,) * n) for n in range(6)]
    kinds += [torch.randn(3, 1), torch.randn(1, 3), torch.randn(1), torch.empty(0, 3)]
    kinds += [torch.randn(4, 6).t(), torch.randn(4, 6)[:, ::2], torch.randn(4, 1).expand(4, 3)]
    with torchref.backend("compiled"):
        for x in kinds:
            torch.testing.assert_close(ours.silu(x), torch.nn.functional.silu(x))
    assert len(compilations) > 8


def test_compiled_on_views_whose_memory_is_not_their_value():
    x = torch.randn(4, dtype=torch.complex64).conj().imag
    with torchref.backend("compiled"):
        assert torch.equal(ours.relu(x), torch.nn.functional.relu(x))


def test_compiled_in_place():
    for name in ("relu", "leaky_relu", "elu", "selu", "silu"):
        x = torch.randn(5, requires_grad=True)
        results = []
        for library in (ours, torch.nn.functional):
            with torchref.backend("compiled"):
                before = x * 1
                y = getattr(library, name)(before, inplace=True)
                assert y is before
            results.append((y, *torch.autograd.grad(y.sin().sum(), x)))
        torch.testing.assert_close(*results)
    with torchref.backend("compiled"):
        x = torch.randn(100, requires_grad=True)
        before = x * 1
        y = ours.dropout(before, 0.5, inplace=True)
        assert y is before
        y.sum().backward()
        assert torch.equal(x.grad != 0, y != 0)


def test_compiled_batch_norm_moves_the_statistics():
    pair = [library.BatchNorm1d(3, momentum=None) for library in (torchref.nn, torch.nn)]
    for _ in range(4):
        x = torch.randn(6, 3)
        with torchref.backend("compiled"):
            y = pair[0](x)
        torch.testing.assert_close(y, pair[1](x))
    for mine, torchs in zip(pair[0].buffers(), pair[1].buffers(), strict=True):
        torch.testing.assert_close(mine, torchs)


def test_importing_torchref_is_light():
    code = (
        "import sys, torchref, torch; bad = [m for m in ('lightning', 'triton.runtime', 'sklearn',"
        " 'torchref.triton_kernels') if m in sys.modules]; print(bad, torch.cuda.is_initialized())"
    )
    assert python(code).stdout.strip() == "[] False"
