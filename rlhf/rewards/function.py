"""Rewards from a Python function of the user's: `score(prompt, response, metadata) -> float`."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from rlhf.errors import RecipeError, TrainingError
from rlhf.roles import Ready

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf.roles import Pending
    from rlhf.types import Prompt, Rollout

RewardFunction = Callable[[str, str, Mapping[str, Any]], float]


def load_function(path: str) -> RewardFunction:
    """Import `file.py:name` and return the function; RecipeError says what is wrong with the file, and where."""
    file, _, name = path.rpartition(":")
    if not Path(file).is_file():
        raise RecipeError(f"{file}: no such file (a reward function is given as file.py:function)")
    function = getattr(_import(Path(file)), name, None)
    if function is None:
        raise RecipeError(f"{file}: has no function '{name}'")
    if not callable(function):
        raise RecipeError(f"{file}: '{name}' is not a function but {function!r:.80}")
    return function


class FunctionReward:
    """A `RewardSource` that calls the function once for each response, in this process."""

    def __init__(self, path: str) -> None:
        self.file, _, self.name = path.rpartition(":")
        self.function = load_function(path)

    def score(self, rollouts: Sequence[Rollout]) -> Pending[Tensor]:
        """Return the scores of rollouts, `[B]` float32."""
        scores = self.score_texts([item.prompt for item in rollouts], [item.text for item in rollouts])
        return Ready(torch.tensor(scores, dtype=torch.float32))

    def score_texts(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Score responses; TrainingError when the function raises or returns anything but a finite number."""
        return [self._score(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]

    def _score(self, prompt: Prompt, response: str) -> float:
        try:
            value = self.function(prompt.text, response, prompt.metadata)
        except Exception as error:
            line = _line_in(Path(self.file), error) or self._line()
            raise self._failure(line, f"raised {_describe(error)}", prompt) from error
        if not isinstance(value, Real) or not math.isfinite(value):
            raise self._failure(self._line(), f"returned {value!r:.80}, not a finite number", prompt)
        return float(value)

    def _failure(self, line: int, what: str, prompt: Prompt) -> TrainingError:
        return TrainingError(f"{self.file}:{line}: {self.name}() {what} (prompt id {prompt.id})")

    def _line(self) -> int:
        code = getattr(self.function, "__code__", None)
        return code.co_firstlineno if code else 1


def _import(file: Path) -> ModuleType:
    resolved = file.resolve()
    name = f"rlhf_reward_{file.stem}_{hashlib.sha256(str(resolved).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, resolved)
    if spec is None or spec.loader is None:
        raise RecipeError(f"{file}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise RecipeError(f"{file}:{_line_in(file, error) or 1}: cannot be imported: {_describe(error)}") from error
    return module


def _line_in(file: Path, error: Exception) -> int | None:
    """Return the innermost line of `file` that the error passed through, or that cannot be parsed."""
    resolved = file.resolve()
    if isinstance(error, SyntaxError) and error.filename == str(resolved):
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == resolved]
    return lines[-1] if lines else None


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
