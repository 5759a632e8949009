"""vLLM's batch, shared by several callers at once."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rlhf.errors import TrainingError
from rlhf.pulse import PULSE

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.llm_engine import LLMEngine


@dataclass
class Call:
    """One caller's requests; `outputs` fills up by request id, and `ended` is set when all are there or `error` is."""

    prompts: Sequence[Sequence[int]]
    parameters: Sequence[SamplingParams]
    adapter: LoRARequest | None
    ids: list[str] = field(default_factory=list)
    outputs: dict[str, RequestOutput] = field(default_factory=dict)
    error: BaseException | None = None
    ended: threading.Event = field(default_factory=threading.Event)


class SharedBatch:
    """Lets several threads generate at once: their requests run in one batch, and each gets its own back.

    One thread alone touches the engine, so on a GPU all work is on one stream. After a failed step the engine's state
    is unknown: every call, also each later one, gets the error, and none waits for ever.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine
        self.changed = threading.Condition()
        self.arrived: list[Call] = []
        self.live: list[Call] = []
        self.failure: BaseException | None = None
        self.numbers = itertools.count()
        self.thread: threading.Thread | None = None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        parameters: Sequence[SamplingParams],
        adapter: LoRARequest | None = None,
    ) -> list[RequestOutput]:
        """Return the outputs of all prompts (token ids), in their order, once the last is finished."""
        call = Call(prompts, parameters, adapter)
        with self.changed:
            if self.failure is not None:
                raise TrainingError(f"vLLM failed earlier: {_told(self.failure)}")
            if self.thread is None:
                self.thread = threading.Thread(target=self._serve, name="vllm-steps", daemon=True)
                self.thread.start()
            self.arrived.append(call)
            self.live.append(call)
            self.changed.notify_all()
        try:
            call.ended.wait()
        finally:
            with self.changed:
                self.live = [other for other in self.live if other is not call]
        if call.error is not None:
            raise TrainingError(f"vLLM failed: {_told(call.error)}") from call.error
        return [call.outputs[request] for request in call.ids]

    def _serve(self) -> None:
        """Step the engine while there is work; the only thread that touches it."""
        owners: dict[str, Call] = {}
        try:
            while True:
                for call in self._arrivals(wait=not owners):
                    owners |= dict.fromkeys(self._admit(call), call)
                if not owners:
                    continue
                outputs = self.engine.step()
                PULSE.beat()
                for output in outputs:
                    if not output.finished or output.request_id not in owners:
                        continue
                    call = owners.pop(output.request_id)
                    call.outputs[output.request_id] = output
                    if len(call.outputs) == len(call.ids):
                        call.ended.set()
        except BaseException as error:
            self._fail(error)

    def _arrivals(self, wait: bool) -> list[Call]:
        with self.changed:
            if wait:
                self.changed.wait_for(lambda: self.arrived)
                _synchronise()
            arrived, self.arrived = self.arrived, []
        return arrived

    def _admit(self, call: Call) -> list[str]:
        """Hand a call's requests to the engine and return their ids; one that is refused ends its call alone."""
        from vllm.inputs import tokens_input

        running = []
        try:
            for prompt, parameters in zip(call.prompts, call.parameters, strict=True):
                call.ids.append(str(next(self.numbers)))
                prompt_input = tokens_input(list(prompt))
                running.append(
                    self.engine.add_request(call.ids[-1], prompt_input, parameters, lora_request=call.adapter)
                )
        except Exception as error:
            self.engine.abort_request(running, internal=True)
            call.error = error
        if call.error is not None or not call.ids:
            call.ended.set()
            return []
        return call.ids

    def _fail(self, error: BaseException) -> None:
        with self.changed:
            self.failure = error
            for call in self.live:
                if not call.ended.is_set():
                    call.error = error
                    call.ended.set()


def _told(error: BaseException) -> str:
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def _synchronise() -> None:
    """Let what other threads began on the GPU end: weights are loaded from another thread, on another stream."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
