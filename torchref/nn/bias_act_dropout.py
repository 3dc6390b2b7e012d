"""What follows the matrix product of a hidden layer: bias, activation and dropout, in one pass."""

import math

import torch
from torch import Tensor

from torchref._checks import require_floating, require_share
from torchref.autograd import Function, opmath, rounded, summed
from torchref.dispatch import accelerated, will_run_kernel
from torchref.nn.activation import FUSED, checked_activation
from torchref.nn.dropout import drawn_mask, mask_of
from torchref.nn.linear import Linear, linear


class LinearActDropout(Linear):
    """A linear layer, its activation and dropout: a hidden layer of a multilayer perceptron.

    In place of ``Linear``, an activation and ``Dropout`` in a row, whose ``state_dict`` it takes
    (``weight`` and ``bias``); see :func:`bias_act_dropout`.

    Args:
        in_features, out_features, bias, device, dtype: as :class:`Linear`'s.
        activation, param: as in :func:`bias_act_dropout`.
        p: the probability of dropping an element, in training.

    Example:
        >>> hidden = torchref.nn.LinearActDropout(8, 16, activation="gelu", p=0.1)
        >>> hidden(torch.randn(4, 8)).shape
        torch.Size([4, 16])
    """

    activation = "relu"  # for a module that was another's when it was made
    param: float | None = None
    p = 0.0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        activation: str = "relu",
        param: float | None = None,
        p: float = 0.0,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        name = type(self).__name__
        checked_activation(name, activation, param)
        require_share(name, "p", p)
        self.activation, self.param, self.p = activation, param, p

    def forward(self, input: Tensor) -> Tensor:
        return bias_act_dropout(
            linear(input, self.weight),
            self.bias,
            self.p,
            self.training,
            activation=self.activation,
            param=self.param,
        )

    def extra_repr(self) -> str:
        given = "" if self.param is None else f", param={self.param}"
        return f"{super().extra_repr()}, activation={self.activation!r}{given}, p={self.p}"


def bias_act_dropout(
    input: Tensor,
    bias: Tensor | None = None,
    p: float = 0.0,
    training: bool = True,
    *,
    activation: str = "relu",
    param: float | None = None,
) -> Tensor:
    r"""Add a bias, apply an activation, and drop elements, in one pass over memory.

    With a mask :math:`m_i \sim \mathrm{Bernoulli}(1 - p)`, all ones outside training,

    .. math::
        u = x + b, \quad y = \frac{m}{1 - p} f(u)
        \qquad
        dx = \frac{m}{1 - p}\, dy\, f'(u), \quad db = \sum_{rows} dx

    Backward reads the upstream gradient and :math:`x` or, of a ReLU, the output, which is 0 where
    an element was dropped; the sum for the bias is made in the same pass. The mask is that of
    :func:`dropout`: on the CPU torch's own, bit for bit, from a seed in a Triton kernel.

    Args:
        input: floating point, shape (..., features).
        bias: shape (features,), or None for 0.
        p: the probability of dropping an element, in [0, 1].
        training: whether to drop.
        activation: :math:`f`, one of relu, leaky_relu, sigmoid, tanh, elu, selu, gelu, gelu_tanh
            and silu.
        param: the slope of leaky_relu (0.01 unless given) or the alpha of elu (1).

    Returns:
        A tensor of ``input``'s shape and type.

    Raises:
        ValueError: ``p`` is outside [0, 1], ``activation`` is none of these or has no ``param``.
        RuntimeError: ``bias`` has not one entry per feature.
        NotImplementedError: ``input`` is not floating point.

    Example:
        >>> x, b = torch.tensor([[1.0, -3.0]]), torch.tensor([0.5, 1.0])
        >>> torchref.nn.functional.bias_act_dropout(x, b)
        tensor([[1.5000, 0.0000]])

    Source: Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting",
    2014; in one pass: Shoeybi et al., "Megatron-LM", 2019.
    """
    name = "bias_act_dropout"
    require_share(name, "p", p)
    argument = checked_activation(name, activation, param)
    require_floating(name, input)
    features = input.shape[-1] if input.ndim else 1
    if bias is not None and bias.shape != (features,):
        raise RuntimeError(
            f"{name}: expected `bias` of shape ({features},) for `input` of shape "
            f"{tuple(input.shape)}, got {tuple(bias.shape)}"
        )
    # The Function sees rows and returns them, as in linear.
    rows = input.reshape(math.prod(input.shape[:-1]), features) if input.ndim != 2 else input
    drops = training and 0 < p < 1 and input.numel() > 0
    noise = _noise(input, rows.shape, float(p)) if drops else None
    share = float(p) if drops else 0.0
    y = BiasActDropoutFunction.call(rows, bias, noise, activation, argument, share)
    y = y if input.ndim == 2 else y.reshape(input.shape)
    return y * 0 if training and p == 1 else y  # times 0, so that a NaN stays one


class BiasActDropoutFunction(Function):
    """``noise`` is a mask that torch drew, or the seed that a mask follows from."""

    @staticmethod
    def forward(
        x: Tensor,
        bias: Tensor | None,
        noise: Tensor | None,
        activation: str,
        param: float,
        p: float,
    ) -> Tensor:
        return bias_act_dropout_fwd(x, bias, noise, activation, param, p)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, bias, noise, *ctx.options = inputs
        ctx.bias_dtype = x.dtype if bias is None else bias.dtype
        if ctx.options[0] == "relu":  # the output says it all
            ctx.save_for_backward(output, None, None)
        else:
            ctx.save_for_backward(x, bias, noise)

    @staticmethod
    def backward(ctx, dy):
        kept, bias, noise = ctx.saved_tensors
        activation, param, p = ctx.options
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        dx, dbias = bias_act_dropout_bwd(dy, kept, bias, noise, activation, param, p, wanted)
        dbias = None if dbias is None else dbias.to(ctx.bias_dtype)
        return dx, dbias, None, None, None, None


@accelerated("bias_act_dropout")
def bias_act_dropout_fwd(
    x: Tensor,
    bias: Tensor | None,
    noise: Tensor | None,
    activation: str,
    param: float,
    p: float,
) -> Tensor:
    """``x`` is (rows, features)."""
    y = FUSED[activation].fwd(_biased(x, bias), param)
    if noise is not None:
        y = y * (_mask(noise, x, p).to(y.dtype) / (1 - p))
    return rounded(y, x)


@accelerated("bias_act_dropout")
def bias_act_dropout_bwd(
    dy: Tensor,
    kept: Tensor,
    bias: Tensor | None,
    noise: Tensor | None,
    activation: str,
    param: float,
    p: float,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and, in float32, of the bias; ``kept`` is x, or the output of a ReLU."""
    dy32 = opmath(dy)
    if noise is not None:
        dy32 = dy32 * (_mask(noise, kept, p).to(dy32.dtype) / (1 - p))
    elif activation == "relu":  # whose output is 0 where an element was dropped
        dy32 = dy32 / (1 - p)
    dx = FUSED[activation].bwd(dy32, _biased(kept, bias), param)
    return rounded(dx, kept) if wanted[0] else None, summed(dx) if wanted[1] else None


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    return opmath(x) if bias is None else opmath(x) + opmath(bias)


def _noise(x: Tensor, rows: torch.Size, p: float) -> Tensor:
    """A seed, where a kernel will run, which makes the mask from it, or else the mask."""
    if will_run_kernel("bias_act_dropout", "bias_act_dropout_fwd", x):
        return torch.randint(2**63 - 1, (), device=x.device)
    return drawn_mask(x, p).reshape(rows)  # drawn as torch does, in the order of memory


def _mask(noise: Tensor, x: Tensor, p: float) -> Tensor:
    """The elements that stay; a row of a seed's mask begins with a number of its own."""
    if noise.dtype == torch.bool:
        return noise
    return mask_of(noise, x.shape, ((x.shape[1] + 3) // 4 * 4, 1), p)
