"""What only a GPU can show. Without one, each of these tests is skipped and says so."""

import pytest
import torch

from torchref import dispatch


@pytest.fixture(autouse=True)
def needs_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA or ROCm device")
    if reason := dispatch.why_no_kernels():
        pytest.skip(reason)


def pytest_collection_finish(session):
    """Start what runs in processes of its own, so that it runs beside everything else."""
    if torch.cuda.is_available() and not session.config.option.collectonly:
        for item in session.items:
            if item.path.name == "test_parity_gpu.py" and hasattr(item, "callspec"):
                item.module.start(item.callspec.params["path"])


def pytest_sessionfinish(session):
    for item in getattr(session, "items", []):
        if item.path.name == "test_parity_gpu.py":
            item.module.stop()
            return
