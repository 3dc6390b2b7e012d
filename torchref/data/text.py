"""Texts as rows of numbers, fitted on the training split, and a small set of texts with labels."""

import csv
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any, Self

import torch
from torch import Tensor, nn

from torchref.data.normalize import Fitted

TERM = re.compile(r"\b\w\w+\b")  # scikit-learn's default: letters and digits, two or more


class BagOfWords(Fitted):
    r"""Each text as the weights of its words, tf-idf, with Euclidean length 1.

    .. math::
        x_t = \frac{\mathrm{tf}_t \, \mathrm{idf}_t}
                   {\sqrt{\sum_s (\mathrm{tf}_s \, \mathrm{idf}_s)^2}}, \quad
        \mathrm{idf}_t = \ln \frac{1 + n}{1 + \mathrm{df}_t} + 1

    where the text has the term t tf times, and df of the n training texts have it. Terms are words
    of two characters or more, in lowercase. A text without a known word becomes a row of zeros.

    What it learns are buffers, ``vocabulary`` (the terms in UTF-8, one a line, as bytes) and
    ``idf``, so they move, are saved and are loaded with the module that holds this one.

    Args:
        features: how many terms to keep, the most frequent of the training split; of equally
            frequent ones the first in the alphabet. At least 1.

    Raises:
        ValueError: ``features`` is below 1.

    Example:
        >>> words = BagOfWords().fit(["good film", "bad film"])
        >>> words.terms
        ['bad', 'film', 'good']
        >>> words(["A good film!", "unknown"])
        tensor([[0.0000, 0.5797, 0.8148],
                [0.0000, 0.0000, 0.0000]])

    Source: scikit-learn's ``TfidfVectorizer``; Salton and Buckley, "Term-weighting approaches in
    automatic text retrieval", 1988.
    """

    names = ("vocabulary", "idf")
    vocabulary: Tensor | None
    idf: Tensor | None

    def __init__(self, features: int = 2000) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"BagOfWords: expected `features` of at least 1, got {features}")
        self.features = features
        self._columns: dict[str, int] | None = None  # term -> column, read from `vocabulary`

    def fit(self, data: Iterable[str]) -> Self:
        """Take the terms and their weights from the training split, once.

        Args:
            data: texts.

        Raises:
            RuntimeError: it is fitted already; a second fit is how test data leaks into training.
            ValueError: there is no text, or no word in any.
            TypeError: ``data`` is one string, or holds something else than strings.
        """
        self._check_fitted(False)
        count, frequency, documents = 0, Counter[str](), Counter[str]()
        for terms in _terms(data):
            count += 1
            frequency.update(terms)
            documents.update(set(terms))
        if not frequency:
            raise ValueError(
                f"BagOfWords: expected a word of two characters or more, got none in {count} texts"
            )
        by_frequency = sorted(frequency, key=lambda term: (-frequency[term], term))
        kept = sorted(by_frequency[: self.features])
        self.vocabulary = torch.tensor(list("\n".join(kept).encode()), dtype=torch.uint8)
        self.idf = torch.tensor([math.log((1 + count) / (1 + documents[t])) + 1 for t in kept])
        return self

    @property
    def terms(self) -> list[str]:
        """The terms, in alphabetical order, as their columns are.

        Raises:
            RuntimeError: it is not fitted.
        """
        self._check_fitted(True)
        assert self.vocabulary is not None
        return bytes(self.vocabulary.tolist()).decode().split("\n")

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Weights of shape (texts, terms), on the device of the buffers.

        Raises:
            RuntimeError: it is not fitted.
            TypeError: ``texts`` is one string, or holds something else than strings.
        """
        if self._columns is None:
            self._columns = {term: column for column, term in enumerate(self.terms)}
        counts = [Counter(t for t in terms if t in self._columns) for terms in _terms(texts)]
        rows = [row for row, count in enumerate(counts) for _ in count]
        columns = [self._columns[term] for count in counts for term in count]
        values = [float(number) for count in counts for number in count.values()]
        assert self.idf is not None
        x = self.idf.new_zeros(len(counts), len(self.idf))
        x[rows, columns] = self.idf.new_tensor(values)
        return nn.functional.normalize(x * self.idf)

    def extra_repr(self) -> str:
        return "unfitted" if self.idf is None else f"{len(self.idf)}"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._columns = None


def load_reviews() -> tuple[list[str], list[str]]:
    """240 short reviews of products, films, food and hotels, and whether each is positive.

    They were written for this package; half of the labels are ``positive``, half ``negative``.

    Example:
        >>> texts, labels = load_reviews()
        >>> len(texts), sorted(set(labels))
        (240, ['negative', 'positive'])
    """
    text = files("torchref.data").joinpath("files", "reviews.csv").read_text("utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    return [row["text"] for row in rows], [row["label"] for row in rows]


def _terms(texts: Iterable[str]) -> Iterable[list[str]]:
    """The terms of each text."""
    if isinstance(texts, str):
        raise TypeError("BagOfWords: expected `texts` as a list of strings, got one string")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"BagOfWords: expected strings, got {type(text).__name__}")
        yield TERM.findall(text.lower())
