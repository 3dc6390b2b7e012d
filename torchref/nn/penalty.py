"""L1 and L2 penalties on the weights of a module, to be added to its loss."""

import torch
from torch import Tensor

from torchref._checks import require_number

NORMALIZATION = (torch.nn.LayerNorm, torch.nn.RMSNorm)  # others' gains have one dimension


def weight_penalty(module: torch.nn.Module, l1: float = 0.0, l2: float = 0.0) -> Tensor:
    r"""The L1 and L2 terms of a cost.

    .. math::
        \lambda_1 \sum_w |w| + \lambda_2 \sum_w w^2, \qquad
        \frac{\partial}{\partial w} = \lambda_1 \operatorname{sign}(w) + 2 \lambda_2 w

    where w runs over the weights: parameters of two dimensions or more that neither belong to a
    normalization layer nor have "bias" in their own name. Under plain SGD, :math:`\lambda_2` is
    **half** of the ``weight_decay`` that does the same, whose gradient is ``weight_decay * w``. At
    w = 0 the gradient of the absolute value is 0.

    Args:
        module: whose parameters are penalized; a shared parameter counts once.
        l1: :math:`\lambda_1`, finite, >= 0.
        l2: :math:`\lambda_2`, finite, >= 0.

    Returns:
        A scalar of the weights' type; 0 where nothing is penalized.

    Raises:
        ValueError: a coefficient is out of its range.
        TypeError: ``module`` is none, but for instance its parameters.

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> _ = torch.nn.init.constant_(layer.weight, 3.0)
        >>> torchref.nn.weight_penalty(layer, l1=0.5, l2=0.1)
        tensor(4.8000, grad_fn=<AddBackward0>)

    Source: the course, "L1 and L2 regularization".
    """
    for name, value in (("l1", l1), ("l2", l2)):
        require_number("weight_penalty", name, value)
        if not 0 <= value < float("inf"):
            raise ValueError(f"weight_penalty: expected `{name}` finite and >= 0, got {value}")
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"weight_penalty: expected a module `module`, got {type(module).__name__}")
    weights = _weights(module) if l1 or l2 else []
    terms = [l1 * w.abs().sum() for w in weights] if l1 else []
    terms += [l2 * w.square().sum() for w in weights] if l2 else []
    if terms:
        return sum(terms[1:], terms[0])
    return next(module.parameters(), torch.empty(())).new_zeros(())  # made on its device


def _weights(module: torch.nn.Module) -> list[Tensor]:
    weights = {}  # by identity, so a shared one is there once
    for owner in module.modules():
        if not isinstance(owner, NORMALIZATION):
            for name, p in owner.named_parameters(recurse=False):
                if p.ndim > 1 and "bias" not in name:
                    weights[id(p)] = p
    return list(weights.values())
