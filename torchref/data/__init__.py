"""Data before it reaches a network: sets, splits, folds, normalization and augmentation."""

from torchref.data.augment.image import ImageAugment as ImageAugment
from torchref.data.augment.image import mixup as mixup
from torchref.data.augment.tabular import TabularAugment as TabularAugment
from torchref.data.augment.tabular import smote as smote
from torchref.data.augment.text import TextAugment as TextAugment
from torchref.data.datasets import Dataset as Dataset
from torchref.data.datasets import load_dataset as load_dataset
from torchref.data.datasets import read_features as read_features
from torchref.data.datasets import read_texts as read_texts
from torchref.data.kfold import folds as folds
from torchref.data.kfold import mean_and_interval as mean_and_interval
from torchref.data.normalize import ImageNormalize as ImageNormalize
from torchref.data.normalize import Impute as Impute
from torchref.data.normalize import MinMax as MinMax
from torchref.data.normalize import Robust as Robust
from torchref.data.normalize import Standard as Standard
from torchref.data.split import chronological_split as chronological_split
from torchref.data.split import grouped_split as grouped_split
from torchref.data.split import random_split as random_split
from torchref.data.split import ratios_for as ratios_for
from torchref.data.split import stratified_split as stratified_split
from torchref.data.text import BagOfWords as BagOfWords
