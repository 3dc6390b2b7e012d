"""Data before it reaches a network: sets, splits and normalization."""

from torchref.data.datasets import Dataset as Dataset
from torchref.data.datasets import load_dataset as load_dataset
from torchref.data.datasets import read_features as read_features
from torchref.data.normalize import ImageNormalize as ImageNormalize
from torchref.data.normalize import MinMax as MinMax
from torchref.data.normalize import Robust as Robust
from torchref.data.normalize import Standard as Standard
from torchref.data.split import stratified_split as stratified_split
