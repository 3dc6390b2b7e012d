"""What every test may take for granted.

Under ``TRITON_INTERPRET=1``: arithmetic as exact as torch's, and every kernel call between guards.
"""

import os

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = os.environ.get("TORCHREF_TEST_DEVICE")  # where tests make their tensors

if DEVICE is not None:
    torch.set_default_device(DEVICE)
    torch.backends.cudnn.allow_tf32 = False  # convolutions would have three digits

# Once in ten processes the first parallel exp in float64 has nine digits in its second half
# (torch 2.13, CPU); every later one has sixteen.
torch.zeros(10_000, dtype=torch.float64).exp()


def pytest_collectstart(collector):
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)  # parameters are drawn where a module is imported


if INTERPRETING:
    import numpy as np
    import triton.language as tl
    from kernel_guards import guarded
    from triton.runtime import interpreter

    from torchref import dispatch
    from torchref.optim import _one_launch

    find_kernel, truncating = dispatch.find_kernel, interpreter._convert_float

    def rounding(x, source, target, mode):
        """Triton's interpreter cuts a float32 down to bfloat16; a GPU rounds it to nearest even.

        And it takes a subnormal bfloat16 for another, larger number.
        """
        if (source, target) == (tl.bfloat16, tl.float32):
            return np.ascontiguousarray(x).view(np.uint16).astype(np.uint32) << 16
        if (source, target) != (tl.float32, tl.bfloat16):
            return truncating(x, source, target, mode)
        bits = np.ascontiguousarray(x).view(np.uint32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(x), 0x7FC0, nearest).astype(np.uint16)

    def exact(function):
        """NumPy's float32 is up to 4 units in the last place off, torch's and CUDA's 1."""
        return lambda self, x: interpreter.TensorHandle(
            function(x.data.astype(np.float64)).astype(x.data.dtype), x.dtype
        )

    interpreter._convert_float = rounding
    interpreter.InterpreterBuilder.create_exp = exact(np.exp)
    interpreter.InterpreterBuilder.create_log = exact(np.log)

    @pytest.fixture(autouse=True)
    def between_guards(monkeypatch):
        def find(module, name):
            kernel = find_kernel(module, name)
            return kernel and guarded(kernel)

        monkeypatch.setattr(dispatch, "find_kernel", find)
        monkeypatch.setattr(_one_launch, "find_kernel", find)
