"""The same bits again on a GPU, and under torch's flag for deterministic algorithms."""

import contextlib

import pytest
import torch
from pieces import PIECES
from running import large, run, upstream

import torchref

DEVICE = "cuda"
OPTIMIZERS = {
    "SGD": {"momentum": 0.9, "max_norm": 1.0},
    "RMSprop": {"centered": True, "momentum": 0.9},
    "Adam": {"amsgrad": True},
    "AdamW": {"max_norm": 1.0, "ema_decay": 0.9},
}

OURS = [piece for piece in PIECES if piece.name != "linear"]  # cuBLAS' may choose among algorithms

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def kernels(needs_a_gpu):
    with torchref.backend("triton"):
        yield


@contextlib.contextmanager
def strict():
    """New memory holds NaN, and what torch has no deterministic algorithm for raises."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_same_bits(some, others):
    for a, b in zip(some, others, strict=True):
        assert torch.equal(bits(a), bits(b))


def bits(x):
    """NaNs and the sign of 0 count."""
    return x.detach().contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("piece", OURS, ids=lambda p: p.name)
def test_a_piece_has_the_same_bits_again_and_under_the_flag(piece, dtype):
    inputs = large(piece, DEVICE, dtype)
    dy = upstream(piece.ours, inputs)

    def results():
        torch.manual_seed(0)
        return run(piece.ours, inputs, dy)

    first = results()
    for _ in range(3):
        assert_same_bits(results(), first)
    with strict():
        assert_same_bits(results(), first)


def stepped(name):
    """Parameters and states after three steps."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(n):
        return torch.randn(n, generator=generator, device=DEVICE)

    params = [torch.nn.Parameter(draw(n)) for n in (3, 1_000_003)]
    optimizer = getattr(torchref.optim, name)(params, lr=1e-2, **OPTIMIZERS[name])
    for _ in range(3):
        for p in params:
            p.grad = draw(p.numel())
        optimizer.step()
    states = [x for state in optimizer.state.values() for x in state.values()]
    return [*params, *(x for x in states if isinstance(x, torch.Tensor))]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_has_the_same_bits_again_and_under_the_flag(name):
    first = stepped(name)
    assert_same_bits(stepped(name), first)
    with strict():
        assert_same_bits(stepped(name), first)
