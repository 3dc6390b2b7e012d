from torchref.optim.adam import Adam as Adam
from torchref.optim.adam import AdamW as AdamW
from torchref.optim.clip import clip_grad_norm_ as clip_grad_norm_
from torchref.optim.convert import convert as convert
from torchref.optim.convert import revert as revert
from torchref.optim.ema import ExponentialMovingAverage as ExponentialMovingAverage
from torchref.optim.rmsprop import RMSprop as RMSprop
from torchref.optim.sgd import SGD as SGD
