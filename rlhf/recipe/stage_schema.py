"""The recipe's stages, a union told apart by `kind`."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, PositiveInt

from rlhf.recipe.base import DataSource, FileData, Fraction, FunctionJudge, Judge, ModelJudge, Positive, StageData
from rlhf.recipe.online_schema import AnyOnlineStage
from rlhf.recipe.preference_schema import AnyPreferenceStage
from rlhf.recipe.stage_base import StageBase, Training


class SftStage(Training):
    """Supervised fine-tuning: cross-entropy on the assistant's tokens; of an annotate stage, on the best samples."""

    kind: Literal["sft"]
    init: str = Field("base", description="`base` or the name of an earlier stage")
    data: DataSource
    heldout_fraction: Fraction = Field(0.05, description="share of the rows kept out of training, for evaluation")


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


class ClassifyStage(Training):
    """Classification fine-tuning: cross-entropy over the labels of the data, from the text's last token."""

    kind: Literal["classify"]
    init: str = "base"
    data: FileData
    heldout_fraction: Fraction = Field(0.1, description="share of the rows kept out of training, for the metrics")
    head_learning_rate: Positive = Field(5e-3, description="of the new classification head; the rest uses `optimizer`")


class SynthesizeStage(StageBase):
    """Grow seed tasks into instruction data with a model (self-instruct, Wang et al. 2022); `sft` reads the result."""

    kind: Literal["synthesize"]
    policy: str
    seeds: FileData = Field(description="chats to begin with: instructions and their answers")
    count: PositiveInt = Field(description="so many new chats are written")
    examples: int = Field(6, ge=1, description="tasks shown for each new one, two of them of the model's own making")
    max_similarity: Fraction = Field(0.7, description="an instruction nearer than that to another (ROUGE-L) is dropped")
    max_attempts: PositiveInt = Field(20, description="the stage fails after count times so many drawn instructions")
    min_words: PositiveInt = Field(3, description="of an instruction")
    max_words: PositiveInt = Field(150, description="of an instruction")
    judge: FunctionJudge | None = Field(None, description="scores each answer; those below `min_score` are dropped")
    min_score: float = 0.0
    max_prompt_tokens: PositiveInt = 1024
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


class CompareStage(StageBase):
    """Sample all candidates on held-out prompts and say who won, by how much and how surely."""

    kind: Literal["compare"]
    candidates: list[str] = Field(min_length=2)
    baseline: str
    prompts: FileData
    gold: Judge = Field(description="the judge that decides")
    reward: Judge | None = Field(None, description="the proxy that training optimised, if there is one")
    pairs: str | None = Field(
        None, description="an annotate stage: implicit-reward accuracy of every candidate on its held-out pairs"
    )
    retention: FileData | None = Field(
        None, description="chats that training did not aim at: how much worse each candidate predicts them (forgetting)"
    )
    frontier: bool = Field(True, description="every saved checkpoint of the candidates is a point of the frontier too")
    samples_per_prompt: PositiveInt = 1
    max_prompt_tokens: PositiveInt = 512
    max_response_tokens: PositiveInt = 256
    temperature: Positive = 1.0
    bootstrap_samples: PositiveInt = 10_000


AnyStage = (
    SftStage
    | ClassifyStage
    | SynthesizeStage
    | AnnotateStage
    | RewardStage
    | AnyOnlineStage
    | AnyPreferenceStage
    | CompareStage
)
Stage = Annotated[AnyStage, Field(discriminator="kind")]
STAGE_KINDS: tuple[str, ...] = tuple(get_args(kind.model_fields["kind"].annotation)[0] for kind in get_args(AnyStage))


def judges(stage: Stage) -> list[Judge]:
    """Return every judge that a stage asks."""
    named = (getattr(stage, field, None) for field in ("judge", "reward", "gold"))
    return [judge for judge in named if judge is not None]


def upstream(stage: Stage) -> set[str]:
    """Return the names of the stages that this one reads from (`base` included)."""
    names: set[str] = set()
    for field in ("init", "policy"):
        names |= {getattr(stage, field)} if hasattr(stage, field) else set()
    names |= {stage.baseline} if isinstance(stage, CompareStage) else set()
    names |= set(getattr(stage, "candidates", ()))
    names |= {pairs} if (pairs := getattr(stage, "pairs", None)) else set()
    for field in ("judge", "reward", "gold", "data"):
        section = getattr(stage, field, None)
        if isinstance(section, StageData | ModelJudge):
            names.add(section.stage)
    return names
