"""Whether two models say the same: their logits on a few texts, as plain transformers computes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rlhf.errors import TrainingError
from rlhf.models.folder import loading

LONGEST = 96
"""Tokens of a text that count."""

PROBES = (
    "The capital of France is Paris, and 3 times 14 makes 42.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(2, 40))  # don't panic",
    "人工智能正在改变世界，我们今天在上海学习了12个新词。",
    "Это предложение на русском, а αυτό είναι ελληνικά; ça c'est du français 🚀🦙 naïve café.",
    "  two spaces,\ttabs\n\n\nand lines; I'VE we'll 'RE 1234567 3.14159 ...!!! <not-a-token>",
)
"""Texts of several scripts, with what tokenizers treat apart: digits, contractions, spaces, emoji."""


class Disagreement(TrainingError):
    """What was exported does not say what its stage says."""


@dataclass(frozen=True)
class Agreement:
    """Absolute differences of logits over all probed positions; `spread` is the standard deviation of the source's."""

    mean: float
    largest: float
    spread: float

    @property
    def exact(self) -> bool:
        """Whether all logits are equal bit for bit."""
        return self.largest == 0

    def check(self, share: float, what: str) -> None:
        """Raise Disagreement where the mean difference is above that share of the spread; 0 asks for equality."""
        if not (self.exact if share == 0 else self.mean <= share * self.spread):
            raise Disagreement(f"{what} does not agree with its stage: {self}, allowed is a mean of {share:g} spreads")

    def __str__(self) -> str:
        if self.exact:
            return "logits equal bit for bit"
        apart = f"{self.mean:.2g} in the mean, {self.largest:.2g} at most"
        return f"logits differ by {apart} (their spread is {self.spread:.2g})"


def compare(source: Sequence[Tensor], other: Sequence[Tensor]) -> Agreement:
    """Compare logits of the same texts, position by position; Disagreement where their shapes differ."""
    shapes = [tuple(one.shape) for one in source], [tuple(one.shape) for one in other]
    if shapes[0] != shapes[1]:
        raise Disagreement(f"logits have other shapes: {shapes[0][0]} and {shapes[1][0]}")
    ours, theirs = (torch.cat([one.flatten() for one in side]).double() for side in (source, other))
    apart = (ours - theirs).abs()
    return Agreement(apart.mean().item(), apart.max().item(), ours.std().item())


def load_plain(
    folder: Path, dtype: torch.dtype | None = None, like: Path | None = None, **options: Any
) -> PreTrainedModel:
    """Load a model folder with transformers alone, in its own dtype or in `dtype`.

    It is the kind of model that its config says, or that of another folder: `like` a reward model it gets a new head.
    """
    with loading(folder):
        config = AutoConfig.from_pretrained(like or folder, trust_remote_code=False, local_files_only=True)
        writes = (config.architectures or [""])[0] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        kind: Any = AutoModelForCausalLM if writes else AutoModelForSequenceClassification
        labels = {} if writes or like is None else {"num_labels": config.num_labels}
        return kind.from_pretrained(
            folder,
            **labels,
            **options,
            dtype=dtype or "auto",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        ).eval()


def load_words(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder with transformers alone."""
    with loading(folder):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the float32 logits of each token sequence on its own, `[T, V]` or `[1, labels]`."""
    return [model(input_ids=torch.tensor([list(row)])).logits[0].float() for row in tokens]


def probe_tokens(words: PreTrainedTokenizerBase, positions: int | None) -> list[list[int]]:
    """Return the probes' tokens, cut to what the model has positions for."""
    longest = min(LONGEST, positions or LONGEST)
    return [words(text, add_special_tokens=False)["input_ids"][:longest] for text in PROBES]
