"""`rlhf chat`: a conversation in the terminal, with one model or with two side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.columns import Columns
from rich.console import Console, Group
from rich.panel import Panel
from rich.text import Text

from rlhf.errors import DataError
from rlhf.serving.talk import Message, Style, Talker
from rlhf.untrusted import printable

BORDER = 6
"""Cells of a panel's width that its title cannot have."""
RESET, QUIT = "/reset", "/quit"
HELP = f"{RESET} begins anew, {QUIT} ends"


class Chat:
    """Conversations that run side by side: the same questions, each model with its own answers."""

    def __init__(self, talkers: Sequence[Talker], style: Style, console: Console) -> None:
        self.talkers = talkers
        self.style = style
        self.console = console
        self.histories: dict[str, list[Message]] = {talker.name: [] for talker in talkers}

    def run(self, lines: Iterable[str]) -> None:
        """Answer each line, until they end or one says `/quit`."""
        for line in lines:
            text = line.strip()
            if text == QUIT:
                return
            if text == RESET:
                self.histories = {talker.name: [] for talker in self.talkers}
                self._say("the conversation begins anew")
            elif text.startswith("/"):
                self._say(f"no such command; {HELP}")
            elif text:
                self.ask(text)

    def ask(self, text: str) -> None:
        """Show the answers to a text, and keep them; a question that fails is as if it had not been asked."""
        asked: Message = {"role": "user", "content": text}
        try:
            if len(self.talkers) == 1:
                answers = [self._streamed(self.talkers[0], asked)]
            else:
                answers = [self._whole(talker, asked) for talker in self.talkers]
                self._beside(answers)
        except DataError as error:
            self._say(str(error))
            return
        for talker, answer in zip(self.talkers, answers, strict=True):
            self.histories[talker.name] += [asked, {"role": "assistant", "content": answer}]

    def _streamed(self, talker: Talker, asked: Message) -> str:
        pieces = []
        for piece in talker.reply([*self.histories[talker.name], asked], self.style):
            pieces.append(piece)
            self.console.print(Text(printable(piece)), end="", soft_wrap=True)
        self.console.print()
        return "".join(pieces).strip()

    def _whole(self, talker: Talker, asked: Message) -> str:
        with self.console.status(Text(printable(f"{talker.name} ..."))):
            return "".join(talker.reply([*self.histories[talker.name], asked], self.style)).strip()

    def _beside(self, answers: Sequence[str]) -> None:
        width = max(self.console.width // len(answers) - 1, 20)
        names = [printable(talker.name) for talker in self.talkers]
        fit = max(map(cell_len, names)) <= width - BORDER
        panels = [
            Panel(Text(printable(answer)), title=Text(name), width=width)
            if fit
            else Panel(Group(Text(name, style="bold", overflow="fold"), Text(printable(answer))), width=width)
            for name, answer in zip(names, answers, strict=True)
        ]
        self.console.print(Columns(panels, padding=(0, 1)))

    def _say(self, text: str) -> None:
        self.console.print(Text(printable(text), style="dim"), soft_wrap=True)
