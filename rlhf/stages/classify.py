"""Classification fine-tuning: train on texts with labels, measure class by class on held-out ones, save."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

from rlhf.data.classes import ClassSequence, collate_classes, in_order, split_classes
from rlhf.data.lazy import Lazy
from rlhf.data.recognise import source_name
from rlhf.data.tokenized import Encoder, tokenized_texts
from rlhf.engines.objectives import Classify, Confusion
from rlhf.errors import DataError
from rlhf.models.tokenizer import ChatTokenizer
from rlhf.recipe.stage_schema import ClassifyStage
from rlhf.report.classification import Evaluation, evaluate_classes
from rlhf.roles import Learner
from rlhf.stages.context import StageContext
from rlhf.stages.epochs import train_epochs
from rlhf.stages.heldout import PART, Picked
from rlhf.stages.sft import Summary
from rlhf.types import Metrics

EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class TextSplit:
    """The classes in order, texts to train on and texts held out."""

    labels: tuple[str, ...]
    train: Sequence[ClassSequence]
    heldout: Sequence[ClassSequence]


def run(stage: ClassifyStage, context: StageContext) -> Summary:
    """Train, write `evaluation.json` about the model that stays, and save it as a plain sequence classifier."""
    tokenizer = context.tokenizer(stage.init)
    split = load_texts(stage, context, tokenizer)
    spec = context.trained(
        "policy", "classes", stage.init, stage.optimizer, stage.tuning, head_learning_rate=stage.head_learning_rate
    )
    model = context.launcher.policy(replace(spec, labels=split.labels))
    collate = partial(collate_classes, pad_id=tokenizer.pad_id)
    trained = train_epochs(model, split.train, collate, Classify(), stage, context, split.heldout)
    summary: Summary = {"rows": len(split.train), "labels": len(split.labels), "heldout_rows": len(split.heldout)}
    summary |= trained.summary()
    if split.heldout:
        found = _evaluation(model, split, tokenizer.pad_id)
        (context.folder / EVALUATION).write_text(json.dumps(asdict(found), indent=2) + "\n", encoding="utf-8")
        summary |= {f"heldout_{name}": value for name, value in asdict(found.macro).items()}
        summary |= {"heldout_accuracy": found.accuracy, "heldout_majority": found.majority}
    context.save(model)
    return summary


def load_texts(stage: ClassifyStage, context: StageContext, tokenizer: ChatTokenizer) -> TextSplit:
    """Read the texts, find out which classes there are, and hold out a share of each."""
    rows = tokenized_texts(stage.data, Encoder(tokenizer, stage.max_length, context.tracker.say))
    written, given = rows.numbered("label")
    labels: list[str | int] = [json.loads(text) for text in written]
    try:
        train, heldout = split_classes(
            labels, given, rows.digests("text"), stage.heldout_fraction, context.seed("split")
        )
    except ValueError as error:
        raise DataError(
            f"{source_name(stage.data)}: label {error}, and none would be left to train on; add texts, leave the label"
            f" out, or change stages.{stage.name}.heldout_fraction"
        ) from error
    classes = in_order(labels)
    numbers = [classes.index(label) for label in labels]
    texts = Lazy(lambda i: ClassSequence(rows[i], numbers[int(given[i])]), len(rows))
    return TextSplit(tuple(map(str, classes)), Picked(texts, train), Picked(texts, heldout))


def _evaluation(model: Learner, split: TextSplit, pad_id: int) -> Evaluation:
    metrics = Metrics()
    for start in range(0, len(split.heldout), PART):
        batch = collate_classes(split.heldout[start : start + PART], pad_id)
        metrics = metrics.merge(model.evaluate(batch, Confusion()).result())
    classes = range(len(split.labels))
    counts = [[int(metrics.sums.get(f"{true}>{taken}", (0, 1))[0]) for taken in classes] for true in classes]
    return evaluate_classes(split.labels, counts)
