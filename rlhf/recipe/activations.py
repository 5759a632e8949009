"""What one pass of a micro-batch keeps and needs at its peak, in bytes: counted from what the code allocates."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.recipe.model_shape import Model

SHORT = {4: 512, 2: 1024}
"""By bytes of a weight: up to this width the CPU's attention is plain matrix products, which keep all its weights."""

BLOCK = 256
"""Queries multiplied with their keys at once: of a long sequence's weights about half are never computed."""

FLOAT = 4

LARGE = 2**24
"""Logits of a pass from which on they are computed in parts."""

PART = 2**25
"""Bytes of logits that are computed at once in the model's dtype on the CPU."""

GPU_PART = 2**28
"""The same on a GPU."""

KEPT = 2**28
"""Bytes up to which the probabilities of a head that learns are kept for its gradient."""


@dataclass(frozen=True)
class Pass:
    """A micro-batch: `tokens` laid flat, in sequences of `width`, `scored` of them through the language-model head.

    An optimizer step takes `passes` of them.
    """

    tokens: int
    width: int
    scored: int
    passes: int = 1


def kept(model: Model, work: Pass, on_gpu: bool) -> float:
    """Return the bytes that autograd keeps of one layer until its backward pass.

    Two norms keep their input in float32 and, where their weight trains, the normalised input; linear layers keep
    their inputs; attention keeps queries, keys and values and either every weight (plain products) or one sum a head;
    a gated MLP keeps four tensors.
    """
    shape, size = model.shape, model.size
    norms = 2 * FLOAT * (shape.hidden + 1) + (2 * size * shape.hidden if model.full else 0)
    inputs = size * (2 * shape.hidden + shape.q_width)
    adapters = size * model.lora_width
    return work.tokens * (norms + inputs + adapters + _attention(model, work, on_gpu) + 4 * size * shape.intermediate)


def backward(model: Model, work: Pass, on_gpu: bool) -> float:
    """Return the bytes of gradients that are alive at once within one layer's backward pass."""
    shape, size = model.shape, model.size
    mlp = size * (3 * shape.intermediate + 2 * shape.hidden)
    attention = size * (3 * shape.q_width + 4 * shape.kv_width + 2 * shape.hidden)
    return work.tokens * max(mlp, attention) + _one_sequence(model, work, on_gpu)


def forward(model: Model, work: Pass, on_gpu: bool) -> float:
    """Return the bytes that are alive at once in one layer when no gradient is wanted."""
    shape, size = model.shape, model.size
    mlp = size * (3 * shape.hidden + 3 * shape.intermediate)
    attention = size * (2 * shape.hidden + 4 * shape.q_width + 2 * shape.kv_width)
    return work.tokens * max(mlp, attention) + _one_sequence(model, work, on_gpu)


def logits(model: Model, work: Pass, training: bool, on_gpu: bool = False) -> int:
    """Return the bytes of all copies of the logits that are alive at once.

    Many are computed in parts, and only a head that learns keeps their probabilities, if they are not too many. Few
    are whole. Forward: the logits, in float32 too where they are not, and their log-softmax. Backward: the log-softmax,
    its gradient and that of the logits, all float32. A scalar model has none.
    """
    if model.scalar:
        return 0
    if work.scored * model.shape.vocabulary >= LARGE:
        all_of_them = model.size * work.scored * model.shape.vocabulary
        learns = training and model.full
        part = 3 * GPU_PART if on_gpu else PART  # with their float32 copy and its softmax, as large there
        return min(part, all_of_them) if not learns or all_of_them > KEPT else all_of_them
    forward = model.size + FLOAT + (FLOAT if model.size < FLOAT else 0)
    return work.scored * model.shape.vocabulary * (3 * FLOAT if training else forward)


def materialised(model: Model, work: Pass, on_gpu: bool) -> bool:
    """Return whether the weights of the attention are held in memory."""
    return not on_gpu and work.width <= SHORT[model.size]


def _attention(model: Model, work: Pass, on_gpu: bool) -> float:
    shape, size = model.shape, model.size
    weights = size * _seen(work) if materialised(model, work, on_gpu) else FLOAT
    return size * (shape.q_width + 2 * shape.kv_width) + shape.heads * weights


def _one_sequence(model: Model, work: Pass, on_gpu: bool) -> float:
    """Return the bytes of one sequence's scores and of what they become, where they are in memory at all."""
    if not materialised(model, work, on_gpu):
        return 0
    return 3 * model.size * model.shape.heads * min(work.width, BLOCK) * work.width


def _seen(work: Pass) -> float:
    """Return how many keys a token has weights for in the mean: those up to the end of its block."""
    blocks = -(-work.width // BLOCK)
    return work.width * (blocks + 1) / (2 * blocks)
