"""Adapters of preferences: one record to the pairs that it says something about, none where it is a tie."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

from rlhf.data.records import Record
from rlhf.data.rows import LabelledRow, Message, PreferenceRow
from rlhf.data.strict_json import type_name
from rlhf.data.turns import answer, common_start, prompt_column, question
from rlhf.data.validation import chat_column, list_column, number_column, text_column
from rlhf.errors import DataError

Pairs = tuple[PreferenceRow, ...]

OPENING = "\n\nHuman:"
TURN = re.compile(r"\n\n(Human|Assistant):")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def preference(record: Record) -> Pairs:
    """`chosen`, `rejected`, perhaps `prompt` and `margin`; text or messages.

    Without `prompt` the answers are whole chats, and the prompt is what they begin with in common.
    """
    chosen = chat_column(record, "chosen", "assistant")
    rejected = chat_column(record, "rejected", "assistant")
    if "prompt" in record.values or isinstance(record.values["chosen"], str):
        asked = prompt_column(record)
    else:
        asked = question(record, common_start(chosen, rejected), "the common start of chosen and rejected")
    margin = number_column(record, "margin") if "margin" in record.values else 0.0
    answers = [answer(record, name, asked) for name in ("chosen", "rejected")]
    if answers[0] == answers[1]:
        raise DataError(f"{record.where}: chosen and rejected are the same")
    return (PreferenceRow(asked, answers[0], answers[1], margin, record.where),)


def hh_rlhf(record: Record) -> Pairs:
    r"""`chosen` and `rejected` transcripts, `\n\nHuman: ...\n\nAssistant: ...` (Bai et al. 2022).

    The turns that both begin with are the prompt; then each has one more of the assistant.
    """
    chats = {name: _transcript(record, name) for name in ("chosen", "rejected")}
    others = {name: value for name, value in record.values.items() if name != "prompt"}
    return preference(Record(record.where, record.number, others | chats))


def is_transcript(values: Any) -> bool:
    """Return whether a record's chosen answer is a transcript as in `hh_rlhf`."""
    chosen = values.get("chosen")
    return isinstance(chosen, str) and chosen.startswith(OPENING)


def ultrafeedback(record: Record) -> Pairs:
    """UltraFeedback (Cui et al. 2023): `instruction` and `completions`, each a `response` with its scores.

    As in Zephyr and Tulu the chosen answer is the best one and the others are rejected; where those draw one of them,
    every one that scores less makes a pair here. A score is the mean of the ratings in `annotations` or, where an
    answer has none, the `overall_score`. Margins are 0: points of a judge are no log-odds.
    """
    asked: tuple[Message, ...] = ({"role": "user", "content": text_column(record, "instruction")},)
    items = list_column(record, "completions")
    answers = [_response(item, f"{record.where}: completions[{index}]") for index, item in enumerate(items)]
    scores = _scores(items, record.where)
    best = scores.index(max(scores))
    return tuple(
        PreferenceRow(asked, answers[best], said, 0.0, record.where)
        for said, score in zip(answers, scores, strict=True)
        if score < scores[best] and said != answers[best]
    )


def ultrafeedback_binarized(record: Record) -> Pairs:
    """A `preference` with `score_chosen` and `score_rejected`, which are no margins: equal ones are a tie, no pair."""
    chosen, rejected = number_column(record, "score_chosen"), number_column(record, "score_rejected")
    if chosen < rejected:
        raise DataError(f"{record.where}: score_chosen {chosen:g} is below score_rejected {rejected:g}")
    return () if chosen == rejected else preference(record)


def ranking(record: Record) -> Pairs:
    """`prompt`, `responses` and `ranking`: the numbers of the responses, from 0, best first; a list in it is a tie.

    Every two responses that are not tied make a pair (Ouyang et al. 2022, section 3.5): all of one prompt, and a
    prompt is never both trained on and held out.
    """
    asked = prompt_column(record)
    responses = list_column(record, "responses")
    for index, said in enumerate(responses):
        if not isinstance(said, str) or not said.strip():
            raise DataError(f"{record.where}: responses[{index}] must be text, not {_shown(said)}")
    ranks = _ranks(record, len(responses))
    pairs = tuple(
        PreferenceRow(asked, responses[better], responses[worse], 0.0, record.where)
        for high, low in combinations(ranks, 2)
        for better in high
        for worse in low
    )
    if any(pair.chosen == pair.rejected for pair in pairs):
        raise DataError(f"{record.where}: two responses are the same and ranked apart")
    return pairs


def unpaired(record: Record) -> tuple[LabelledRow, ...]:
    """A pair, as in `preference` or `hh_rlhf`: the chosen answer is desirable, the rejected one is not."""
    (pair,) = hh_rlhf(record) if is_transcript(record.values) else preference(record)
    return tuple(
        LabelledRow(pair.prompt, said, desirable, pair.where)
        for said, desirable in ((pair.chosen, True), (pair.rejected, False))
    )


def _transcript(record: Record, name: str) -> list[Message]:
    """Return the turns of a transcript; one space after the colon is not part of what is said."""
    before, *pieces = TURN.split(text_column(record, name))
    if before:
        raise DataError(f"{record.where}: column '{name}' must begin with {OPENING!r}, not {before[:20]!r}")
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    return [{"role": SPEAKERS[who], "content": said.removeprefix(" ")} for who, said in turns]


def _response(item: Any, where: str) -> str:
    said = item.get("response") if isinstance(item, dict) else None
    if not isinstance(said, str) or not said.strip():
        raise DataError(f"{where} must have a 'response' that is text, not {_shown(said)}")
    return said


def _scores(items: Sequence[dict[str, Any]], where: str) -> list[float]:
    """Return one score per completion, all of the same kind."""
    ratings = [_ratings(item.get("annotations")) for item in items]
    if all(ratings):
        return [fmean(values) for values in ratings]
    overall = [_number(item.get("overall_score")) for item in items]
    for index, score in enumerate(overall):
        if score is None:
            raise DataError(f"{where}: completions[{index}] has no ratings in 'annotations' and no 'overall_score'")
    return [score for score in overall if score is not None]


def _ratings(annotations: Any) -> list[float]:
    """Return the ratings of all aspects; those that are not given (N/A) are left out."""
    if not isinstance(annotations, dict):
        return []
    found = (_number(aspect.get("Rating")) for aspect in annotations.values() if isinstance(aspect, dict))
    return [rating for rating in found if rating is not None]


def _number(value: Any) -> float | None:
    """Return a finite number, or the text of one, as a float; else None."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _ranks(record: Record, responses: int) -> list[list[int]]:
    """Return the numbers of the responses, best first, those that are tied together."""
    ranks = [item if isinstance(item, list) else [item] for item in list_column(record, "ranking")]
    numbers = [number for rank in ranks for number in rank]
    whole = all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
    if not whole or sorted(numbers) != list(range(responses)):
        raise DataError(
            f"{record.where}: column 'ranking' must name each of the {responses} responses once, by its number from 0,"
            f" best first (a list within it is a tie), not {str(record.values['ranking'])[:80]}"
        )
    return ranks


def _shown(value: Any) -> str:
    return "empty text" if isinstance(value, str) else type_name(value)
