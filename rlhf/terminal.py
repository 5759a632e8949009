"""The terminal: everything that is printed through rich goes through one console, and no text in it can act."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from rlhf.untrusted import visible


class Terminal(Console):
    """A console whose texts are shown as they are: no markup is read in them, and what would act is spelt out.

    Colours and the like come from renderables (`Text`, `Table`) alone.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

    def on_broken_pipe(self) -> None:
        """Show nothing more when nobody reads any more (`rlhf run RECIPE | head`); the work goes on."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a text for layout, with what acts spelt out."""
        return super().render_str(visible(text, None), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments of a renderable, with what acts in their texts spelt out; rich's own controls remain."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text, None), segment.style)
