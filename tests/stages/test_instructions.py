"""What is read from a model's text as an instruction, and why it is or is not kept."""

import pytest

from rlhf.stages.instructions import (
    answer_fault,
    circles,
    instruction_fault,
    normalised,
    parse_instructions,
    rouge_l,
    words,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Name three rivers.", ["Name three rivers."]),
        (" Name three rivers.\n8. Name a lake.\n9.", ["Name three rivers.", "Name a lake."]),
        ("Name three rivers.\n\n8) **Name a lake.**\n", ["Name three rivers.", "Name a lake."]),
        (" Name three rivers.\nTask 8: Name a lake.", ["Name three rivers.", "Name a lake."]),
        (" Name three rivers.\n- 8. \u201cName a lake.\u201d", ["Name three rivers.", "Name a lake."]),
        (" Name three rivers.\nThese are all.\n8. Name a lake.", ["Name three rivers."]),
        ("\nHere is one:\n8. Name a lake.", []),
        (' Say "yes" or "no"', ['Say "yes" or "no"']),
        (' "Yes" or "no": which is longer?', ['"Yes" or "no": which is longer?']),
        (" Explain this: why is the sky blue?", ["Explain this: why is the sky blue?"]),
        (" Tasks are hard: name one.", ["Tasks are hard: name one."]),
        (" 3.5 is more than 3: why?", ["3.5 is more than 3: why?"]),
        (
            "\u5199\u4e00\u9996\u8bd7\u3002\n8\u3001\u5199\u4e00\u5c01\u4fe1",
            ["\u5199\u4e00\u9996\u8bd7\u3002", "\u5199\u4e00\u5c01\u4fe1"],
        ),
        ("", []),
        ("\n8.\n", []),
    ],
)
def test_a_list_that_goes_on_is_read_line_by_line(text, expected):
    assert parse_instructions(text, finished=True) == expected


def test_the_last_line_of_a_list_cut_at_the_limit_does_not_count():
    text = " Name three rivers.\n8. Name a lake that is"
    assert parse_instructions(text, finished=False) == ["Name three rivers."]
    assert parse_instructions(text, finished=True)[1:] == ["Name a lake that is"]
    assert parse_instructions(" Name three riv", finished=False) == []


def test_words_are_compared_without_case_and_punctuation():
    assert words('Don\'t  say "NO", (please)!') == ["don't", "say", "no", "please"]
    assert words("\uff21\uff22\uff23 - 12%") == ["abc", "12"]
    assert normalised("Name THREE rivers!") == normalised("name three   rivers.")
    hindi = ["\u0939\u093f\u0928\u094d\u0926\u0940", "\u092e\u0947\u0902"]
    assert words(" ".join(hindi) + "\u0964") == hindi


def test_scripts_without_spaces_count_characters():
    assert words("\u5199\u9996GPT-4\u7684\u8bd7\u3002") == ["\u5199", "\u9996", "gpt-4", "\u7684", "\u8bd7"]
    assert words("\u30c6\u30b9\u30c8\u3067\u3059") == list("\u30c6\u30b9\u30c8\u3067\u3059")
    assert words("\ud55c\uad6d\uc5b4 \ubb38\uc7a5") == ["\ud55c\uad6d\uc5b4", "\ubb38\uc7a5"]


def lcs(first, second):
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, one in enumerate(first):
        for j, other in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if one == other else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_similarity_is_rouge_l():
    first, second = words("Name three long rivers of Europe"), words("Name two rivers of North Europe")
    # The longest common subsequence is name, rivers, of, europe: 4 of 6 and 6 words.
    assert lcs(first, second) == 4
    assert rouge_l(first, second) == pytest.approx(2 * 4 / 12)
    for one, other in ((first, first[:3]), (second, list(reversed(second))), (first, ["no"])):
        precision, recall = lcs(one, other) / len(other), lcs(one, other) / len(one)
        f1 = 2 * precision * recall / (precision + recall) if precision else 0.0
        assert rouge_l(one, other) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("Name three rivers.", None),
        ("", "no whole instruction"),
        ("Name rivers.", "too short"),
        ("\u8bf4\u8bf4\u6cb3", None),
        ("word " * 11, "too long"),
        ("Describe the picture of a cat.", "not a text task"),
        ("Transcribe this video in English.", "not a text task"),
        ("Imagine a world of images.", "not a text task"),
        ("Imagine a world without rain.", None),
        ("\u63cf\u8ff0\u8fd9\u5f20\u56fe\u7247\u3002", "not a text task"),
        ("As an AI, tell me a joke.", "not a text task"),
        ("Fix this:\n```python\nprint(", "debris"),
        ("Fix this:\n```\nprint(1)\n```", None),
        ("Name three<|im_start|> rivers.", "debris"),
        ("Name three \ufffd rivers.", "debris"),
        ("Name three \x00 rivers.", "debris"),
    ],
)
def test_faults_of_instructions(text, fault):
    assert instruction_fault(text, 3, 10) == fault


@pytest.mark.parametrize(
    ("text", "finished", "fault"),
    [
        ("The Rhine, the Rhone and the Danube.", True, None),
        ("4", True, None),
        ("", True, "answer: empty"),
        (" ...\n", True, "answer: empty"),
        ("The Rhine, the Rh", False, "answer: cut off"),
        ("Name three rivers.", True, "answer: repeats the instruction"),
        ("As an AI language model, I cannot.", True, "answer: speaks as a machine"),
        ("```\nx = 1", True, "answer: debris"),
        ("The Rhine is a river. The Rhine is a river. The Rhine is a river.", True, "answer: goes round in circles"),
    ],
)
def test_faults_of_answers(text, finished, fault):
    assert answer_fault(text, "Name three rivers.", finished) == fault


def test_going_round_in_circles_is_more_than_half_of_the_triples():
    assert not circles(words("a b c d e f g h i j"))
    assert circles(words("yes yes yes yes yes yes yes yes"))
    assert not circles(words("yes yes yes yes yes yes yes"))  # too short to tell
    assert not circles(words("the cat and the dog and the bird and the fish swim"))
