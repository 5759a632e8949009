"""The rows that a synthesize stage has written, with what later rows depend on in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rlhf.data.synthesized import CHATS, REJECTED, Chat, Rejected, each_chat, each_rejected
from rlhf.stages.appended import AppendedFiles
from rlhf.stages.pool import Pool


class Written:
    """Chats and rejected drafts. A `StageRecovery` keeps `files`.

    `own` are the new instructions by name, in the order in which they were kept, and `pool` the seeds and these.
    """

    def __init__(self, folder: Path, stage: str, seeds: Sequence[tuple[str, str]]) -> None:
        self.folder = folder
        self.files = AppendedFiles(folder, (CHATS, REJECTED), stage)
        self.own: list[tuple[str, str]] = []
        self.pool = Pool(seeds)
        self.reasons: Counter[str] = Counter()
        self.chats: list[Chat] = []
        self.rejected: list[Rejected] = []

    def begin(self, resumed: bool) -> None:
        """Read the files if the stage is `resumed`, otherwise empty them."""
        if not resumed:
            self.files.clear()
            return
        for chat in each_chat(self.folder):
            self._enter(chat)
        self.reasons.update(item.reason for item in each_rejected(self.folder))

    def keep(self, chat: Chat) -> None:
        """Add a chat."""
        self.chats.append(chat)
        self._enter(chat)

    def reject(self, item: Rejected) -> None:
        """Add a rejected draft."""
        self.rejected.append(item)
        self.reasons[item.reason] += 1

    def flush(self) -> None:
        """Append the new rows to the files."""
        self.files.append(CHATS, map(asdict, self.chats))
        self.files.append(REJECTED, map(asdict, self.rejected))
        self.chats, self.rejected = [], []

    def _enter(self, chat: Chat) -> None:
        self.own.append((chat.id, chat.instruction))
        self.pool.add(chat.id, chat.instruction)
