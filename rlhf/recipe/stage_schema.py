"""The recipe's stages, a union told apart by `kind`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from rlhf.recipe.base import DataSource, FileData, Fraction, FunctionJudge, Judge, Lora, Optimizer, Positive, Strict

NAME = r"^[a-z][a-z0-9_-]*$"


class StageBase(Strict):
    """What all stages have."""

    name: str = Field(pattern=NAME)
    max_tokens_per_microbatch: PositiveInt = Field(
        4096, description="padded tokens in one forward/backward pass; results do not depend on it"
    )


class Training(StageBase):
    """What all stages that train have; `batch_size` counts sequences (or pairs) per optimizer step."""

    lora: Lora | Literal["full"] | None = Field(None, description="overrides the recipe's `lora`; `full` trains all")
    optimizer: Optimizer = Optimizer()
    batch_size: PositiveInt = 16
    epochs: PositiveInt = 1
    max_length: PositiveInt = Field(1024, description="prompt + response tokens; longer rows are errors")


class SftStage(Training):
    """Supervised fine-tuning: cross-entropy on the assistant's tokens."""

    kind: Literal["sft"]
    init: str = Field("base", description="`base` or the name of an earlier stage")
    data: FileData


class AnnotateStage(StageBase):
    """Sample responses from a policy, let a judge rank them and write preference pairs."""

    kind: Literal["annotate"]
    policy: str
    prompts: FileData
    judge: Judge
    samples_per_prompt: int = Field(4, ge=2)
    pairing: Literal["best_worst", "all"] = "best_worst"
    label_noise: Fraction = Field(0.0, description="probability that a pair's label is flipped")
    heldout_fraction: Fraction = Field(0.1, description="share of the prompts kept out of training, for accuracy")
    max_prompt_tokens: PositiveInt = 512
    max_response_tokens: PositiveInt = 256
    temperature: Positive = 1.0


class RewardStage(Training):
    """Bradley-Terry reward model from preference pairs."""

    kind: Literal["reward"]
    init: str = "base"
    data: DataSource
    heldout_fraction: Fraction = Field(0.1, description="share of a file's pairs kept for accuracy")
    gold: FunctionJudge | None = Field(None, description="report the held-out agreement with this judge too")
    head_learning_rate: Positive = Field(5e-3, description="of the new scalar head; the rest uses `optimizer`")


class Agreement(Strict):
    """The gate between engine and trainer: both compute the logprobs of the same sampled tokens."""

    tolerance: Positive = Field(0.1, description="largest mean |difference| in nats; above it the run stops")
    interval: PositiveInt = Field(1, description="check every so many steps, beside the first")


class PpoStage(StageBase):
    """PPO with a critic (Schulman et al. 2017; Ouyang et al. 2022)."""

    kind: Literal["ppo"]
    policy: str
    reward: Judge
    prompts: FileData
    steps: PositiveInt
    prompts_per_step: PositiveInt = 32
    samples_per_prompt: PositiveInt = 1
    epochs: PositiveInt = Field(2, description="passes over each step's experience")
    minibatch_size: PositiveInt = Field(16, description="sequences per optimizer step")
    max_prompt_tokens: PositiveInt = 512
    max_response_tokens: PositiveInt = 256
    temperature: Positive = 1.0
    lora: Lora | Literal["full"] | None = None
    critic_lora: Lora | Literal["full"] | None = None
    optimizer: Optimizer = Optimizer(learning_rate=1e-5, schedule="constant")
    critic_optimizer: Optimizer = Optimizer(learning_rate=1e-5, schedule="constant")
    clip_range: Positive = 0.2
    value_clip_range: Positive = 0.2
    gamma: Fraction = 1.0
    gae_lambda: Fraction = 0.95
    kl_coef: float = Field(0.02, ge=0, description="weight of the per-token KL to the reference, in the reward")
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    score_clip: Positive = Field(
        5.0, description="scores are clipped to [-score_clip, score_clip] (a reward model's have sd 1)"
    )
    missing_eos_penalty: float = Field(1.0, ge=0, description="subtracted when a response has no end-of-sequence")
    importance_cap: Positive = Field(2.0, description="cap of the engine/trainer importance ratio (TIS)")
    gold: FunctionJudge | None = Field(None, description="only watched: its mean is logged at every step")
    max_kl: Positive = Field(100.0, description="guard: stop when the sequence KL to the reference exceeds this")
    agreement: Agreement = Agreement()
    save_every: PositiveInt | None = Field(None, description="write a policy checkpoint every so many steps")


class DpoStage(Training):
    """Direct preference optimisation (Rafailov et al. 2023)."""

    kind: Literal["dpo"]
    policy: str
    data: DataSource
    heldout_fraction: Fraction = Field(0.1, description="share of a file's pairs kept for accuracy")
    beta: Positive = 0.1
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="cDPO: assumed probability of a wrong label")


class CompareStage(StageBase):
    """Sample all candidates on held-out prompts and say who won, by how much and how surely."""

    kind: Literal["compare"]
    candidates: list[str] = Field(min_length=2)
    baseline: str
    prompts: FileData
    gold: Judge = Field(description="the judge that decides")
    reward: Judge = Field(description="the proxy that training optimised")
    samples_per_prompt: PositiveInt = 1
    max_prompt_tokens: PositiveInt = 512
    max_response_tokens: PositiveInt = 256
    temperature: Positive = 1.0
    bootstrap_samples: PositiveInt = 10_000


Stage = Annotated[
    SftStage | AnnotateStage | RewardStage | PpoStage | DpoStage | CompareStage, Field(discriminator="kind")
]
