"""The training primitives of a neural network, each proved against torch."""

from torchref import nn as nn
from torchref import optim as optim
from torchref import testing as testing
from torchref.convert import convert as convert
from torchref.convert import revert as revert
from torchref.dispatch import backend as backend
from torchref.dispatch import get_backend as get_backend
from torchref.dispatch import set_backend as set_backend
from torchref.tracing import Tracer as Tracer

__version__ = "0.1.0"
