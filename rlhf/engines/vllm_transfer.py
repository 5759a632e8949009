"""Shared memory as a backend of vLLM's weight-transfer interface, for engines on the CPU.

Importing this module registers the backend `shared_memory` on both sides. It loads vLLM (about 2 s), so import it
where a transfer is about to happen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor
from vllm.distributed.weight_transfer import (
    ParamMeta,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferEngine,
    WeightTransferEngineFactory,
    WeightTransferTrainerFactory,
)
from vllm.distributed.weight_transfer.base import TrainerInitInfo, WeightTransferInitInfo
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rlhf.engines.shared_memory import BUCKET_BYTES, Bucket, Checksum, Weights, receive, send


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """What an engine must know beforehand: nothing."""


@dataclass
class SharedMemoryTrainerInitInfo(TrainerInitInfo):
    """Settings of the sending side; `rank` 0 sends."""

    backend: ClassVar[str] = "shared_memory"
    bucket_bytes: int = BUCKET_BYTES


class SharedMemoryEngine(WeightTransferEngine[SharedMemoryInitInfo, Bucket]):
    """The receiving side, in vLLM's worker."""

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = Bucket

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        """Begin to reload layer by layer."""
        self._checksum = Checksum()
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Bucket) -> None:
        """Verify one bucket and load it; on failure the layers are closed, so that a later update starts afresh."""
        try:
            self.model.load_weights(receive(update_info, self._checksum))
        except BaseException:
            finalize_layerwise_reload(self.model, self.model_config)
            raise

    def finish_weight_update(self) -> None:
        """Close the layers, then pack the LM head again.

        With tied embeddings the reload copies into the embedding's storage, but the CPU's GEMM multiplies by a packed
        copy that only the LM head's own `process_weights_after_loading` renews.
        """
        finalize_layerwise_reload(self.model, self.model_config)
        for module in self.model.modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        """Nothing to disconnect."""


class SharedMemoryTrainer(TrainerWeightTransferEngine[SharedMemoryTrainerInitInfo]):
    """The sending side, in the policy's process."""

    init_info_cls = SharedMemoryTrainerInitInfo
    bucket_bytes: int

    @classmethod
    def trainer_init(
        cls,
        init_info: SharedMemoryTrainerInitInfo,
        *,
        client: VLLMWeightSyncClient,
        source: WeightSource | None = None,
    ) -> Self:
        """Return a sender that is ready; the engines are told that a transfer will come."""
        trainer = cls(client=client, source=source, is_sender=init_info.is_sender)
        trainer.bucket_bytes = init_info.bucket_bytes
        if trainer.is_sender:
            client.init_weight_transfer_engine({})
        return trainer

    def send_weights(self) -> None:
        """Send all weights of the source; ranks other than 0 only take part in gathering them."""
        if not self.is_sender:
            for _ in self.source:
                pass
            return
        self.client.start_weight_update()
        send(self.source, self.client.update_weights, self.bucket_bytes)
        self.client.finish_weight_update()


class ReplayedSource(WeightSource):
    """Weights from a function that starts a fresh pass each time."""

    def __init__(self, weights: Callable[[], Weights]) -> None:
        self._weights = weights

    def metadata(self) -> list[ParamMeta]:
        """Return names, dtypes and shapes, at the price of one pass (NCCL asks for them before it sends)."""
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self]

    def announcement(self) -> dict[str, Any]:
        """Return the metadata as NCCL and IPC announce it."""
        metadata = self.metadata()
        return {
            "names": [item.name for item in metadata],
            "dtype_names": [str(item.dtype).removeprefix("torch.") for item in metadata],
            "shapes": [list(item.shape) for item in metadata],
        }

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._weights()


WeightTransferEngineFactory.register_engine("shared_memory", SharedMemoryEngine)
WeightTransferTrainerFactory.register_engine("shared_memory", SharedMemoryTrainer)
