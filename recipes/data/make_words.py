"""Write the data of known_truth.yaml: `python recipes/data/make_words.py` recreates the three files, byte for byte.

The task: invent a word for a thing. SFT answers are pseudo-words of 3 to 6 syllables, consonant and vowel in turn, all
letters equally likely within their class; so a policy trained on them spells at random, and never the same letter twice
in a row. What is good about a word (rewards/words.py) is a matter of its letters alone.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

SEED = 17
SFT_ROWS, PROMPT_ROWS, HELDOUT_ROWS = 512, 256, 64
CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwxyz", "aeiou"
SYLLABLES = (3, 6)
# fmt: off
COLORS = (
    "red", "blue", "green", "gray", "black", "white", "pink", "tan", "gold", "teal", "navy", "ruby", "lime", "rust",
    "sand", "plum",
)
THINGS = (
    "cup", "hat", "fox", "map", "jar", "pen", "key", "owl", "bag", "toy", "bus", "cat", "dog", "egg", "fan", "gem",
    "hen", "ink", "jet", "kit", "log", "mug", "net", "oak", "pot", "rug", "saw", "tap", "urn", "van", "wig", "yak",
)
# fmt: on


def pseudo_word(rng: random.Random) -> str:
    """Return a random word of 3 to 6 syllables."""
    return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.randint(*SYLLABLES)))


def main() -> None:
    """Write `words_sft.jsonl`, `words_prompts.jsonl` and `words_heldout.jsonl`; no prompt is in two of them."""
    rng = random.Random(SEED)
    names = [f"{color} {thing}" for color in COLORS for thing in THINGS]
    rng.shuffle(names)
    heldout, prompts = names[:HELDOUT_ROWS], names[HELDOUT_ROWS : HELDOUT_ROWS + PROMPT_ROWS]
    rest = names[HELDOUT_ROWS + PROMPT_ROWS :]
    sft = [
        {
            "messages": [
                {"role": "user", "content": f"Name a {rest[row % len(rest)]}"},
                {"role": "assistant", "content": pseudo_word(rng)},
            ]
        }
        for row in range(SFT_ROWS)
    ]
    _write("words_sft.jsonl", sft)
    for file, chosen in (("words_prompts.jsonl", prompts), ("words_heldout.jsonl", heldout)):
        _write(file, [{"id": name.replace(" ", "-"), "prompt": f"Name a {name}"} for name in chosen])


def _write(name: str, rows: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (Path(__file__).parent / name).write_text(lines, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
