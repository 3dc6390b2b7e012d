"""Run a piece forward and backward on a device, on few and on many numbers."""

import torch
from pieces import Piece
from torch import Tensor

N, K = 1009, 2003  # primes, which no block divides
CHANNELS = 31


def small(piece: Piece, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    with torch.device(device):
        return piece.inputs(dtype)


def large(piece: Piece, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Inputs of the kind that the piece takes, which need many programs."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    x = draw(N, K)
    inputs: tuple[Tensor, ...] = (x,)
    if piece.name == "linear":
        inputs = draw(N, 131), draw(257, 131), draw(257)
    elif piece.name in ("cross_entropy", "nll_loss"):
        target = torch.randint(0, K, (N,), generator=generator, device=device)
        target[::7] = -100
        inputs = x, target
    elif piece.name == "cross_entropy_probabilities":
        inputs = x, draw(N, K).softmax(1)
    elif piece.name == "binary_cross_entropy":
        inputs = x.sigmoid(), draw(N, K).sigmoid()
    elif piece.name in ("mse_loss", "l1_loss", "binary_cross_entropy_with_logits"):
        inputs = x, draw(N, K)
    elif piece.name.startswith("bias_act"):
        inputs = x, draw(K)
    elif piece.name.startswith("batch_norm_act"):
        # fewer: of two million sums one is so near to 0 that its rounding decides a ReLU
        x, added = draw(67, CHANNELS, 101) + 1, draw(67, CHANNELS, 101)
        inputs = x, added, draw(CHANNELS) + 1, draw(CHANNELS)
    elif piece.name.startswith("batch_norm"):
        inputs = draw(67, CHANNELS, 1013) + 1, draw(CHANNELS) + 1, draw(CHANNELS)
    return tuple(t.to(dtype).requires_grad_() if t.is_floating_point() else t for t in inputs)


def turned(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Other inputs of the same kind: each one's rows in the opposite order."""
    return tuple(x.detach().flip(0).requires_grad_(x.requires_grad) for x in inputs)


def upstream(f, inputs: tuple[Tensor, ...]) -> Tensor:
    """A gradient for the output of ``f``."""
    with torch.no_grad():
        return torch.randn_like(f(*inputs))


def run(f, inputs: tuple[Tensor, ...], dy: Tensor) -> list[Tensor]:
    """The output, and the gradients."""
    y = f(*inputs)
    gradients = torch.autograd.grad(y, [x for x in inputs if x.requires_grad], dy)
    return [y.detach(), *gradients]


def refill(inputs: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> None:
    """Put other numbers where the inputs lie."""
    with torch.no_grad():
        for x, value in zip(inputs, new, strict=True):
            x.copy_(value)


def assert_same(mine: list[Tensor], expected: list[Tensor], piece: Piece) -> None:
    """Equal bit for bit, but for what is the library's: it may choose another algorithm."""
    tolerance = {} if piece.name == "linear" else {"rtol": 0.0, "atol": 0.0}
    torch.testing.assert_close(mine, expected, **tolerance)
