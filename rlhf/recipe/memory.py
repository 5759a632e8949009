"""Memory of a process of a role in each phase, in bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from rlhf.recipe.activations import FLOAT, Pass, backward, forward, kept, logits
from rlhf.recipe.model_shape import Model
from rlhf.recipe.role_schema import Offload, ZeroStage
from rlhf.recipe.tuning_schema import Qlora

CONTEXT = 600 << 20
"""What CUDA's context and loaded kernels take of a GPU, for each process on it, roughly."""

LARGEST_BUCKET = 500_000_000
"""Gradient elements that DeepSpeed reduces at once."""

GATHERED = 1_000_000_000
"""Parameters at most that ZeRO-3 keeps whole for the layers at work."""


SLACK = 0.08
"""What PyTorch's allocator loses of a GPU between activations, logits and gradients, as a share of them: a guess."""

HEAP_MOVING, HEAP_STATE = 0.28, 0.16
"""What a process's heap on a CPU loses, as shares of activations and logits, and of what stays between passes: those
that agree best with the learning cases of `tests/benchmarks/memory_model.py`, one run of each, under the allocator of
`rlhf/allocator.py`; scoring takes the same ones, unfitted."""


@dataclass(frozen=True)
class Memory:
    """Bytes by what they hold.

    `optimizer` is the float32 masters and Adam's moments; `buffers` are those of communication, the parameters that
    ZeRO-3 gathers and CUDA's context; `slack` is what the allocator loses between blocks.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    kv_cache: int = 0
    buffers: int = 0
    slack: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(getattr(self, field.name) for field in fields(self))

    def plus(self, other: Memory) -> Memory:
        """Return the parts of both together."""
        return Memory(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)})


@dataclass(frozen=True)
class LearnerMemory:
    """One rank's memory between calls, while it scores and while it learns; `host` is what it keeps in main memory."""

    resident: Memory
    score: Memory
    learn: Memory
    host: int = 0


@dataclass(frozen=True)
class Cut:
    """How a model's state lies over `ranks`: what DeepSpeed's `zero_stage` divides and what leaves the device."""

    ranks: int = 1
    zero_stage: ZeroStage = 2
    offload: Offload = "none"
    checkpointing: bool = False

    @property
    def plain(self) -> bool:
        """Whether torch alone trains the model."""
        return self.ranks == 1 and self.offload == "none"

    def share(self, stage: ZeroStage) -> int:
        """Return by how much a rank's part is smaller that is divided from `stage` on."""
        return self.ranks if self.zero_stage >= stage else 1


def learner_memory(model: Model, work: Pass, cut: Cut, on_gpu: bool) -> LearnerMemory:
    """Estimate one rank of a model that scores, and learns where it is trained, micro-batches like `work`.

    Learning is at its peak at one of three moments: at the loss, when the activations of all layers are there; at the
    end of the backward pass, when all gradients are; or in the optimizer's step. With checkpointing each layer keeps
    its input alone, and one layer at a time is computed again. Not covered: the libraries and CUDA's context.
    """
    host, optimizer, gathered = 0, _optimizer(model, cut), _gathered(model, cut) + _unpacked(model)
    work = _with_prompts(model, work)
    weights = model.weight_bytes // cut.share(3)
    if cut.offload != "none":
        host, optimizer = optimizer, 0
    if cut.offload == "parameters" and cut.zero_stage == 3:
        host, weights = host + weights, 0
    resident = Memory(weights=weights, optimizer=optimizer)
    widest = forward(model, work, on_gpu)
    entered = model.size * work.tokens * model.shape.hidden
    scored = logits(model, work, False, on_gpu)
    score = replace(resident, activations=int(entered + (0 if scored > widest else widest)), buffers=gathered)
    score = replace(score, logits=scored if scored > widest else 0)
    score = replace(score, slack=_slack(score, on_gpu))
    if not model.trained:
        return LearnerMemory(resident, score, resident, host)
    learn = max(_moments(model, work, cut, on_gpu), key=lambda memory: memory.total)
    learn = replace(learn, weights=weights, optimizer=optimizer, buffers=learn.buffers + gathered)
    learn = replace(learn, slack=_slack(learn, on_gpu))
    return LearnerMemory(resident, score, learn, host + (learn.gradients if cut.offload != "none" else 0))


def _moments(model: Model, work: Pass, cut: Cut, on_gpu: bool) -> list[Memory]:
    """Return what learning takes beside weights and optimizer: at the loss, after the backward pass, in the step.

    Where torch alone trains, a gradient of low precision moves to float32 as soon as it is formed, and on CPU the
    memory of those in float32 is kept from step to step.
    """
    layer = kept(model, work, on_gpu)
    entered = model.size * work.tokens * model.shape.hidden
    layers = model.learning_layers * (entered if cut.checkpointing else layer)
    again = layer if cut.checkpointing else 0
    late = backward(model, work, on_gpu)
    at_loss = logits(model, work, True, on_gpu)
    summed = FLOAT * model.trainable // cut.share(2)
    # From stage 2 on a gradient is reduced and let go as soon as a bucket is full.
    fresh = model.size * (min(model.trainable, LARGEST_BUCKET) if cut.share(2) > 1 else model.trainable)
    table = 0 if not model.full or model.scalar else model.size * model.shape.vocabulary * model.shape.hidden
    stays = cut.plain and model.size < FLOAT and not on_gpu
    waiting = summed if work.passes > 1 or stays else 0
    formed = summed if cut.plain else waiting + fresh
    bucket = 0 if cut.ranks == 1 else FLOAT * min(model.trainable, LARGEST_BUCKET)
    return [
        Memory(activations=int(layers), logits=at_loss, gradients=waiting),
        Memory(activations=int(layers + again + late), gradients=waiting + table, buffers=bucket),
        Memory(activations=int(entered), gradients=formed + table, buffers=bucket),
        Memory(gradients=summed, buffers=bucket),
    ]


def _slack(memory: Memory, on_gpu: bool) -> int:
    """Return what the allocator loses."""
    moving = memory.activations + memory.logits
    if on_gpu:
        return int(SLACK * (moving + memory.gradients))
    return int(HEAP_MOVING * moving + HEAP_STATE * (memory.weights + memory.gradients + memory.optimizer))


def _optimizer(model: Model, cut: Cut) -> int:
    """Return the bytes of float32 masters and two moments; float32 weights are stepped themselves by torch alone, and
    all weights by DeepSpeed at stage 0."""
    alone = cut.plain and model.size == FLOAT
    masters = 0 if alone or (cut.zero_stage == 0 and cut.ranks > 1) else FLOAT
    return (masters + 2 * FLOAT) * model.trainable // cut.share(1)


def _unpacked(model: Model) -> int:
    """Return the bytes of the largest layer that QLoRA keeps in 4 bits, as it is multiplied with."""
    if not isinstance(model.tuning, Qlora):
        return 0
    return model.size * max((inputs * outputs for inputs, outputs in model.shape.linears.values()), default=0)


def _with_prompts(model: Model, work: Pass) -> Pass:
    """Return the micro-batch with the learned tokens that stand before each of its rows."""
    if not model.virtual_tokens:
        return work
    width = work.width + model.virtual_tokens
    return replace(work, tokens=math.ceil(work.tokens / work.width) * width, width=width)


def _gathered(model: Model, cut: Cut) -> int:
    """Return the bytes of the whole parameters that a rank of ZeRO-3 holds while it works."""
    if cut.zero_stage < 3 or (cut.ranks == 1 and cut.offload != "parameters"):
        return 0
    return model.size * min(model.parameters, GATHERED)
