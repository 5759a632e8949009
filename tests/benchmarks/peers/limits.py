"""How much arithmetic a step is, and how much of it this machine could do.

Useful work of a forward pass over one example (a prompt of `P` tokens, completions of `C_i`), hidden size `h`, `L`
layers with `W` weights in linear layers each, vocabulary `V`; a multiplication and an addition are two operations:

    linear      2 L W (P + sum C_i)                     a prompt that several completions share counts once
    attention   4 L h (P (P + 1) / 2 + sum (C_i P + C_i (C_i + 1) / 2))      scores and weighted sum, causal pairs
    head        2 h V sum C_i                           the positions that completions are predicted from, no others

Backward is twice forward, so training is three times it. A scalar head is nothing beside the rest. What both arms must
do for the row is counted, the same for both, so that padding, recomputation, logits that nobody reads and needless
passes show as a smaller share: GRPO and RLOO add one forward pass of the reference, PPO adds sampling's forward, the
reference, the reward model and the critic's values, and trains policy and critic in each epoch. The optimizer's
element-wise work, 45 M weights a step, is left out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from tests.benchmarks.peers.task import PPO_EPOCHS, RESPONSE, Example

PROBE = 2048
SHAPES = ((2048, 2048, 2048), (4096, 2048, 4096), (4096, 512, 4096), (2048, 512, 32_000))


def forward_flops(example: Example, shape: dict[str, int], head: bool) -> float:
    """Return the operations of one forward pass, by the formulas above; `head` says whether there are logits."""
    hidden, inter, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    narrow = shape["num_key_value_heads"] / shape["num_attention_heads"]
    weights = hidden * hidden * (2 + 2 * narrow) + 3 * hidden * inter
    prompt, completions = len(example.prompt), [len(completion) for completion in example.completions]
    pairs = prompt * (prompt + 1) / 2 + sum(c * prompt + c * (c + 1) / 2 for c in completions)
    linear = 2 * layers * weights * (prompt + sum(completions))
    return linear + 4 * layers * hidden * pairs + (2 * hidden * shape["vocab_size"] * sum(completions) if head else 0)


def step_flops(row: str, examples: Sequence[Example], shape: dict[str, int]) -> float:
    """Return the useful operations of one step of a row."""
    if row == "ppo":
        examples = [Example(e.prompt, [[0] * RESPONSE]) for e in examples]
    causal = sum(forward_flops(example, shape, head=True) for example in examples)
    scalar = sum(forward_flops(example, shape, head=False) for example in examples)
    match row:
        case "reward":
            return 3 * scalar
        case "grpo" | "rloo":
            return 3 * causal + causal
        case "ppo":
            return 3 * PPO_EPOCHS * (causal + scalar) + 2 * causal + 2 * scalar
        case _:
            return 3 * causal


def probe(threads: int) -> float:
    """Return the seconds of a bfloat16 product of two 2048 x 2048 matrices, the best of thirty."""
    return _best(PROBE, PROBE, PROBE, threads, repeats=30)


def ceiling(threads: int) -> float:
    """Return the operations per second of the fastest of several large bfloat16 products."""
    return max(2 * m * k * n / _best(m, k, n, threads) for m, k, n in SHAPES)


def _best(m: int, k: int, n: int, threads: int, repeats: int = 5) -> float:
    import torch

    torch.set_num_threads(threads)
    a, b = torch.randn(m, k, dtype=torch.bfloat16), torch.randn(k, n, dtype=torch.bfloat16)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - started)
    return min(seconds)
