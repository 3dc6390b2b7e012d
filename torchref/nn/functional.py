"""The pieces as functions, with the names and signatures of :mod:`torch.nn.functional`."""

from torchref.nn.activation import elu as elu
from torchref.nn.activation import gelu as gelu
from torchref.nn.activation import leaky_relu as leaky_relu
from torchref.nn.activation import relu as relu
from torchref.nn.activation import selu as selu
from torchref.nn.activation import sigmoid as sigmoid
from torchref.nn.activation import silu as silu
from torchref.nn.activation import softplus as softplus
from torchref.nn.activation import tanh as tanh
from torchref.nn.batch_norm import batch_norm as batch_norm
from torchref.nn.batch_norm import batch_norm_act as batch_norm_act
from torchref.nn.bias_act_dropout import bias_act_dropout as bias_act_dropout
from torchref.nn.cross_entropy import cross_entropy as cross_entropy
from torchref.nn.cross_entropy import nll_loss as nll_loss
from torchref.nn.dropout import dropout as dropout
from torchref.nn.linear import linear as linear
from torchref.nn.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from torchref.nn.loss import binary_cross_entropy as binary_cross_entropy
from torchref.nn.loss import binary_cross_entropy_with_logits as binary_cross_entropy_with_logits
from torchref.nn.loss import l1_loss as l1_loss
from torchref.nn.loss import mse_loss as mse_loss
from torchref.nn.softmax import log_softmax as log_softmax
from torchref.nn.softmax import softmax as softmax
