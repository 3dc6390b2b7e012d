"""Training, validation and test indices."""

from collections.abc import Sequence

import torch
from torch import Tensor


def stratified_split(
    y: Tensor, ratios: Sequence[float] = (0.7, 0.15, 0.15), seed: int = 0
) -> tuple[Tensor, ...]:
    """Share samples out at random, with the proportions of the classes kept in every part.

    The last parts are rounded to whole samples and the first takes the rest, so the sizes add up.

    Args:
        y: (samples,) class of each sample.
        ratios: share of each part, at least two, each > 0, with sum 1.
        seed: the same seed gives the same parts.

    Returns:
        One tensor of shuffled indices into ``y`` for each ratio; together they hold each index
        once.

    Raises:
        ValueError: the ratios do not sum to 1, or a class or part is too small to be shared out.

    Example:
        >>> y = torch.tensor([0] * 50 + [1] * 50)
        >>> train, val, test = stratified_split(y)
        >>> len(train), len(val), len(test), len(y[val].unique())
        (70, 15, 15, 2)

    Source: the course, "Train, Dev, Test sets"; scikit-learn's ``train_test_split``.
    """
    from sklearn.model_selection import train_test_split

    if len(ratios) < 2 or min(ratios) <= 0 or abs(sum(ratios) - 1) > 1e-6:
        raise ValueError(
            f"stratified_split: expected positive `ratios` with sum 1, got {list(ratios)}"
        )
    rest = torch.arange(len(y)).numpy()
    parts = []
    for ratio in reversed(ratios[1:]):
        size = round(len(y) * ratio)
        try:
            rest, part = train_test_split(
                rest, test_size=size, random_state=seed, stratify=y[rest].numpy()
            )
        except ValueError as error:
            raise ValueError(
                f"stratified_split: {len(y)} samples do not share out: {error}"
            ) from None
        parts.append(torch.as_tensor(part))
    return torch.as_tensor(rest), *reversed(parts)
