"""How much one step of an online stage is for each rank and replica, and how long it may take on known GPUs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf.recipe.devices import Device
from rlhf.recipe.duration import FILLED
from rlhf.recipe.model_shape import BYTES, ModelShape
from rlhf.recipe.online_schema import AnyOnlineStage, OnlineDpoStage, PpoStage
from rlhf.recipe.phases import role_model
from rlhf.recipe.resources import process_count, wanted
from rlhf.recipe.role_schema import RoleName
from rlhf.recipe.schedule import microbatch_tokens, row_tokens, sequence_tokens, step_rows
from rlhf.recipe.schema import Recipe
from rlhf.recipe.stage_schema import Stage

LEARNING, SCORING, PREFILL = 0.35, 0.45, 0.5
"""Shares of a device's rate of products that each kind of pass commonly reaches."""

READING, SENDING = 0.6, 0.5
"""Shares of the bandwidths of memory and link that generation and publishing commonly reach."""


@dataclass(frozen=True)
class StepWork:
    """One optimizer step by ranks: rows and passes of each; passes are the accumulation of its gradient."""

    ranks: int
    rows_per_rank: int
    passes_per_rank: int
    tokens_per_pass: int


@dataclass(frozen=True)
class OnlineStep:
    """One step of an online stage: tokens at most, and seconds by phase where the GPUs are known (within two times)."""

    generated_tokens: int
    scored_tokens: int
    trained_tokens: int
    optimizer_steps: int
    sequences_per_replica: int
    seconds: dict[str, float] | None


def step_work(recipe: Recipe, stage: Stage) -> StepWork | None:
    """Return how an optimizer step's rows are shared; None for a stage that does not train."""
    name: RoleName = "reward" if stage.kind == "reward" else "policy"
    if stage.kind in ("annotate", "synthesize", "compare"):
        return None
    ranks = process_count(recipe, name)
    rows, tokens = math.ceil(step_rows(recipe, stage) / ranks), microbatch_tokens(recipe, stage, ranks)
    at_once = max(1, tokens // row_tokens(stage))
    return StepWork(ranks, rows, math.ceil(rows / at_once), min(rows, at_once) * row_tokens(stage))


def online_step(recipe: Recipe, stage: AnyOnlineStage, shape: ModelShape, device: Device | None) -> OnlineStep:
    """Return a step's tokens with every sequence at full length, and its seconds on GPUs of one kind."""
    sequences = stage.prompts_per_step * stage.samples_per_prompt
    trained = 2 * stage.prompts_per_step if isinstance(stage, OnlineDpoStage) else sequences
    minibatches = math.ceil(trained / step_rows(recipe, stage))
    scorers = 1 + sum(name != "rollout" for name in wanted(recipe, stage))
    return OnlineStep(
        generated_tokens=sequences * stage.max_response_tokens,
        scored_tokens=scorers * sequences * sequence_tokens(stage),
        trained_tokens=stage.epochs * trained * sequence_tokens(stage) * (1 + isinstance(stage, PpoStage)),
        optimizer_steps=stage.epochs * minibatches,
        sequences_per_replica=math.ceil(sequences / recipe.roles.rollout.replicas),
        seconds=_seconds(recipe, stage, shape, device) if device and _on_gpus(recipe, stage) else None,
    )


def _on_gpus(recipe: Recipe, stage: AnyOnlineStage) -> bool:
    return all(want.gpus for want in wanted(recipe, stage).values())


def _seconds(recipe: Recipe, stage: AnyOnlineStage, shape: ModelShape, device: Device) -> dict[str, float]:
    """Return the seconds of each phase and of the step.

    Generate: a token of each of n sequences reads the weights and their KV cache once, (W + n * kv) / bandwidth, for
    as many tokens as the longest response has, and as often as `max_sequences` go into a replica's share; prompts
    cost 2N operations a token. Score and learn: 2N operations a token forward, and 2N more for each gradient, by
    activations and (not with LoRA) by weights, and 2N for activations computed again; over ranks * rate. Roles on
    GPUs of their own work at the same time, so the slowest counts; those that share follow one another. Publish:
    weights over the link. With `staleness` generation hides behind the rest.
    """
    generate = _generate(recipe, stage, shape, device)
    sequences = stage.prompts_per_step * stage.samples_per_prompt
    trained = 2 * stage.prompts_per_step if isinstance(stage, OnlineDpoStage) else sequences
    tokens = FILLED * stage.max_response_tokens + stage.max_prompt_tokens / 2
    score: dict[str, float] = {}
    learn: dict[str, float] = {}
    for name, want in wanted(recipe, stage).items():
        if name in ("rollout", "judge"):
            continue
        model, role = role_model(recipe, stage, name, shape), getattr(recipe.roles, name)
        host = want.shares or name
        unit = 2 * model.parameters * tokens / (want.count * device.flops)
        score[host] = score.get(host, 0) + sequences * unit / SCORING
        if model.trained:
            products = (3 if model.full else 2) + (1 if role.gradient_checkpointing else 0)
            learn[host] = learn.get(host, 0) + products * stage.epochs * trained * unit / LEARNING
    found = {
        "generate": generate,
        "score": max(score.values()),
        "learn": max(learn.values()),
        "publish": shape.parameters * BYTES[recipe.model.precision] / (device.link * SENDING),
    }
    work = found["score"] + found["learn"]
    hidden = getattr(stage, "staleness", 0) > 0
    found["step"] = (max(generate, work) if hidden else generate + work) + found["publish"]
    return found


def _generate(recipe: Recipe, stage: AnyOnlineStage, shape: ModelShape, device: Device) -> float:
    engine, size = recipe.roles.rollout, BYTES[recipe.model.precision]
    mine = math.ceil(stage.prompts_per_step * stage.samples_per_prompt / engine.replicas)
    waves = math.ceil(mine / engine.max_sequences)
    at_once = math.ceil(mine / waves)
    seen = stage.max_prompt_tokens / 2 + FILLED * stage.max_response_tokens / 2
    cache = at_once * seen * shape.layers * 2 * shape.kv_width * size
    token = (shape.parameters * size + cache) / (engine.tensor_parallel * device.bandwidth * READING)
    prompts = mine * stage.max_prompt_tokens / 2 * 2 * shape.parameters
    return waves * stage.max_response_tokens * token + prompts / (engine.tensor_parallel * device.flops * PREFILL)
