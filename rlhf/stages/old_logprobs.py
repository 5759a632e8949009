"""Whose logprobs stand for the policy before a step, where the recipe leaves that open."""

from __future__ import annotations

from rlhf.recipe.online_schema import AnyOnlineStage, PolicyGradientStage

INTERVAL = 10
"""Steps from one agreement check to the next where the engine's logprobs are learnt from."""


def settled(stage: AnyOnlineStage, dtype: str) -> AnyOnlineStage:
    """Return the stage with `old_logprobs` and `agreement.interval` as `auto` means them for the model's dtype.

    Engine and trainer agree to some 3e-6 nats in float32, so a pass of the trainer over fresh rollouts tells nothing
    new there. In bfloat16 they differ by 0.03 to 0.06, which would go into the KL and the clip.
    """
    if not isinstance(stage, PolicyGradientStage):
        return stage
    kind, agreement = stage.old_logprobs, stage.agreement
    if kind == "auto":
        # Checks at every step, as the recipe may want, are the pass itself.
        gains = dtype == "float32" and stage.staleness == 0 and agreement.interval != 1
        kind = "rollout" if gains else "recompute"
    if kind == "rollout" and agreement.interval == "auto":
        agreement = agreement.model_copy(update={"interval": INTERVAL})
    return stage.model_copy(update={"old_logprobs": kind, "agreement": agreement})
