"""Building blocks shared by all recipe sections."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PositiveInt, Tag

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Dtype = Literal["bfloat16", "float32"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
Format = Literal[
    "auto",
    "messages",
    "prompt_completion",
    "prompts",
    "preference",
    "hh_rlhf",
    "ultrafeedback",
    "ranking",
    "kto",
    "classification",
]
"""What the rows of a data source hold; `auto` tells by the columns of its first readable row."""

URL = r"^https?://[^/@\s]+(/\S*)?$"
"""A user and password before the host are refused: recipes hold no secrets."""


class Strict(BaseModel):
    """Base of every recipe section: unknown keys are errors and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class PathData(Strict):
    """A local file: jsonl, json, csv or parquet."""

    path: Path
    format: Format = "auto"
    columns: dict[str, str] = Field(default_factory=dict, description="our column name -> the file's")
    limit: PositiveInt | None = Field(None, description="use only the first rows")
    max_bad_rows: int = Field(0, ge=0, description="skip and count up to this many malformed rows")


class HubData(Strict):
    """A dataset on the Hugging Face hub."""

    hub: str
    split: str = "train"
    revision: str | None = None
    format: Format = "auto"
    columns: dict[str, str] = Field(default_factory=dict)
    limit: PositiveInt | None = None
    max_bad_rows: int = Field(0, ge=0)


class StageData(Strict):
    """What an earlier stage wrote: the pairs of an annotate stage, the chats of a synthesize stage."""

    stage: str


def _which_data(value: Any) -> str:
    keys = value if isinstance(value, dict) else getattr(value, "model_fields_set", ())
    return next((key for key in ("stage", "hub", "path") if key in keys), "path")


DataSource = Annotated[
    Annotated[PathData, Tag("path")] | Annotated[HubData, Tag("hub")] | Annotated[StageData, Tag("stage")],
    Discriminator(_which_data),
]
FileData = Annotated[Annotated[PathData, Tag("path")] | Annotated[HubData, Tag("hub")], Discriminator(_which_data)]


class FunctionJudge(Strict):
    """A Python function `score(prompt, response, metadata) -> float`, as `file.py:name`."""

    kind: Literal["function"]
    path: str = Field(pattern=r"^.+\.py:[A-Za-z_]\w*$", description="file.py:function, relative to the recipe")
    timeout_s: Positive = Field(60.0, description="of one response; the function runs in a process of its own")
    load_timeout_s: Positive = Field(120.0, description="of the import of the file, models that it loads included")
    workers: PositiveInt = Field(
        1,
        description="processes that score side by side, each with its own import of the file; for checks that take "
        "long, as many as there are cores to spare",
    )


class ModelJudge(Strict):
    """The reward model that an earlier reward stage trained."""

    kind: Literal["model"]
    stage: str


class HttpJudge(Strict):
    """A reward service: POST of `{"items": [{"prompt", "response", "metadata"}]}` answers `{"scores": [...]}`."""

    kind: Literal["http"]
    url: str = Field(pattern=URL)
    token_env: str | None = Field(None, description="environment variable that holds a bearer token")
    batch_size: PositiveInt = 64
    timeout_s: Positive = Field(30.0, description="of one request")
    deadline_s: Positive = Field(300.0, description="of all attempts for one batch of scores")
    on_error: Literal["fail", "skip_group"] = Field(
        "fail", description="what a batch without scores does: end the run, or leave out the prompts it touches"
    )
    max_skipped: Fraction = Field(0.1, description="with skip_group: the share of a step's prompts that may be missing")


class LlmJudge(Strict):
    """A language model that says which of two responses is better (RLAIF); both orders are asked and averaged.

    It scores responses against the others to the same prompt, so there must be at least two: n cost n * (n - 1)
    questions. Its verdicts are kept in the user's cache.
    """

    kind: Literal["llm"]
    model: str = Field(description="a folder or hub id that runs here or, with `url`, the endpoint's name for it")
    url: str | None = Field(None, pattern=URL, description="base URL of an OpenAI-compatible endpoint, `.../v1`")
    api_key_env: str | None = Field(None, description="environment variable that holds the endpoint's key")
    criteria: str = Field("Which response is more helpful, honest and harmless?", description="what to judge by")
    max_prompt_tokens: PositiveInt = Field(2048, description="of the whole question to a model that runs here")
    timeout_s: Positive = Field(60.0, description="of one request")
    deadline_s: Positive = Field(600.0, description="of all attempts for one verdict")
    concurrency: PositiveInt = Field(8, description="requests at once")


Judge = Annotated[FunctionJudge | ModelJudge | HttpJudge | LlmJudge, Field(discriminator="kind")]


class Budget(Strict):
    """What each method may spend; training of every policy stage after the first stops at the limit it reaches."""

    gradient_tokens: PositiveInt | None = Field(None, description="tokens through forward and backward, all models")
    generated_tokens: PositiveInt | None = None
    accelerator_seconds: Positive | None = Field(None, description="seconds times GPUs, or times CPU cores without")


class Optimizer(Strict):
    """AdamW and its learning-rate schedule, for one model."""

    learning_rate: Positive = 1e-4
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    max_grad_norm: Positive = 1.0
