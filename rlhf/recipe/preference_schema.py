"""Stages that train a policy on preferences: siblings, each with only the keys that its loss knows."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from rlhf.recipe.base import DataSource, Fraction, Positive
from rlhf.recipe.stage_base import Training


class PreferenceStage(Training):
    """What they share: a policy, pairs, and how strongly it is held to the reference."""

    policy: str
    data: DataSource
    heldout_fraction: Fraction = Field(0.1, description="share of a file's pairs kept for accuracy")
    beta: Positive = Field(0.1, description="scale of the implicit reward; larger stays closer to the reference")
    save_every: PositiveInt | None = Field(None, description="write a policy checkpoint every so many steps")


class DpoStage(PreferenceStage):
    """Direct preference optimisation (Rafailov et al. 2023); with `label_smoothing` cDPO (Mitchell 2023)."""

    kind: Literal["dpo"]
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="cDPO: assumed probability of a wrong label")
    length_normalised: bool = Field(False, description="mean log-ratios per token instead of sums (Meng et al. 2024)")
    nll_coef: float = Field(0.0, ge=0, description="weight of the chosen response's cross-entropy (Pang et al. 2024)")


class RobustDpoStage(PreferenceStage):
    """DPO with an unbiased correction for labels flipped at a known rate (Chowdhury et al. 2024)."""

    kind: Literal["robust_dpo"]
    label_noise: float = Field(0.1, ge=0, lt=0.5, description="probability that a label is wrong")


class IpoStage(PreferenceStage):
    """Identity preference optimisation (Azar et al. 2023): regress the margin to 1 / (2 beta)."""

    kind: Literal["ipo"]


class HingeStage(PreferenceStage):
    """Hinge loss on the margin (SLiC-HF, Zhao et al. 2023; Liu et al. 2023)."""

    kind: Literal["hinge"]


class SimpoStage(PreferenceStage):
    """SimPO (Meng et al. 2024): length-normalised log-probabilities, a target margin, no reference."""

    kind: Literal["simpo"]
    beta: Positive = 2.0
    gamma: float = Field(1.0, ge=0, description="the margin that the chosen response should have")


class OrpoStage(PreferenceStage):
    """ORPO (Hong et al. 2024): cross-entropy on the chosen plus beta times the log odds ratio, no reference."""

    kind: Literal["orpo"]


class KtoStage(PreferenceStage):
    """KTO (Ethayarajh et al. 2024): single responses labelled desirable or not; pairs give one of each."""

    kind: Literal["kto"]
    desirable_weight: Positive = 1.0
    undesirable_weight: Positive = 1.0


AnyPairStage = DpoStage | RobustDpoStage | IpoStage | HingeStage | SimpoStage | OrpoStage
AnyPreferenceStage = AnyPairStage | KtoStage
REFERENCE_FREE = frozenset({"simpo", "orpo"})
"""The kinds whose loss does not read the reference's log-probabilities."""
