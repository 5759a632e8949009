"""A chat tokenizer over bytes whose ids can be worked out by hand.

Ids 0-255 are bytes; 256 pad, 257 end-of-sequence, 258 user, 259 assistant, 260 system, 261 tool.
"""

from collections.abc import Sequence

PAD, EOS, USER, ASSISTANT, SYSTEM, TOOL = range(256, 262)
ROLE_IDS = {"user": USER, "assistant": ASSISTANT, "system": SYSTEM, "tool": TOOL}

Messages = Sequence[dict[str, str]]


class ByteTokenizer:
    pad_id = PAD
    eos_ids = (EOS,)

    def prompt_ids(self, messages: Messages) -> list[int]:
        return [*self.conversation_ids(messages)[0], ASSISTANT]

    def conversation_ids(self, messages: Messages) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        mask: list[bool] = []
        for message in messages:
            body = [*message["content"].encode(), EOS]
            ids += [ROLE_IDS[message["role"]], *body]
            mask += [False, *([message["role"] == "assistant"] * len(body))]
        return ids, mask

    def completion_ids(self, messages: Messages, response: str) -> tuple[list[int], list[int]]:
        return self.prompt_ids(messages), [*response.encode(), EOS]

    def completion_pair_ids(self, messages: Messages, responses: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        return self.prompt_ids(messages), [self.completion_ids(messages, response)[1] for response in responses]

    def spelled_controls(self, text: str, role: str = "user") -> tuple[str, ...]:
        return ()

    def identity(self) -> str:
        return "bytes"

    def text_ids(self, text: str) -> list[int]:
        return [*text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token for token in ids if token < 256).decode(errors="replace")
