"""The floating-point operations that a training step cannot do without, and the least time of generating a batch.

With L the parameters of the layers' linear maps, A those of adapters, H those of the head (hidden x vocabulary, or
hidden x 1), t tokens of which s are scored, and p pairs of a query and a key that it sees, at q = heads x head size
multiply-adds each for the score and for the weighted value (Kaplan et al. 2020, section 2.1, with attention):

    forward   2 L t + 2 A t + 2 H s + 4 q p layers
    backward  twice each term: one product for the gradient by activations, one by weights; only the first of the two
              for the linear maps and the head that LoRA leaves frozen; attention has no weights, and both of its
              factors are activations, so it is twice always

A prompt that several sequences share counts once, as it need go through the model only once; padding, activations
computed again and logits that no loss reads do not count. Windows of attention are taken as longer than the sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf.models.flat import flatten
from rlhf.models.tuning import unwrapped
from rlhf.recipe.model_shape import ModelShape
from rlhf.types import TokenBatch


@dataclass(frozen=True)
class Work:
    """What goes through a model once: tokens, positions whose head is read, and (query, key) pairs of attention."""

    tokens: int
    scored: int
    pairs: int

    @staticmethod
    def of(sequences: TokenBatch, scored: int) -> Work:
        """Return the work of a batch, each shared prompt once."""
        segments = flatten(sequences).segments
        pairs = sum(s.queries * (s.keys - s.queries) + s.queries * (s.queries + 1) // 2 for s in segments)
        return Work(sum(segment.queries for segment in segments), scored, pairs)


@dataclass(frozen=True)
class Cost:
    """What a model multiplies: L, A, H, and q times layers of the formula above; which weights are trained."""

    body: int
    adapters: int
    head: int
    attention: int
    trains_body: bool
    trains_head: bool

    @staticmethod
    def of(model: PreTrainedModel | PeftModel) -> Cost | None:
        """Read them off a model; None for one with matrices in other places than linear layers, as mixtures have."""
        plain = unwrapped(model)
        config = plain.config.get_text_config()
        head = plain.get_output_embeddings() or plain.score
        body: list[Tensor] = []
        adapters, known = 0, {id(head.weight)}
        for name, module in plain.named_modules():
            if isinstance(module, nn.Embedding):
                known.add(id(module.weight))
            if not isinstance(module, nn.Linear | Conv1D) or module is head:
                continue
            known.add(id(module.weight))
            if {"lora_A", "lora_B"} & set(name.split(".")):
                adapters += module.weight.numel()
            else:
                body.append(module.weight)
        if any(parameter.ndim > 1 and id(parameter) not in known for parameter in plain.parameters()):
            return None
        heads = config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        return Cost(
            body=sum(weight.numel() for weight in body),
            adapters=adapters,
            head=head.weight.numel(),
            attention=width * config.num_hidden_layers,
            trains_body=any(weight.requires_grad for weight in body),
            trains_head=head.weight.requires_grad,
        )

    def forward(self, work: Work) -> int:
        """Return the operations of a forward pass."""
        linear = 2 * (self.body + self.adapters) * work.tokens
        return linear + 2 * self.head * work.scored + 4 * self.attention * work.pairs

    def backward(self, work: Work) -> int:
        """Return those of the gradients."""
        body = 2 * (1 + self.trains_body) * self.body * work.tokens
        head = 2 * (1 + self.trains_head) * self.head * work.scored
        return body + head + 4 * self.adapters * work.tokens + 8 * self.attention * work.pairs


@dataclass(frozen=True)
class Decoder:
    """What a language model reads and multiplies to generate one token.

    `weights` are the parameters that every step reads: all but a table of embeddings that is only looked up in. `kv`
    are the numbers that a token leaves in the cache, `attention` is q times layers, `size` the bytes of a number.
    """

    weights: int
    head: int
    kv: int
    attention: int
    size: int

    @staticmethod
    def of(shape: ModelShape, size: int) -> Decoder:
        """Return that of a model of this shape; of mixtures of experts all experts are taken as read."""
        head = shape.vocabulary * shape.hidden
        weights = shape.parameters - (head if shape.lm_head else 0)
        return Decoder(weights, head, 2 * shape.layers * shape.kv_width, shape.q_width * shape.layers, size)

    def least_seconds(self, rows: Sequence[tuple[int, int]], flops: float, bandwidth: float) -> float:
        """Return the least time for rows of (prompt tokens, response tokens), all at once.

        A step makes one token for each of the n rows that still run, with k keys in all of their caches. It reads all
        weights and those caches once and multiplies each weight n times:

            max(size * (weights + kv * k) / bandwidth, (2 * weights * n + 4 * attention * k) / flops)

        so that n rows that all run have at most n tokens in that time. The prompts' pass, which makes the first
        tokens, reads the weights once and multiplies all but the head for every token.
        """
        tokens = sum(prompt for prompt, _ in rows)
        pairs = sum(prompt * (prompt + 1) // 2 for prompt, _ in rows)
        products = 2 * (self.weights - self.head) * tokens + 2 * self.head * len(rows) + 4 * self.attention * pairs
        seconds = max(self.size * self.weights / bandwidth, products / flops)
        for step in range(1, max(response for _, response in rows)):
            keys = [prompt + step for prompt, response in rows if response > step]
            read = self.size * (self.weights + self.kv * sum(keys))
            products = 2 * self.weights * len(keys) + 4 * self.attention * sum(keys)
            seconds += max(read / bandwidth, products / flops)
        return seconds
