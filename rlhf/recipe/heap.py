"""What the C heap of a role's process on the CPU loses between blocks, in bytes: fitted to measurements.

glibc aligns each tensor within a block that it cuts to size, and small objects settle in what is left over, so that a
hole rarely takes a tensor as large as the last one. While autograd keeps most tensors of a forward pass, much of what
that pass frees again is lost; so are parts of the gradients' and of the logits' blocks. The shares are those that
agree best with `tests/benchmarks/memory_model.py`, which measures processes with the settings of `actors/worker.py`;
single processes that score differ by up to a half from each other.
"""

from __future__ import annotations

from rlhf.recipe.activations import FLOAT, Pass
from rlhf.recipe.model_shape import Model
from rlhf.recipe.tuning_schema import AnyLora

FREED = {4: 0.45, 2: 0.22}
"""By bytes of a weight: the share of the forward pass's temporaries that is lost between what autograd keeps."""

CHECKPOINTED = 0.6
"""Of that, what is lost where layers keep their inputs alone."""

GRADIENTS = 0.6
LOGITS = {False: 0.45, True: 0.8}
"""Without and with checkpointing: layers that are computed again take the place where the logits were."""

SCORED_ACTIVATIONS = 0.4
SCORED_LOGITS = {4: 0.45, 2: 0.15}
"""By bytes of a weight: in float32 all copies of the logits are of one size, and the next finds no hole."""


def learning_slack(model: Model, work: Pass, logits: int, checkpointing: bool) -> int:
    """Return what is lost at the peak of learning; `logits` are the bytes of their copies."""
    lost = FREED[model.size] * model.shape.layers * work.tokens * _freed(model, work)
    if checkpointing:
        lost *= CHECKPOINTED
    return int(lost + GRADIENTS * model.size * model.trainable + LOGITS[checkpointing] * logits)


def scoring_slack(model: Model, activations: int, logits: int) -> int:
    """Return what is lost at the peak of scoring, of the bytes that are alive beside the weights."""
    return int(SCORED_ACTIVATIONS * activations + SCORED_LOGITS[model.size] * logits)


def _freed(model: Model, work: Pass) -> float:
    """Return the bytes by token that one layer's forward pass allocates and autograd does not keep.

    The norms' squares, and in bfloat16 or beside frozen weights the normalised input; queries, keys and values before
    and while positions are rotated in; outputs that residuals take up; and of each adapted layer three outputs, the
    base's, the adapter's and the scaled one.
    """
    shape, size = model.shape, model.size
    q_width, kv_width = shape.q_width, shape.kv_width
    freed: float = FLOAT * shape.hidden * (4 if size < FLOAT or not model.full else 2)
    freed += size * (4 * q_width + 5 * kv_width + 2 * shape.hidden)
    if isinstance(model.tuning, AnyLora):
        targets = model.lora_width / (7 * model.tuning.r)
        freed += 3 * size * targets * (q_width + 2 * kv_width + 2 * shape.hidden + 2 * shape.intermediate)
    return freed
