"""The quickstart's and the smoke test's rewards, worked by hand.

VADER's compound of valences that sum to s is s / sqrt(s^2 + 15), rounded to 4 places; "great" is 3.1,
"terrible" -2.1, "awful" -2.0, "bad" -2.5 in its lexicon.
"""

import math
from pathlib import Path

import pytest

from rlhf.rewards.user_function import load_function

REWARDS = Path(__file__).parents[2] / "recipes" / "rewards"
SIZE = {"thing": "lamp", "aspect": "size"}

gold, judge, repetition = (load_function(f"{REWARDS}/reviews.py:{name}") for name in ("gold", "judge", "repetition"))


def compound(valence):
    return round(valence / math.sqrt(valence**2 + 15), 4)


def test_a_praise_that_mentions_the_aspect_is_worth_its_sentiment():
    text = "The size of this lamp is great."
    assert gold("", text, SIZE) == judge("", text, SIZE) == compound(3.1) == 0.6249


def test_forgetting_the_aspect_costs_half_a_point_that_the_judge_does_not_see():
    text = "This lamp is terrible."
    assert judge("", text, SIZE) == compound(-2.1) == -0.4767
    assert gold("", text, SIZE) == pytest.approx(-0.4767 - 0.5)


def test_the_aspect_is_a_word_in_any_case():
    assert gold("", "Size matters to this lamp.", SIZE) == judge("", "Size matters to this lamp.", SIZE)
    assert gold("", "It is sizeable.", SIZE) == judge("", "It is sizeable.", SIZE) - 0.5


def test_repetition_counts_longer_words_and_bigrams_that_came_before():
    # longer words: lamp size lamp size, 2 of 4 repeated; bigrams: the-lamp and lamp-size, 2 of 5
    assert repetition(["the", "lamp", "size", "the", "lamp", "size"]) == pytest.approx(2 / 4 + 2 / 5)
    assert repetition(["the", "cat", "and", "the", "dog"]) == 0.0
    assert repetition(["lamp"]) == repetition([]) == 0.0
    # valence 0; 3 of 4 longer words and 2 of 3 bigrams came before
    assert judge("", "size size size size", SIZE) == pytest.approx(-(3 / 4 + 2 / 3))


def test_words_over_eighteen_cost_a_twentieth_each():
    words = [chr(ord("a") + number) * 3 for number in range(20)]
    assert gold("", " ".join([*words[:17], "size"]), SIZE) == 0.0
    assert gold("", " ".join([*words[:19], "size"]), SIZE) == pytest.approx(-0.1)


def test_smoke_rewards_count_the_first_letters():
    smoke_gold, smoke_judge = (load_function(f"{REWARDS}/smoke.py:{name}") for name in ("gold", "judge"))
    for score in (smoke_gold, smoke_judge):
        assert score("", "abcp", {}) == 1.0
        assert score("", "aq\ufffdA", {}) == 0.25
    assert (smoke_gold("", "", {}), smoke_judge("", "", {})) == (-0.1, 0.0)
