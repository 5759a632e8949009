"""An Ollama `Modelfile` beside a GGUF file: its chat template in Ollama's own language, and where answers end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError

from rlhf.export.vocabulary import adds_bos
from rlhf.models.tokenizer import ChatTokenizer

Messages = Sequence[Mapping[str, str]]
Render = Callable[[Messages, bool], str]
SYSTEM, USER, ANSWER, AGAIN = "Sentinel alpha.", "Sentinel beta?", "Sentinel gamma.", "Sentinel delta?"
"""Contents by which a rendered conversation is cut into what the template puts around them."""


@dataclass(frozen=True)
class Layout:
    """A chat template that does no more than put texts around messages.

    opening   stands first where there is no system message
    around    by role, what stands before and after a message
    reply     asks for the assistant's turn
    """

    opening: str
    around: Mapping[str, tuple[str, str]]
    reply: str

    def render(self, messages: Messages, ask: bool) -> str:
        """Return a conversation as the template shows it."""
        opening = "" if messages[0]["role"] == "system" else self.opening
        turns = ("{}{}{}".format(*_wrap(self.around[one["role"]], one["content"])) for one in messages)
        return opening + "".join(turns) + (self.reply if ask else "")

    def template(self) -> str:
        """Return it in Go's template language, as Ollama reads it."""
        turns = "".join(
            f'{{{{ {"if" if role == "system" else "else if"} eq .Role "{role}" }}}}'
            f"{_go(before)}{{{{ .Content }}}}{_go(after)}"
            for role, (before, after) in self.around.items()
        )
        opening = f"{{{{ if not .System }}}}{_go(self.opening)}{{{{ end }}}}" if self.opening else ""
        return f"{opening}{{{{ range .Messages }}}}{turns}{{{{ end }}}}{{{{ end }}}}{_go(self.reply)}"


def modelfile(file: str, tokenizer: ChatTokenizer) -> str:
    """Return the Modelfile of a GGUF file beside it.

    A chat template that does more than put texts around messages has no TEMPLATE in it: Ollama then goes by the one in
    the file's metadata, and the Modelfile says so.
    """
    lines = [f"FROM ./{file}"]
    layout = read_layout(_renderer(tokenizer))
    if layout is None or '"""' in layout.template():
        lines += ["# The chat template is a program: Ollama takes the one in the file's metadata, if it knows it."]
    else:
        lines += [f'TEMPLATE """{layout.template()}"""']
    stops = tokenizer.hf.convert_ids_to_tokens(list(tokenizer.eos_ids))
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if '"' not in stop and "\n" not in stop]
    return "\n".join(lines) + "\n"


def read_layout(render: Render) -> Layout | None:
    """Return what a chat template puts around messages, None for one that does anything else."""
    user, answer = {"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}
    system, again = {"role": "system", "content": SYSTEM}, {"role": "user", "content": AGAIN}
    try:
        head, after_user = _parts(render([user], False), USER)
        asked = _parts(render([user], True), USER)[1]
        _, turn, after_answer = _parts(render([user, answer], False), USER, ANSWER)
        _, _, turned, _ = _parts(render([user, answer, again], False), USER, ANSWER, AGAIN)
        before_system, told, _ = _parts(render([system, user], False), SYSTEM, USER)
        before_user = _without_start(turned, after_answer)
        layout = Layout(
            opening=_without_end(head, before_user),
            around={
                "system": (before_system, _without_end(told, before_user)),
                "user": (before_user, after_user),
                "assistant": (_without_start(turn, after_user), after_answer),
            },
            reply=_without_start(asked, after_user),
        )
        talk = [user, answer, again, answer, user]
        trials = [[user], talk[:3], talk, [system, *talk[:1]], [system, *talk]]
        return layout if all(layout.render(trial, True) == render(trial, True) for trial in trials) else None
    except (ValueError, TemplateError):
        return None


def _parts(text: str, *marks: str) -> list[str]:
    """Cut a text at each of the marks, which come in this order."""
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            raise ValueError(mark)
        parts.append(before)
    return [*parts, text]


def _without_start(text: str, start: str) -> str:
    if not text.startswith(start):
        raise ValueError(text)
    return text[len(start) :]


def _without_end(text: str, end: str) -> str:
    if not text.endswith(end):
        raise ValueError(text)
    return text[: len(text) - len(end)]


def _wrap(around: tuple[str, str], content: str) -> tuple[str, str, str]:
    return around[0], content, around[1]


def _renderer(tokenizer: ChatTokenizer) -> Render:
    """Return the tokenizer's template as a function; a first token that Ollama adds by itself is left out."""
    bos = tokenizer.hf.bos_token if adds_bos(tokenizer.hf) else None

    def render(messages: Messages, ask: bool) -> str:
        text = tokenizer.hf.apply_chat_template(
            [dict(one) for one in messages], tokenize=False, add_generation_prompt=ask
        )
        return text.removeprefix(bos) if bos else text

    return render


def _go(text: str) -> str:
    """Return a text that stands for itself in a Go template."""
    return text.replace("{{", '{{ "{{" }}')
