from torchref.nn import functional as functional
from torchref.nn.softmax import LogSoftmax as LogSoftmax
from torchref.nn.softmax import Softmax as Softmax
