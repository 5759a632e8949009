"""What a classifier gets right and wrong on held-out texts, class by class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scores:
    """How well texts are told to be of a class, or the plain mean of that over all classes (macro)."""

    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Evaluation:
    """A classifier on `rows` held-out texts.

    majority   the accuracy of always naming the class that is most frequent among them
    texts      how many are of each class
    confusion  `confusion[i][j]` texts of class i were taken for class j
    """

    rows: int
    accuracy: float
    majority: float
    macro: Scores
    labels: tuple[str, ...]
    texts: tuple[int, ...]
    classes: dict[str, Scores]
    confusion: tuple[tuple[int, ...], ...]


def evaluate_classes(labels: Sequence[str], confusion: Sequence[Sequence[int]]) -> Evaluation:
    """Return what a confusion matrix says; a class that is never named has precision 0.

    Raises ValueError when there are no texts.
    """
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    cells = [(true, taken, count) for true, row in enumerate(confusion) for taken, count in enumerate(row) if count]
    true, taken, counts = zip(*cells, strict=True)
    precision, recall, f1, _ = precision_recall_fscore_support(
        true, taken, labels=range(len(labels)), sample_weight=counts, zero_division=0
    )
    scores = [Scores(*map(float, one)) for one in zip(precision, recall, f1, strict=True)]
    texts = tuple(sum(row) for row in confusion)
    return Evaluation(
        rows=sum(texts),
        accuracy=float(accuracy_score(true, taken, sample_weight=counts)),
        majority=max(texts) / sum(texts),
        macro=Scores(float(precision.mean()), float(recall.mean()), float(f1.mean())),
        labels=tuple(labels),
        texts=texts,
        classes=dict(zip(labels, scores, strict=True)),
        confusion=tuple(tuple(row) for row in confusion),
    )
