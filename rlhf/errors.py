"""Errors meant for people: one clear message each, with the exit code of the command line."""

from typing import Self

LOST_RANK = "lost another rank"
"""In the message of a rank that is not at fault itself."""


class RlhfError(Exception):
    """A failure with a message for the user; `exit_code` is what the process returns."""

    exit_code = 5

    def within(self, place: str) -> Self:
        """Return the same error with a place named before its message."""
        return type(self)(f"{place}: {self}")


class RecipeError(RlhfError):
    """The recipe or the command line is wrong."""

    exit_code = 2


class DataError(RlhfError):
    """A data file is missing, malformed or unusable; messages start with `file:line:`."""

    exit_code = 3


class ResourceError(RlhfError):
    """The machine or cluster cannot hold what the recipe asks for."""

    exit_code = 4


class TrainingError(RlhfError):
    """A stage failed while running (a role died, a reward function raised, a deadline passed)."""

    exit_code = 5


class LostProcess(TrainingError):
    """A process of a role died or no longer answers; the stage can go on from its last saved state with another."""

    def second(self) -> TrainingError:
        """Return what is said where the same call failed so twice in a row in the same place."""
        return TrainingError(f"{self}; that was the second time in the same place, so it is not tried again")


class LateProcess(LostProcess):
    """A process that is there made no progress within its deadline; `call` names role and method, as `policy.train`."""

    call = ""

    def within(self, place: str) -> Self:
        """Return it with a place named before its message."""
        error = super().within(place)
        error.call = self.call
        return error


class GuardError(RlhfError):
    """A guard stopped the run: NaN, KL ceiling, disagreement of engine and trainer, empty generations."""

    exit_code = 6
