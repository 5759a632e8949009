"""What each tuning method can be used for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from rlhf.recipe.tuning_schema import Lora, Tuning


@dataclass(frozen=True)
class Support:
    """What comes of a model that trains by a method.

    `merges`: it becomes a plain model, for later stages and the rollout engine. `adapter`: a PEFT folder holds what it
    learned. `reference`: with its adapters off it is, bit for bit, the model it started from. `flat`: it takes batches
    without padding. `served`: vLLM serves its adapter beside the base. `cut`: ZeRO-3 can cut it over ranks.
    """

    merges: bool = True
    adapter: bool = True
    reference: bool = True
    flat: bool = True
    served: bool = False
    cut: bool = True


PLAIN = Support(adapter=False, reference=False)
PROMPTED = Support(merges=False, flat=False)
SUPPORT = {
    "full": PLAIN,
    "lora": Support(served=True),
    "qlora": Support(cut=False),
    "ia3": Support(),
    "llama_adapter": Support(merges=False),
    "prefix_tuning": PROMPTED,
    "prompt_tuning": PROMPTED,
    "p_tuning": PROMPTED,
    "bitfit": PLAIN,
    "layers": PLAIN,
}


def support(tuning: Tuning) -> Support:
    """Return what a method can be used for, with its settings: vLLM has no DoRA, and PiSSA changes the base itself."""
    found = SUPPORT[tuning.kind]
    if isinstance(tuning, Lora) and tuning.init == "pissa":
        found = replace(found, reference=False, served=False)
    return replace(found, served=False) if isinstance(tuning, Lora) and tuning.dora else found


def methods(able: Callable[[Support], bool], among: Iterable[str] = SUPPORT) -> str:
    """Return the kinds that can do something, in words."""
    return ", ".join(kind for kind in among if able(SUPPORT[kind]))
