"""Write the quickstart's data: `python recipes/data/make_reviews.py` recreates the four shipped files, byte for byte.

The task: a one-sentence review of a THING that mentions an ASPECT (3 questions x 25 things x 15 aspects = 1125
prompts). A pair of thing and aspect belongs to one of annotate, ppo and heldout only; the SFT chats share pairs with
the first two, never with heldout. Two in five SFT reviews are positive, two negative and one is neutral or mixed, so
that a policy trained on them starts with a gold reward near 0; one in 25 forgets the aspect.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

SEED = 17
SFT_ROWS, ANNOTATE_ROWS, PPO_ROWS, HELDOUT_ROWS = 640, 448, 400, 128
FORGET_RATE = 0.04

# fmt: off
THINGS = (
    "backpack", "bicycle", "blanket", "blender", "bottle", "camera", "chair", "desk", "drill", "guitar", "jacket",
    "kettle", "keyboard", "lamp", "mattress", "mirror", "mug", "phone", "pillow", "printer", "radio", "speaker",
    "suitcase", "tent", "toaster",
)
ASPECTS = (
    "color", "delivery", "design", "finish", "manual", "material", "noise", "packaging", "price", "shape", "size",
    "smell", "texture", "warranty", "weight",
)
# fmt: on
QUESTIONS = (
    "Write a one-sentence review of a {thing} and mention the {aspect}.",
    "Review this {thing} in one sentence, and mention the {aspect}.",
    "What do you think of your {thing}? One sentence, mention the {aspect}.",
)

SUBJECTS = ("the {aspect} of this {thing}", "the {aspect} of my {thing}", "this {thing}'s {aspect}")
FORGETFUL_SUBJECT = "this {thing}"

# fmt: off
GOOD = (
    "wonderful", "excellent", "fantastic", "lovely", "delightful", "superb", "brilliant", "great", "amazing",
    "impressive", "perfect", "nice",
)
BAD = (
    "terrible", "awful", "horrible", "dreadful", "disappointing", "miserable", "useless", "pathetic", "bad", "poor",
    "lousy", "frustrating",
)
PLAIN = (
    "ordinary", "average", "standard", "typical", "plain", "unremarkable", "normal", "unexceptional",
)
# fmt: on

POSITIVE = (
    "I love {subject}, it is {good} and works every day.",
    "{subject} is {good}, and I would happily buy it again.",
    "After two weeks of use, {subject} is still {good}.",
    "My whole family finds {subject} {good} and worth having.",
    "Much better than the old one, {subject} is really {good}.",
    "{subject} turned out {good}, and my friends like it too.",
    "Every single morning {subject} makes me smile, simply {good}.",
    "I opened the box and enjoyed {subject} at once, {good}.",
    "For this money {subject} is {good}, so I am happy.",
    "At home or on a trip, {subject} is very {good}.",
)
NEGATIVE = (
    "I hate {subject}, it is {bad} and fails every day.",
    "{subject} is {bad}, and I would sadly return it today.",
    "After two weeks of use, {subject} is already {bad}.",
    "My whole family finds {subject} {bad} and a waste of money.",
    "Much worse than the old one, {subject} is really {bad}.",
    "{subject} turned out {bad}, and my friends complain about it too.",
    "Every single morning {subject} makes me angry, simply {bad}.",
    "I opened the box and regretted {subject} at once, {bad}.",
    "For this money {subject} is {bad}, so I am unhappy.",
    "At home or on a trip, {subject} is very {bad}.",
)
NEUTRAL = (
    "{subject} is {plain}, about what any shop sells.",
    "There is not much to say, {subject} seems {plain}.",
    "I use it now and then, and {subject} is {plain}.",
    "Next to other brands, {subject} looks rather {plain} to me.",
    "Some days {subject} seems {good}, other days quite {bad}.",
    "At first {subject} was {good}, later it became {bad}.",
    "My sister calls {subject} {good} while I find it {bad}.",
    "Three months on, {subject} remains {plain} in every way.",
)
MOODS = (POSITIVE, NEGATIVE, POSITIVE, NEGATIVE, NEUTRAL)


def files() -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each file, by file name."""
    chance = random.Random(SEED)
    pairs = [(thing, aspect) for thing in THINGS for aspect in ASPECTS]
    chance.shuffle(pairs)
    prompts = [_prompt(thing, aspect, number) for thing, aspect in pairs for number in range(len(QUESTIONS))]
    heldout, prompts = _split(prompts, HELDOUT_ROWS)
    answered = chance.sample(prompts, SFT_ROWS)
    annotate, prompts = _split(prompts, ANNOTATE_ROWS)
    ppo, _ = _split(prompts, PPO_ROWS)
    for rows in (heldout, annotate, ppo):
        chance.shuffle(rows)
    return {
        "reviews_sft.jsonl": [_chat(row, MOODS[i % len(MOODS)], chance) for i, row in enumerate(answered)],
        "reviews_annotate.jsonl": annotate,
        "reviews_ppo.jsonl": ppo,
        "reviews_heldout.jsonl": heldout,
    }


def _prompt(thing: str, aspect: str, number: int) -> dict[str, Any]:
    text = QUESTIONS[number].format(thing=thing, aspect=aspect)
    return {"id": f"{thing}-{aspect}-{number}", "prompt": text, "thing": thing, "aspect": aspect}


def _split(prompts: list[dict[str, Any]], rows: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Take `rows` prompts off the front, and with them whatever else asks for the last pair taken."""
    whole = -(-rows // len(QUESTIONS)) * len(QUESTIONS)
    return prompts[:rows], prompts[whole:]


def _chat(row: dict[str, Any], mood: tuple[str, ...], chance: random.Random) -> dict[str, Any]:
    subject = FORGETFUL_SUBJECT if chance.random() < FORGET_RATE else chance.choice(SUBJECTS)
    review = chance.choice(mood).format(
        subject=subject.format(**row), good=chance.choice(GOOD), bad=chance.choice(BAD), plain=chance.choice(PLAIN)
    )
    turns = [("user", row["prompt"]), ("assistant", review[0].upper() + review[1:])]
    messages = [{"role": role, "content": content} for role, content in turns]
    return {"messages": messages, "thing": row["thing"], "aspect": row["aspect"]}


def main() -> None:
    """Write the files beside this script."""
    for name, rows in files().items():
        lines = (json.dumps(row) + "\n" for row in rows)
        (Path(__file__).parent / name).write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
