"""The three parts of a data set as Lightning asks for them."""

from collections.abc import Sequence
from typing import Literal

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from torchref.data.split import stratified_split
from torchref.training.checks import check_range

EVALUATION_BATCH = 1024


class ClassificationData(LightningDataModule):
    """Stratified training, validation and test parts of tensors held in memory.

    One argument chooses between the course's three forms of gradient descent: ``batch_size="full"``
    is batch, 1 is stochastic, anything between is mini-batch. The order of the samples is a
    function of ``seed`` and the epoch. With several processes, each trains on its share in batches
    of ``batch_size`` and evaluates the whole validation and test parts, so no score counts a
    sample twice; pass ``use_distributed_sampler=False`` to the Trainer.

    A last batch of a single sample is left out of its epoch: batch norm has no variance for it.

    Args:
        x: (samples, features).
        y: (samples,) labels.
        batch_size: >= 1, or ``"full"``.
        ratios: shares of the training, validation and test parts.
        seed: of the split and of the order.

    Raises:
        ValueError: an argument is out of its range, or a part would be too small.

    Example:
        >>> x, y = torch.zeros(100, 2), torch.arange(100) % 2
        >>> data = ClassificationData(x, y, batch_size=32)
        >>> [len(labels) for _, labels in data.train_dataloader()]
        [32, 32, 6]

    Source: the course, "Mini Batch Gradient Descent" and "Train, Dev, Test sets".
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        *,
        batch_size: int | Literal["full"] = 64,
        ratios: Sequence[float] = (0.7, 0.15, 0.15),
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_range(
            "batch_size", batch_size, ">= 1 or 'full'", batch_size == "full" or batch_size >= 1
        )
        parts = stratified_split(y, ratios, seed)
        self.train, self.val, self.test = (TensorDataset(x[part], y[part]) for part in parts)
        self.batch_size = batch_size
        self.seed = seed

    def train_dataloader(self) -> DataLoader:
        world_size = self.trainer.world_size if self.trainer else 1
        rank = self.trainer.global_rank if self.trainer else 0
        sampler = DistributedSampler(self.train, world_size, rank, shuffle=True, seed=self.seed)
        size = len(sampler) if self.batch_size == "full" else int(self.batch_size)
        alone = size > 1 and len(sampler) % size == 1
        return DataLoader(self.train, size, sampler=sampler, drop_last=alone)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, EVALUATION_BATCH)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, EVALUATION_BATCH)
