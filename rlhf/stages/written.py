"""What a synthesize stage has written so far: rows in its files, and in memory only what the next ones depend on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rlhf.data.synthesized import CHATS, REJECTED, Chat, Rejected, each_chat, each_rejected
from rlhf.stages.appended import AppendedFiles
from rlhf.stages.pool import Pool


class Written:
    """Chats and what was set aside. `files` are to be kept by a `StageRecovery`.

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
        """Take in what the files hold where the stage is `resumed`; empty them where it is not."""
        if not resumed:
            self.files.clear()
            return
        for chat in each_chat(self.folder):
            self._enter(chat)
        self.reasons.update(item.reason for item in each_rejected(self.folder))

    def keep(self, chat: Chat) -> None:
        """Take in a chat."""
        self.chats.append(chat)
        self._enter(chat)

    def reject(self, item: Rejected) -> None:
        """Take in what was not good enough."""
        self.rejected.append(item)
        self.reasons[item.reason] += 1

    def flush(self) -> None:
        """Append to the files what has come since the last time."""
        self.files.append(CHATS, map(asdict, self.chats))
        self.files.append(REJECTED, map(asdict, self.rejected))
        self.chats, self.rejected = [], []

    def _enter(self, chat: Chat) -> None:
        self.own.append((chat.id, chat.instruction))
        self.pool.add(chat.id, chat.instruction)
