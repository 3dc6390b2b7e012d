import pytest
import torch

from torchref import compilation
from torchref.optim import _update

_traced_variants = {}  # kept from test to test


@pytest.fixture(autouse=True)
def _compile_without_code_generation(request, monkeypatch):
    """Trace updates as :func:`torch.compile` does, but run the trace; ``inductor`` undoes it."""
    if "inductor" in request.fixturenames:
        return
    real = torch.compile

    def compile_(function, backend=None, **kwargs):
        return real(function, backend="aot_eager", **kwargs)

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(compilation, "_variants", _traced_variants)
    monkeypatch.setattr(_update, "BATCH", 3)  # soon traced, and the last batch is not full


@pytest.fixture
def inductor(monkeypatch):
    monkeypatch.setattr(compilation, "_variants", {})
    _update._padding.cache_clear()
    yield
    _update._padding.cache_clear()
