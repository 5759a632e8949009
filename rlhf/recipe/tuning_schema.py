"""Which weights of a model are trained, and through what: a union told apart by `kind`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from rlhf.recipe.base import Fraction, Positive, Strict


class Full(Strict):
    """Every weight."""

    kind: Literal["full"] = "full"


class Lora(Strict):
    """Low-rank adapters; the base weights stay frozen (Hu et al. 2021)."""

    kind: Literal["lora"] = "lora"
    r: PositiveInt = 16
    alpha: Positive = 32
    dropout: Fraction = 0.0
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    rslora: bool = Field(False, description="scale by alpha / sqrt(r) instead of alpha / r (Kalajdzievski 2023)")
    dora: bool = Field(False, description="learn each weight row's length apart from its direction (Liu et al. 2024)")
    init: Literal["zero", "pissa"] = Field(
        "zero", description="start with no change, or with the largest singular vectors (PiSSA, Meng et al. 2024)"
    )


class Qlora(Strict):
    """LoRA on a base whose linear weights are kept in 4 bits, NF4 (Dettmers et al. 2023)."""

    kind: Literal["qlora"] = "qlora"
    r: PositiveInt = 16
    alpha: Positive = 32
    dropout: Fraction = 0.0
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    rslora: bool = False
    double_quantisation: bool = Field(True, description="keep the scales of the 4-bit blocks in 8 bits")


class Ia3(Strict):
    """Learned factors for keys, values and the feed-forward's inner activations (Liu et al. 2022)."""

    kind: Literal["ia3"] = "ia3"


class LlamaAdapter(Strict):
    """Learned tokens that the upper layers attend to through a gate that opens from 0 (Zhang et al. 2023)."""

    kind: Literal["llama_adapter"] = "llama_adapter"
    tokens: PositiveInt = 10
    layers: PositiveInt | None = Field(None, description="the last so many layers; unset is all")


class PrefixTuning(Strict):
    """Learned keys and values that every token sees, in each layer (Li and Liang 2021)."""

    kind: Literal["prefix_tuning"] = "prefix_tuning"
    virtual_tokens: PositiveInt = 20


class PromptTuning(Strict):
    """Learned embeddings before the text (Lester et al. 2021)."""

    kind: Literal["prompt_tuning"] = "prompt_tuning"
    virtual_tokens: PositiveInt = 20
    init_text: str | None = Field(None, description="begin with the embeddings of these words; unset is random words")


class PTuning(Strict):
    """Learned embeddings before the text, made by a small network that is trained in their stead (Liu et al. 2021)."""

    kind: Literal["p_tuning"] = "p_tuning"
    virtual_tokens: PositiveInt = 20
    encoder_size: PositiveInt = 128


class Bitfit(Strict):
    """The bias terms alone (Ben Zaken et al. 2022)."""

    kind: Literal["bitfit"] = "bitfit"


class Layers(Strict):
    """Some of the decoder's layers, whole."""

    kind: Literal["layers"] = "layers"
    last: PositiveInt | None = Field(None, description="the last so many layers")
    indices: list[NonNegativeInt] | None = Field(None, description="or these, from 0")
    norm: bool = Field(True, description="and the last norm")

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if (self.last is None) == (not self.indices):
            raise PydanticCustomError("one_choice", "a choice of layers: last: 2, or indices: [0, 1]")
        return self


AnyLora = Lora | Qlora
Prompted = PrefixTuning | PromptTuning | PTuning
Tuning = Annotated[
    Full | Lora | Qlora | Ia3 | LlamaAdapter | PrefixTuning | PromptTuning | PTuning | Bitfit | Layers,
    Field(discriminator="kind"),
]
