"""The nearest instruction by an index: that of comparing all, without comparing all."""

import random

import pytest
from rapidfuzz import process
from rapidfuzz.distance import Indel

from rlhf.stages import pool as index
from rlhf.stages.instructions import normalised, words
from rlhf.stages.pool import Candidates, Pool

COMMON = ("the", "a", "of", "and", "to")
RARE = [f"word{n}" for n in range(400)]
VOCABULARY = [f"word{n}" for n in range(5000)]
FREQUENCIES = [1 / (1 + n) for n in range(5000)]  # as words of a language have them, about


def task(rng, longest=12):
    """A text of frequent and rare words, some of them more than once, at times of none."""
    chosen = [rng.choice(COMMON if rng.random() < 0.5 else RARE) for _ in range(rng.randrange(longest))]
    return " ".join(chosen) or rng.choice(("", "...", "?!"))


def changed(text, rng):
    said = text.split()
    for _ in range(rng.randrange(4)):
        place = rng.randrange(len(said) + 1)
        said[place : place + rng.randrange(2)] = [rng.choice(RARE)] * rng.randrange(2)
    if rng.random() < 0.2:
        rng.shuffle(said)
    return " ".join(said)


def nearest_of_all(items, text):
    """Return what comparing all gives: the first of those that are most like a text."""
    _, similarity, place = process.extractOne(
        words(text), [words(other) for _, other in items], scorer=Indel.normalized_similarity
    )
    return items[place][0], similarity


def test_a_pool_knows_its_nearest_and_its_equals():
    pool = Pool([("a", "Write a poem about rain."), ("b", "Name three rivers.")])
    pool.add("c", "Name three lakes.")
    near = pool.nearest("Name four rivers")
    assert (near.name, near.similarity) == ("b", pytest.approx(2 / 3))
    assert pool.nearest("Name three seas").name == "b"  # the first of equals
    assert "NAME three rivers!" in pool
    assert "Name three" not in pool


@pytest.mark.parametrize("seed", range(4))
def test_the_nearest_is_that_of_comparing_all(seed):
    """Name and every bit of the similarity, also among equals, repeated words and texts without any word."""
    rng = random.Random(seed)
    items = [("first", task(rng))]
    pool = Pool(items)
    for number in range(250):
        base = rng.choice(items)[1] if rng.random() < 0.6 else task(rng)
        text = changed(base, rng)
        near = pool.nearest(text)
        assert (near.name, near.similarity) == nearest_of_all(items, text)
        assert (text in pool) == (normalised(text) in {normalised(other) for _, other in items})
        if rng.random() < 0.8:
            items.append((f"{number}", text))
            pool.add(*items[-1])


@pytest.mark.parametrize("seed", range(2))
def test_what_is_kept_and_drafts_together_are_as_one_pool(seed):
    rng = random.Random(seed)
    items = [(f"{n}", task(rng)) for n in range(150)]
    both = Candidates(Pool(items[:100]))
    assert both.similarity(items[0][1]) == 1.0
    for name, text in items[100:]:
        both.add(name, text)
    for _ in range(100):
        text = changed(rng.choice(items)[1], rng)
        assert both.similarity(text) == nearest_of_all(items, text)[1]
        assert (text in both) == (normalised(text) in {normalised(other) for _, other in items})


def work_of(count, monkeypatch):
    """Grow a pool to a size, asking for the nearest each time; return texts split and compared for each new one."""
    rng, done = random.Random(7), {"words": 0, "compared": 0}

    def counted(name, plain):
        def call(*arguments):
            done[name] += 1
            return plain(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(index, "words", counted("words", index.words))
        patch.setattr(index, "rouge_l", counted("compared", index.rouge_l))
        pool = Pool([("seed", "name three rivers")])
        for number in range(count):
            text = " ".join(rng.choices(VOCABULARY, FREQUENCIES, k=12))
            pool.nearest(text)
            pool.add(f"{number}", text)
    return done["words"] / count, done["compared"] / count


def test_each_text_is_split_once_and_few_are_compared_however_large_the_pool_is(monkeypatch):
    small, large = (work_of(count, monkeypatch) for count in (500, 4000))
    assert small[0] == pytest.approx(2, abs=0.01)
    assert large[0] == pytest.approx(2, abs=0.01)
    assert large[1] < 100  # of 2,000 in the mean
    assert large[1] < 3 * small[1]  # with 8 times as many
