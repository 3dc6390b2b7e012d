"""The pieces as functions, with the names and signatures of :mod:`torch.nn.functional`."""

from torchref.nn.softmax import log_softmax as log_softmax
from torchref.nn.softmax import softmax as softmax
