"""What several functions ask of their arguments, and the words where they do not get it."""

from math import inf
from typing import Any

from torch import Tensor


def require_tensor(name: str, argument: str, x: Any) -> None:
    # torch.fx's proxies, and whatever else speaks torch's protocol, get as far as the next check
    if not (isinstance(x, Tensor) or hasattr(x, "__torch_function__")):
        raise TypeError(f"{name}: expected a tensor `{argument}`, got {type(x).__name__}")


def require_floating(name: str, x: Any, argument: str = "input") -> None:
    require_tensor(name, argument, x)
    if not x.is_floating_point():
        raise NotImplementedError(f"{name}: expected a floating point `{argument}`, got {x.dtype}")


def require_number(name: str, argument: str, x: Any) -> None:
    # NumPy's numbers and tensors of one element have the method, too; words and lists do not
    if not (isinstance(x, int | float) or hasattr(x, "__float__")):
        raise TypeError(f"{name}: expected a number `{argument}`, got {x!r}")


def require_constant(name: str, argument: str, x: Any) -> None:
    """A number of which no gradient is taken."""
    require_number(name, argument, x)
    if isinstance(x, Tensor) and x.requires_grad:
        raise TypeError(
            f"{name}: expected a number `{argument}`, which gets no gradient, got a "
            f"{type(x).__name__} that requires one"
        )


def require_finite(name: str, argument: str, x: Any) -> None:
    require_constant(name, argument, x)
    if not -inf < x < inf:
        raise ValueError(f"{name}: expected a finite `{argument}`, got {x}")


def require_share(name: str, argument: str, x: Any, error: type[Exception] = ValueError) -> None:
    require_constant(name, argument, x)
    if not 0.0 <= x <= 1.0:
        raise error(f"{name}: expected `{argument}` in [0, 1], got {x}")


def require_integer(name: str, argument: str, x: Any) -> None:
    if not (isinstance(x, int) or hasattr(x, "__index__")):
        raise TypeError(f"{name}: expected an integer `{argument}`, got {x!r}")
