"""What one pass of a micro-batch keeps and needs at its peak, in bytes: counted from what the code allocates."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.recipe.model_shape import Model

SHORT = 256
"""On the CPU, rows up to this width go through plain matrix products, which hold all attention scores in float32."""

FLOAT = 4


@dataclass(frozen=True)
class Pass:
    """A micro-batch: `tokens` padded tokens in rows of `width`, `scored` of them through the language-model head.

    An optimizer step takes `passes` of them. Rows of unequal length are `masked`.
    """

    tokens: int
    width: int
    scored: int
    passes: int = 1
    masked: bool = True


def kept(model: Model, work: Pass, on_gpu: bool) -> float:
    """Return the bytes that autograd keeps of one layer until its backward pass.

    Two norms keep their input in float32 and, where their weight trains, the normalised input; linear layers keep
    their inputs; attention keeps queries, keys and values, repeated to all heads where there is a mask, and either
    every score in float32 (plain products) or the mask in the model's dtype; a gated MLP keeps four tensors.
    """
    shape, size = model.shape, model.size
    full = model.lora is None
    norms = 2 * FLOAT * (shape.hidden + 1) + (2 * size * shape.hidden if full else 0)
    inputs = size * (2 * shape.hidden + shape.q_width)
    adapters = size * shape.lora_width(model.lora) if model.lora else 0
    return work.tokens * (norms + inputs + adapters + _attention(model, work, on_gpu) + 4 * size * shape.intermediate)


def backward(model: Model, work: Pass, on_gpu: bool) -> float:
    """Return the bytes of gradients that are alive at once within one layer's backward pass."""
    shape, size = model.shape, model.size
    mlp = size * (3 * shape.intermediate + 2 * shape.hidden)
    scores = 2 * FLOAT * shape.heads * work.width if materialised(work, on_gpu) else 0
    return work.tokens * max(mlp, scores + 4 * size * shape.q_width + 2 * size * shape.hidden)


def forward(model: Model, work: Pass, on_gpu: bool) -> float:
    """Return the bytes that are alive at once in one layer when no gradient is wanted."""
    shape, size = model.shape, model.size
    mlp = size * (3 * shape.hidden + 3 * shape.intermediate)
    attention = size * (2 * shape.hidden + 4 * shape.q_width + 2 * shape.kv_width)
    if materialised(work, on_gpu):
        attention += FLOAT * (5 * shape.q_width + 2 * shape.heads * work.width)
    elif work.masked:
        attention += size * work.width
    return work.tokens * max(mlp, attention)


def logits(model: Model, work: Pass, training: bool) -> int:
    """Return the bytes of all copies of the logits that are alive at once.

    Forward: the logits, in float32 too where they are not, and their log-softmax. Backward: the log-softmax, its
    gradient and that of the logits, all float32. A scalar model has none.
    """
    if model.scalar:
        return 0
    forward = model.size + FLOAT + (FLOAT if model.size < FLOAT else 0)
    return work.scored * model.shape.vocabulary * (3 * FLOAT if training else forward)


def materialised(work: Pass, on_gpu: bool) -> bool:
    """Return whether attention scores are held in memory."""
    return not on_gpu and work.width <= SHORT


def _attention(model: Model, work: Pass, on_gpu: bool) -> float:
    shape, size = model.shape, model.size
    if materialised(work, on_gpu):
        return FLOAT * (3 * shape.q_width + shape.heads * work.width)
    repeated = shape.q_width if work.masked else shape.kv_width
    mask = size * work.width if work.masked else 0
    return size * (shape.q_width + 2 * repeated) + FLOAT * shape.heads + mask
