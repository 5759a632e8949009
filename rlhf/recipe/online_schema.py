"""Stages that train a policy on its own rollouts: siblings, each with only the keys that its method knows."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from rlhf.recipe.base import FileData, Fraction, FunctionJudge, Judge, Optimizer, Positive, Strict
from rlhf.recipe.stage_base import StageBase
from rlhf.recipe.tuning_schema import Tuning

Aggregation = Annotated[
    Literal["token", "sequence", "constant"],
    Field(
        description="mean of the loss over all response tokens, over sequences of their token means (GRPO), or sum "
        "divided by sequences times max_response_tokens (Dr. GRPO)"
    ),
]
KlCoef = Annotated[float, Field(ge=0, description="weight of the per-token KL to the reference")]
KlIn = Annotated[Literal["reward", "loss"], Field(description="where the KL is taken from")]
KlEstimator = Annotated[
    Literal["k1", "k2", "k3"],
    Field(description="in the loss take k2 or k3: the gradient of k1 there is 0 in the mean"),
]


class Agreement(Strict):
    """The gate between engine and trainer: both compute the logprobs of the same sampled tokens."""

    tolerance: Positive = Field(0.1, description="largest mean |difference| in nats; above it the run stops")
    interval: PositiveInt | Literal["auto"] = Field(
        "auto",
        description="check every so many steps, beside the first; auto: every step, and every 10 where the engine's "
        "logprobs are those learnt from (`old_logprobs`), since a check costs a pass of the trainer there",
    )

    @property
    def every(self) -> int:
        """The steps from one check to the next; `rlhf.stages.old_logprobs` has settled `auto` where it is not 1."""
        return 1 if self.interval == "auto" else self.interval


class Overlong(Strict):
    """Soft punishment of long responses (DAPO, Yu et al. 2025, eq. 13)."""

    buffer: PositiveInt = Field(description="the last tokens before max_response_tokens over which it grows")
    penalty: Positive = Field(1.0, description="subtracted from the score of a response of max_response_tokens")


class SampleFiles(Strict):
    """Which steps' rollouts stay on disk for people to read: `samples/step-<n>.jsonl` of the stage."""

    every: PositiveInt = Field(1, description="write the samples of every so many steps, beside the first")
    keep: PositiveInt | None = Field(
        40,
        description="so many files stay: the newest half, the first, and a spread of those between; null keeps all",
    )


class OnlineStage(StageBase):
    """What they share: prompts, rollouts, a reward and the guards."""

    policy: str
    reward: Judge
    prompts: FileData
    steps: PositiveInt
    prompts_per_step: PositiveInt = 32
    samples_per_prompt: PositiveInt = 1
    epochs: PositiveInt = Field(1, description="passes over each step's experience")
    minibatch_size: PositiveInt = Field(16, description="sequences (or pairs) per optimizer step")
    max_prompt_tokens: PositiveInt = 512
    max_response_tokens: PositiveInt = 256
    temperature: Positive = 1.0
    tuning: Tuning | None = None
    optimizer: Optimizer = Optimizer(learning_rate=1e-5, schedule="constant")
    score_clip: Positive = Field(
        5.0, description="scores are clipped to [-score_clip, score_clip] (a reward model's have sd 1)"
    )
    missing_eos_penalty: float = Field(1.0, ge=0, description="subtracted when a response has no end-of-sequence")
    overlong: Overlong | None = None
    gold: FunctionJudge | None = Field(None, description="only watched: its mean is logged at every step")
    max_kl: Positive = Field(100.0, description="guard: stop when the sequence KL to the reference exceeds this")
    agreement: Agreement = Agreement()
    save_every: PositiveInt | None = Field(None, description="write a policy checkpoint every so many steps")
    samples: SampleFiles = SampleFiles()


class PolicyGradientStage(OnlineStage):
    """What the policy-gradient methods share: the clipped surrogate and the KL to the reference."""

    clip_range: Positive = 0.2
    clip_range_high: Positive | None = Field(None, description="upper clip, if wider (clip-higher, Yu et al. 2025)")
    aggregation: Aggregation = "token"
    importance_cap: Positive = Field(
        2.0, description="cap of the importance ratio of the policy, before the step, to what sampled (TIS)"
    )
    staleness: int = Field(
        0,
        ge=0,
        le=1,
        description="steps by which rollouts may lag behind the policy; 1 generates the next step's rollouts while "
        "this step is learnt",
    )
    old_logprobs: Literal["auto", "recompute", "rollout"] = Field(
        "auto",
        description="logprobs of the policy before the step. recompute: by a pass of the trainer. rollout: between "
        "agreement checks without one; a step of one update knows them itself, so the loss is the same; with several "
        "updates they are those of the engine that sampled, and the clip also meets what the two differ by: a few "
        "millionths of a nat in float32, in bfloat16 0.03 to 0.06 in the mean. auto: rollout where model.dtype is "
        "float32 and staleness 0, recompute elsewhere",
    )
    kl_coef: KlCoef = 0.02
    kl_in: KlIn = "reward"
    kl_estimator: KlEstimator = "k1"
    target_kl: Positive | None = Field(
        None, description="adapt kl_coef so that the sequence KL goes to this many nats (Ziegler et al. 2019)"
    )
    kl_horizon: PositiveInt = Field(10_000, description="rollouts over which an adaptive kl_coef reacts")
    whiten_scores: bool = Field(False, description="scale the scores of each step to mean 0 and variance 1")
    redraws: int = Field(
        0, ge=0, description="dynamic sampling: batches drawn at most in place of groups whose scores are all equal"
    )

    @field_validator("old_logprobs")
    @classmethod
    def _check_old_logprobs(cls, value: str, info: ValidationInfo) -> str:
        """Refuse the engine's logprobs where they are an older policy's, or where every step has the pass anyway."""
        agreement = info.data.get("agreement")
        if value == "rollout" and info.data.get("staleness"):
            raise PydanticCustomError(
                "stale",
                "recompute where staleness is above 0 (the engine's logprobs are an older policy's there, not those of"
                " the policy before the step)",
            )
        if value == "rollout" and agreement and agreement.interval == 1:  # by the recipe, not by `auto`
            raise PydanticCustomError(
                "no_gain",
                "recompute where agreement.interval is 1 (the trainer's pass is left out between agreement checks, and"
                " there is one at every step; raise agreement.interval, to 10 say)",
            )
        return value


class PpoStage(PolicyGradientStage):
    """PPO with a critic (Schulman et al. 2017; Ouyang et al. 2022)."""

    kind: Literal["ppo"]
    epochs: PositiveInt = Field(2, description="passes over each step's experience")
    critic_start: Literal["fitted", "loaded"] = Field(
        "fitted",
        description="how the critic's head begins. fitted: by ridge regression on the returns of the first rollouts, "
        "whose values come from fits that have not seen their prompt. loaded: as it is in the reward model, or random "
        "where the reward is none: a reward model is trained at last tokens, and far off at those before",
    )
    critic_tuning: Tuning | None = None
    critic_optimizer: Optimizer = Optimizer(learning_rate=1e-5, schedule="constant")
    value_clip_range: Positive = 0.2
    gamma: Fraction = 1.0
    gae_lambda: Fraction = 0.95


class GroupStage(PolicyGradientStage):
    """What GRPO and Dr. GRPO share: a sample is held against the others of its prompt, and the KL is in the loss."""

    samples_per_prompt: int = Field(8, ge=2)
    kl_in: KlIn = "loss"
    kl_estimator: KlEstimator = "k3"


class GrpoStage(GroupStage):
    """GRPO (Shao et al. 2024): scores centred and scaled within the group of a prompt's samples, no critic."""

    kind: Literal["grpo"]
    aggregation: Aggregation = "sequence"
    kl_coef: KlCoef = 0.04


class DrGrpoStage(GroupStage):
    """Dr. GRPO (Liu et al. 2025): GRPO without the division by the group's spread and by response lengths."""

    kind: Literal["dr_grpo"]
    aggregation: Aggregation = "constant"
    kl_coef: KlCoef = 0.0


class RlooStage(PolicyGradientStage):
    """RLOO (Ahmadian et al. 2024): the baseline of a sample is the mean of the others of its prompt."""

    kind: Literal["rloo"]
    samples_per_prompt: int = Field(4, ge=2)
    kl_coef: KlCoef = 0.05


class ReinforceStage(PolicyGradientStage):
    """REINFORCE++ (Hu et al. 2025): advantages whitened over the whole batch; `group` subtracts group means first."""

    kind: Literal["reinforce_pp"]
    baseline: Literal["batch", "group"] = "batch"
    gamma: Fraction = 1.0


class OnlineDpoStage(OnlineStage):
    """Online DPO (Guo et al. 2024): at every step the best sample of a prompt against the worst."""

    kind: Literal["online_dpo"]
    samples_per_prompt: int = Field(2, ge=2)
    beta: Positive = 0.1


AnyOnlineStage = PpoStage | GrpoStage | DrGrpoStage | RlooStage | ReinforceStage | OnlineDpoStage
