"""A LoRA adapter on its way into vLLM, which serves it beside the base weights that it keeps."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from safetensors.torch import save_file
from torch import Tensor

from rlhf.engines.base import RolloutSpec
from rlhf.engines.shared_memory import Bucket, Inbox
from rlhf.errors import RecipeError, TrainingError

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

NAME, NUMBER = "policy", 1
MEMORY = Path("/dev/shm")
"""vLLM reads adapters from folders; this one is no disk."""


def serves_adapters(spec: RolloutSpec) -> bool:
    """Return whether this engine takes the policy's weights as an adapter."""
    return spec.role.engine == "vllm" and spec.role.weights == "adapter" and spec.lora is not None


def adapter_settings(spec: RolloutSpec) -> dict[str, Any]:
    """Return the arguments of `LLM` for one adapter of the spec's rank; none for weights that come merged.

    Raises:
        RecipeError: vLLM has no kernel for this rank.
    """
    if spec.lora is None or not serves_adapters(spec):
        return {}
    from vllm.config.lora import MaxLoRARanks

    ranks = [rank for rank in get_args(MaxLoRARanks) if rank >= spec.lora.r]
    if not ranks:
        raise RecipeError(
            f"vLLM serves adapters up to rank {max(get_args(MaxLoRARanks))}, and tuning.r is {spec.lora.r}: "
            "use `roles.rollout.weights: merged`"
        )
    return {"enable_lora": True, "max_lora_rank": min(ranks), "max_loras": 1, "max_cpu_loras": 1}


class ArrivingAdapter:
    """Collects the tensors of one update; `config` is PEFT's adapter_config.json."""

    def __init__(self, config: dict[str, Any], inbox: Inbox) -> None:
        self.config = config
        self.inbox = inbox
        self.tensors: dict[str, Tensor] = {}
        inbox.begin()

    def receive(self, announcement: dict[str, Any]) -> None:
        """Verify one bucket and keep a copy of its tensors."""
        self.tensors |= {name: tensor.clone() for name, tensor in self.inbox.receive(Bucket(**announcement))}

    def install(self, llm: LLM) -> LoRARequest:
        """Put it in the place of the last one, and return what requests must carry to be answered with it."""
        from vllm.lora.request import LoRARequest

        with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
            save_file(self.tensors, Path(folder) / "adapter_model.safetensors")
            (Path(folder) / "adapter_config.json").write_text(json.dumps(self.config))
            # Without `load_inplace`, vLLM goes on serving what it knows under this number, and says nothing.
            if not llm.llm_engine.add_lora(LoRARequest(NAME, NUMBER, folder, load_inplace=True)):
                raise TrainingError("vLLM did not take the policy's adapter")
        return LoRARequest(NAME, NUMBER, folder)
