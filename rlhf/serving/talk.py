"""Models that one can talk to: in this process, or behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rlhf.errors import DataError, RecipeError, TrainingError
from rlhf.proxies import proxy_for

if TYPE_CHECKING:
    from openai import OpenAI

Message = Mapping[str, str]
ANSWERS_S = 300.0


@dataclass(frozen=True)
class Style:
    """How answers are drawn: temperature 0 is greedy; the same seed gives the same answers in process."""

    temperature: float = 0.7
    max_tokens: int = 256
    seed: int = 0


class Talker(Protocol):
    """Answers conversations."""

    name: str

    def reply(self, messages: Sequence[Message], style: Style) -> Iterator[str]:
        """Yield the answer in pieces, as they come; DataError where the conversation is too long."""
        ...


class LocalTalker:
    """A model folder that transformers runs in this process."""

    def __init__(self, name: str, folder: Path) -> None:
        import torch

        from rlhf.models.loading import load_causal
        from rlhf.models.tokenizer import load_tokenizer
        from rlhf.serving.dtype import served_dtype

        self.name = name
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.positions: int | None = config.get("max_position_embeddings")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_causal(folder, served_dtype(folder)).to(self.device).eval()
        self.tokenizer = load_tokenizer(folder)

    def reply(self, messages: Sequence[Message], style: Style) -> Iterator[str]:
        """Yield the answer in pieces, as they come; DataError where the conversation is too long."""
        import torch
        from transformers import GenerationConfig, TextIteratorStreamer

        tokens = self.tokenizer.prompt_ids(messages)
        if self.positions and len(tokens) + style.max_tokens > self.positions:
            raise DataError(
                f"the conversation has {len(tokens)} tokens; with {style.max_tokens} for the answer that exceeds the"
                f" {self.positions} of {self.name}: /reset, or a lower --max-tokens"
            )
        pieces = TextIteratorStreamer(self.tokenizer.hf, skip_prompt=True, skip_special_tokens=True)
        prompt = torch.tensor([tokens], device=self.device)
        drawn = {"do_sample": True, "temperature": style.temperature} if style.temperature else {"do_sample": False}
        config = GenerationConfig(
            max_new_tokens=style.max_tokens,
            eos_token_id=list(self.tokenizer.eos_ids),
            pad_token_id=self.tokenizer.pad_id,
            **drawn,
        )
        failed: list[BaseException] = []

        def generate() -> None:
            try:
                torch.manual_seed(style.seed + len(messages))
                self.model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), generation_config=config, streamer=pieces
                )
            except BaseException as error:  # raised again below, in the thread that waits
                failed.append(error)
                pieces.end()

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        yield from pieces
        thread.join()
        if failed:
            raise failed[0]


class ServedTalker:
    """A model that an endpoint knows by its name."""

    def __init__(self, name: str, client: OpenAI) -> None:
        self.name = name
        self.client = client

    def reply(self, messages: Sequence[Message], style: Style) -> Iterator[str]:
        """Yield the answer in pieces, as they come; DataError where the endpoint refuses, TrainingError otherwise."""
        from openai import APIStatusError, OpenAIError

        try:
            stream: Any = self.client.chat.completions.create(
                model=self.name,
                messages=[dict(one) for one in messages],
                temperature=style.temperature,
                max_tokens=style.max_tokens,
                seed=style.seed + len(messages),
                stream=True,
            )
            for event in stream:
                if event.choices and (piece := event.choices[0].delta.content):
                    yield piece
        except APIStatusError as error:
            raise DataError(f"{self.name}: the server refuses: {error.message}") from error
        except OpenAIError as error:
            raise TrainingError(f"{self.name}: no answer: {error}") from error


@contextmanager
def _without_openai_variables() -> Iterator[None]:
    """Hide the variables that are for OpenAI's own service: the client would send what they hold to any server."""
    held = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("OPENAI_")}
    try:
        yield
    finally:
        os.environ.update(held)


def served_talkers(url: str, names: Sequence[str], key: str) -> list[ServedTalker]:
    """Return the named models of an endpoint, or all that it has; RecipeError where it is not there or lacks one."""
    from openai import DefaultHttpxClient, OpenAI, OpenAIError

    base = url.rstrip("/")
    with _without_openai_variables():
        client = OpenAI(
            base_url=base if base.endswith("/v1") else f"{base}/v1",
            api_key=key or "none",
            timeout=ANSWERS_S,
            max_retries=0,
            http_client=DefaultHttpxClient(proxy=proxy_for(url), trust_env=False, follow_redirects=False),
        )
    try:
        known = [model.id for model in client.models.list()]
    except OpenAIError as error:
        raise RecipeError(f"--url {url}: {error}; is `rlhf serve` running there?") from error
    wanted = [name if name in known else name.rstrip("/").rpartition("/")[2] for name in names] or known
    if missing := [name for name in wanted if name not in known]:
        raise RecipeError(f"--url {url} serves no {missing[0]}; it has {', '.join(known)}")
    return [ServedTalker(name, client) for name in wanted]
