"""The rows of the comparison: what is trained on, with which peer, and what is aimed at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.benchmarks.peers.task import RESPONSE, Example

ONLINE, LAST_PPO = "1.16.0", "1.12.0"


@dataclass(frozen=True)
class Row:
    """One comparison.

    A step has `examples` prompts with `completions` each; lengths are lognormal with these means (tokens) and `sigma`.
    `aim_*` are the least ratios of our tokens per second to the peer's; `aim_limit` is the least share of the measured
    GEMM ceiling that our useful work must reach. `tuned` says whether the peer has a second arm.
    """

    name: str
    examples: int
    completions: int
    prompt: int
    completion: int
    sigma: float
    peer: str = ONLINE
    tuned: bool = True
    aim_defaults: float | None = None
    aim_tuned: float | None = None
    aim_limit: float | None = None

    def tokens(self, step: Sequence[Example]) -> int:
        """Return the real tokens of a step: of given completions, or of prompts and responses of the fixed length."""
        if self.completions:
            return sum(example.tokens() for example in step)
        return sum(len(example.prompt) + RESPONSE for example in step)


ROWS = {
    row.name: row
    for row in (
        Row("dpo", 8, 2, 128, 64, 0.6, aim_defaults=8, aim_tuned=6, aim_limit=0.3),
        Row("sft", 16, 1, 96, 96, 0.8, aim_defaults=8),
        Row("reward", 8, 2, 128, 64, 0.6, aim_defaults=5),
        Row("grpo", 2, 8, 256, 64, 0.6, aim_defaults=8),
        Row("rloo", 2, 8, 256, 64, 0.6, aim_defaults=8),
        Row("ppo", 8, 0, 128, 48, 0.6, peer=LAST_PPO, tuned=False, aim_defaults=6),
    )
}
SPREAD = "spread"
SPREAD_SIGMAS = (0.0, 0.5, 1.0)
SPREAD_ROWS, SPREAD_MEAN = 32, 192
AIM_SPREAD = 1.1
