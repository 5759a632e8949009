"""How fast an engine generates: tokens per second of one batch, and their share of the decode limit."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence

from rlhf.bench.ceilings import Place, bandwidth, flops
from rlhf.bench.figures import Figure
from rlhf.bench.setting import BATCH, Setting
from rlhf.bench.work import Decoder
from rlhf.engines.base import RolloutSpec
from rlhf.recipe.model_shape import BYTES, read_shape
from rlhf.roles import RolloutEngine, WeightReceipt
from rlhf.stages.context import largest_adapter
from rlhf.types import Prompt, Sampling

PROMPT_TOKENS, RESPONSE_TOKENS = 64, 64
WARM_UP_TOKENS, ROUNDS = 4, 3


def measure_rollouts(engine: RolloutEngine, setting: Setting, known: Sequence[Figure]) -> list[Figure]:
    """Return generated tokens per second of a batch of `BATCH` prompts, the first, short one left out.

    The limit is what `Decoder.least_seconds` allows the same lengths: every decode step must read all weights and the
    KV cache once and multiply the weights for each row,

        limit = batch / max(bytes / copy bandwidth, operations / rate of products)

    while all rows run, at the ceilings measured with the engine's threads, times `tensor_parallel` on GPUs.
    """
    shape = read_shape(setting.folder)
    place = Place("cuda" if setting.engine_on_gpus else "cpu", setting.threads("annotate"))
    rates, lengths = [], []
    for number in range(1 + ROUNDS):
        tokens = RESPONSE_TOKENS if number else WARM_UP_TOKENS
        prompts, seeds = new_prompts(shape.vocabulary, number), [[row] for row in range(BATCH)]
        began = time.perf_counter()
        drawn = engine.generate(prompts, Sampling(tokens), seeds).result()
        seconds = time.perf_counter() - began
        lengths = [(PROMPT_TOKENS, len(rollout.tokens)) for rollout in drawn]
        rates.append(sum(response for _, response in lengths) / seconds)
    dtype, devices = setting.recipe.model.precision, setting.recipe.roles.rollout.tensor_parallel
    products, read = flops(known, dtype, place), bandwidth(known, place)
    limit = None
    if products and read:
        decoder = Decoder.of(shape, BYTES[dtype])
        least = decoder.least_seconds(lengths, devices * products, devices * read)
        limit = sum(response for _, response in lengths) / least
    return [Figure("rollouts", statistics.median(rates[1:]), str(place), limit)]


def published(receipts: Sequence[WeightReceipt], setting: Setting, known: Sequence[Figure]) -> list[Figure]:
    """Return seconds and GB/s of sending the policy's weights until the engine serves them; the first is left out.

    The limit is that of copying the bytes once: half of what the copy reads and writes together.
    """
    place = Place("cuda" if setting.on_gpus else "cpu", setting.threads("sft"))
    seconds = statistics.median(receipt.seconds for receipt in receipts[1:])
    copied = bandwidth(known, place)
    limit = copied and copied / 2e9
    rate = receipts[-1].bytes / seconds / 1e9
    return [Figure("publish", seconds, str(place)), Figure("publish rate", rate, str(place), limit)]


def rollout_spec(setting: Setting) -> RolloutSpec:
    """Return the engine as the recipe has it, for prompts and responses of this measurement."""
    recipe = setting.served()
    return RolloutSpec(
        checkpoint=setting.folder,
        dtype=recipe.model.precision,
        role=recipe.roles.rollout,
        max_length=PROMPT_TOKENS + RESPONSE_TOKENS,
        threads=setting.threads("annotate"),
        seed=recipe.seed,
        lora=largest_adapter(recipe) if recipe.roles.rollout.weights == "adapter" else None,
    )


def new_prompts(vocabulary: int, seed: int) -> list[Prompt]:
    """Return prompts of random tokens, others for each seed, so that no prefix cache knows them."""
    drawn = random.Random(seed)
    rows = [tuple(drawn.randrange(vocabulary) for _ in range(PROMPT_TOKENS)) for _ in range(BATCH)]
    return [Prompt(f"{seed}-{row}", tokens, "") for row, tokens in enumerate(rows)]
