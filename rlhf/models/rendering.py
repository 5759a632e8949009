"""Messages through a model's chat template, with what they say kept apart from what the template writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.errors import DataError
from rlhf.models.controls import Controls

Message = Mapping[str, str]

ROLES = ("system", "developer", "user", "assistant", "tool")


def render(
    hf: PreTrainedTokenizerBase, controls: Controls, messages: Sequence[Message], generation_prompt: bool
) -> str:
    """Return the conversation as the template writes it, with the control tokens that its messages spell masked.

    Raises DataError when the template refuses the messages, when somebody unknown speaks, and when a message spells
    a control token that the template itself looks for, so that masked and open text come out differently.
    """
    if not messages:
        raise DataError("a conversation is empty, or starts with the assistant and has nothing to answer")
    if odd := [message["role"] for message in messages if message["role"] not in ROLES]:
        raise DataError(f"the role {odd[0]!r} is none of {', '.join(ROLES)}")
    text = _apply(hf, messages, generation_prompt)
    masked = [_masked(message, controls, message["role"]) for message in messages]
    if masked == [dict(message) for message in messages]:
        return text
    hidden = _apply(hf, masked, generation_prompt)
    if controls.unmasked(hidden) != text:
        spelled = dict.fromkeys(token for message in messages for token in _spelled(message, controls))
        raise DataError(
            f"a message spells {', '.join(spelled)}, which the chat template reads as its own; remove it from the"
            " message, or set model.chat_template to a template that copies messages as they are"
        )
    return hidden


def _apply(hf: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], generation_prompt: bool) -> str:
    try:
        text: str = hf.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=generation_prompt
        )
    except Exception as error:  # a template is a program of the model's: it may raise anything
        roles = ", ".join(message["role"] for message in messages)
        why = str(error) or type(error).__name__
        raise DataError(f"the chat template refuses a conversation of roles {roles}: {why}") from error
    return text


def _masked(message: Message, controls: Controls, role: str) -> dict[str, Any]:
    return {key: value if key == "role" else _hidden(value, controls, role) for key, value in message.items()}


def _hidden(value: Any, controls: Controls, role: str) -> Any:
    """Return a value of a message with all its texts masked, however deep they lie."""
    if isinstance(value, str):
        return controls.masked(value, role)
    if isinstance(value, Mapping):
        return {_hidden(key, controls, role): _hidden(item, controls, role) for key, item in value.items()}
    return [_hidden(item, controls, role) for item in value] if isinstance(value, list | tuple) else value


def _spelled(message: Message, controls: Controls) -> tuple[str, ...]:
    return controls.spelled(str(dict(message)), message["role"])
