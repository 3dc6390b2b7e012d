"""The pieces as modules, drop-ins for those of :mod:`torch.nn`; each file holds one piece."""

from torchref.nn import functional as functional
from torchref.nn import init as init
from torchref.nn.activation import ELU as ELU
from torchref.nn.activation import GELU as GELU
from torchref.nn.activation import SELU as SELU
from torchref.nn.activation import LeakyReLU as LeakyReLU
from torchref.nn.activation import ReLU as ReLU
from torchref.nn.activation import Sigmoid as Sigmoid
from torchref.nn.activation import SiLU as SiLU
from torchref.nn.activation import Softplus as Softplus
from torchref.nn.activation import Tanh as Tanh
from torchref.nn.batch_norm import BatchNorm1d as BatchNorm1d
from torchref.nn.batch_norm import BatchNorm2d as BatchNorm2d
from torchref.nn.batch_norm import BatchNorm3d as BatchNorm3d
from torchref.nn.cross_entropy import CrossEntropyLoss as CrossEntropyLoss
from torchref.nn.cross_entropy import NLLLoss as NLLLoss
from torchref.nn.dropout import Dropout as Dropout
from torchref.nn.linear import Linear as Linear
from torchref.nn.linear_cross_entropy import LinearCrossEntropyLoss as LinearCrossEntropyLoss
from torchref.nn.loss import BCELoss as BCELoss
from torchref.nn.loss import BCEWithLogitsLoss as BCEWithLogitsLoss
from torchref.nn.loss import L1Loss as L1Loss
from torchref.nn.loss import MSELoss as MSELoss
from torchref.nn.softmax import LogSoftmax as LogSoftmax
from torchref.nn.softmax import Softmax as Softmax
