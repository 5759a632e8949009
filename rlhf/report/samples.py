"""What goes into a comparison: the scored responses of every run, and its scores of other chats."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.report.results import Cost


@dataclass(frozen=True)
class Sample:
    """One scored response. `kl` is its sequence log(policy/reference) in nats, `tokens` its length.

    `entropy` is the mean over its tokens of the policy's entropy at that place, in nats.

    `reward` is the proxy's score, None where there is no proxy.
    """

    prompt_id: str
    prompt: str
    response: str
    gold: float
    reward: float | None
    kl: float
    tokens: int
    finish_reason: str
    entropy: float


@dataclass(frozen=True)
class ChatScore:
    """-log p of what the assistant says in one chat, in nats, and its tokens by the baseline's tokenizer."""

    nats: float
    tokens: int


@dataclass(frozen=True)
class CandidateSamples:
    """All samples of one run (`ppo@2`, or `ppo` where there is one); every run has the same prompt ids in order.

    `preference_accuracy` is the share of held-out pairs that its implicit reward orders rightly, where measured.
    `retention` are its scores of the retention chats, the same ones in the same order for every run.
    """

    name: str
    kind: str
    samples: tuple[Sample, ...]
    cost: Cost | None = None
    preference_accuracy: float | None = None
    retention: tuple[ChatScore, ...] = ()
