"""A user's Python function as a reward, and every way in which it can fail."""

import math
import textwrap

import pytest
import torch

from rlhf.errors import RecipeError, TrainingError
from rlhf.rewards.function import FunctionReward
from rlhf.rewards.user_function import UnusableError, load_function
from rlhf.types import Prompt, Rollout

PROMPT = Prompt(id="17", tokens=(1,), text="question", metadata={"bonus": 0.5})


@pytest.fixture
def reward_file(tmp_path):
    def write(source):
        path = tmp_path / "mine.py"
        path.write_text(textwrap.dedent(source))
        return path

    return write


def test_scores_come_from_prompt_response_and_metadata(reward_file):
    path = reward_file(
        """
        def score(prompt, response, metadata):
            return len(prompt) + 10 * len(response) + metadata["bonus"]
        """
    )
    reward = FunctionReward(f"{path}:score")
    assert reward.score_texts([PROMPT, PROMPT], ["ab", ""]) == [28.5, 8.5]
    rollouts = [Rollout(PROMPT, (1,), (0.0,), text, "stop", 0, 0) for text in ("a", "abc")]
    scores = reward.score(rollouts).result()
    assert scores.dtype == torch.float32
    assert scores.tolist() == [18.5, 38.5]


def test_booleans_integers_and_numpy_numbers_are_numbers(reward_file):
    path = reward_file(
        """
        import numpy
        def score(prompt, response, metadata):
            return {"b": True, "i": 3, "n": numpy.float32(0.25)}[response]
        """
    )
    assert FunctionReward(f"{path}:score").score_texts([PROMPT] * 3, ["b", "i", "n"]) == [1.0, 3.0, 0.25]


def test_an_exception_names_the_line_that_raised_and_the_prompt(reward_file):
    path = reward_file(
        """\
        def helper(n):
            return 1 / n

        def judge(prompt, response, metadata):
            return helper(len(response))
        """
    )
    with pytest.raises(TrainingError) as error:
        FunctionReward(f"{path}:judge").score_texts([PROMPT, PROMPT], ["a", ""])
    assert str(error.value) == f"{path}:2: judge() raised ZeroDivisionError: division by zero (prompt id 17)"


def test_an_exception_inside_a_library_names_the_users_line(reward_file):
    path = reward_file(
        """\
        import json

        def judge(prompt, response, metadata):
            return json.loads(response)
        """
    )
    with pytest.raises(TrainingError) as error:
        FunctionReward(f"{path}:judge").score_texts([PROMPT], ["{"])
    assert str(error.value).startswith(f"{path}:4: judge() raised JSONDecodeError: Expecting property name")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("None", "None"),
        ("float('nan')", "nan"),
        ("math.inf", "inf"),
        ("'0.5'", "'0.5'"),
        ("[1.0]", "[1.0]"),
        ("1j", "1j"),
    ],
)
def test_what_is_not_a_finite_number_is_an_error_and_never_a_zero(reward_file, value, shown):
    path = reward_file(f"import math\n\ndef judge(prompt, response, metadata):\n    return {value}\n")
    with pytest.raises(TrainingError) as error:
        FunctionReward(f"{path}:judge").score_texts([PROMPT], ["a"])
    assert str(error.value) == f"{path}:3: judge() returned {shown}, not a finite number (prompt id 17)"


def test_a_relative_path_is_shown_as_given(reward_file, monkeypatch):
    path = reward_file("def judge(prompt, response, metadata):\n    raise KeyError\n")
    monkeypatch.chdir(path.parent)
    with pytest.raises(TrainingError) as error:
        FunctionReward("mine.py:judge").score_texts([PROMPT], ["a"])
    assert str(error.value) == "mine.py:2: judge() raised KeyError (prompt id 17)"


def test_a_number_that_float32_does_not_hold_is_an_error(reward_file):
    path = reward_file("def judge(prompt, response, metadata):\n    return float(response)\n")
    reward = FunctionReward(f"{path}:judge")
    assert reward.score_texts([PROMPT] * 2, ["3.4e38", "-3.4e38"]) == [3.4e38, -3.4e38]
    with pytest.raises(TrainingError, match=r"returned 1e\+39, not a number that float32 holds"):
        reward.score_texts([PROMPT], ["1e39"])


def test_two_files_of_one_name_do_not_meet(tmp_path):
    for folder, value in (("one", 1), ("two", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "r.py").write_text(f"VALUE = {value}\ndef f(p, r, m):\n    return VALUE\n")
    first, second = (load_function(f"{tmp_path}/{folder}/r.py:f") for folder in ("one", "two"))
    assert (first("", "", {}), second("", "", {})) == (1, 2)


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("x = 1\n", "judge", ": has no function 'judge'"),
        ("x = 1\n", "x", ": 'x' is not a function but 1"),
        ("x = 1\nimport no_such\n", "x", ":2: cannot be imported: ModuleNotFoundError: No module named 'no_such'"),
        ("x = 1\ny = {}\n\nz = y['k']\n", "x", ":4: cannot be imported: KeyError: 'k'"),
        ("x = 1\ndef f(:\n", "f", ":2: cannot be imported: SyntaxError: invalid syntax (mine.py, line 2)"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_a_recipe_error(reward_file, source, name, message):
    path = reward_file(source)
    with pytest.raises(RecipeError) as error:
        FunctionReward(f"{path}:{name}")
    assert str(error.value) == f"{path}{message}"
    with pytest.raises(UnusableError) as error:
        load_function(f"{path}:{name}")
    assert str(error.value) == f"{path}{message}"


def test_a_missing_file_is_a_recipe_error(tmp_path):
    with pytest.raises(RecipeError) as error:
        FunctionReward(f"{tmp_path}/none.py:judge")
    assert str(error.value) == f"{tmp_path}/none.py: no such file (a reward function is given as file.py:function)"


def test_the_shipped_functions_load_and_are_finite_on_any_text():
    from pathlib import Path

    rewards = Path(__file__).parents[2] / "recipes" / "rewards"
    prompt = Prompt("1", (1,), "p", {"thing": "lamp", "aspect": "size"})
    texts = ["", " ", "\ufffd\ufffd\x00", "?!" * 50, "size " * 200, "\U0001f600 :-)"]
    for file in ("reviews.py", "smoke.py"):
        for name in ("gold", "judge"):
            scores = FunctionReward(f"{rewards / file}:{name}").score_texts([prompt] * len(texts), texts)
            assert all(math.isfinite(score) for score in scores)
