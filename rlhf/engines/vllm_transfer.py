"""What this system adds to vLLM's weight-transfer interface: shared memory for engines on the CPU, and NCCL in buckets.

Importing this module registers the backend `shared_memory` on the engines' side. It loads vLLM (about 2 s), so import
it where a transfer is about to happen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer import (
    ParamMeta,
    WeightSource,
    WeightTransferEngine,
    WeightTransferEngineFactory,
)
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from rlhf.engines.shared_memory import BUCKET_BYTES, Bucket, Inbox, Weights


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """What an engine must know beforehand: nothing."""


class SharedMemoryEngine(WeightTransferEngine[SharedMemoryInitInfo, Bucket]):
    """The receiving side, in vLLM's worker."""

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = Bucket

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._inbox = Inbox()
        self._layers = list(self.model.modules())
        self._heads = [layer for layer in self._layers if isinstance(layer, ParallelLMHead)]
        for layer in self._layers:
            if any(_tied(layer, head) for head in self._heads):
                layer.quant_method = LookupOnly()
                del layer.cpu_linear

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        """Begin to reload layer by layer."""
        self._inbox.begin()
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Bucket) -> None:
        """Verify one bucket and load it; on failure the layers are closed, so that a later update starts afresh."""
        try:
            self.model.load_weights(self._inbox.receive(update_info))
            self._keep_waiting()
        except BaseException:
            finalize_layerwise_reload(self.model, self.model_config)
            raise

    def finish_weight_update(self) -> None:
        """Close the layers, then pack the LM head again.

        With tied embeddings the reload copies into the embedding's storage, but the CPU's GEMM multiplies by a packed
        copy that only the LM head's own `process_weights_after_loading` renews.
        """
        finalize_layerwise_reload(self.model, self.model_config)
        for head in self._heads:
            head.quant_method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        """Nothing to disconnect."""

    def _keep_waiting(self) -> None:
        """Copy the tensors of layers that wait for more: their bucket is about to be filled with the next ones."""
        for layer in self._layers:
            for _, arguments in get_layerwise_info(layer).loaded_weights:
                for name, value in arguments.arguments.items():
                    if isinstance(value, Tensor) and not value.is_meta:
                        arguments.arguments[name] = value.clone()


class LookupOnly(UnquantizedEmbeddingMethod):
    """An embedding beside a tied LM head: only its rows are read, so no packed copy is made for the GEMM."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Leave the rows as they are."""


def _tied(layer: torch.nn.Module, head: ParallelLMHead) -> bool:
    """Return whether an embedding that vLLM packed for a GEMM shares the weight of an LM head, which has the GEMM."""
    if not isinstance(layer, VocabParallelEmbedding) or isinstance(layer, ParallelLMHead):
        return False
    packed = type(layer.quant_method) is UnquantizedEmbeddingMethod and hasattr(layer, "cpu_linear")
    return packed and layer.weight is head.weight


class BucketedNccl(NCCLTrainerWeightTransferEngine):
    """vLLM's NCCL sender in one pass: each bucket is announced and broadcast by itself.

    vLLM's own announces all tensors at once, for which it needs a pass of its own, and keeps tensors that a sharded
    policy gives only one at a time.
    """

    def send_weights(self) -> None:
        """Send the source; ranks other than 0 only take part in gathering it."""
        assert self.source is not None
        if not self.is_sender:
            for _ in self.source:
                pass
            return
        self.client.start_weight_update()
        for bucket in buckets(self.source, BUCKET_BYTES):
            self._send_bucket(bucket)
        self.client.finish_weight_update()
        self._post_send_sync()

    def _send_bucket(self, bucket: list[tuple[str, Tensor]]) -> None:
        """Broadcast while the engines receive; the thread is not joined, as it hangs where a peer has died."""
        announcement = described(bucket)
        thread = ThreadPoolExecutor(max_workers=1)
        try:
            received = thread.submit(self.client.update_weights, announcement)
            metadata = [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in bucket]
            self._broadcast(bucket, metadata)
            received.result()
        finally:
            thread.shutdown(wait=False)


class ReplayedSource(WeightSource):
    """Weights from a function that starts a fresh pass each time."""

    def __init__(self, weights: Callable[[], Weights]) -> None:
        self._weights = weights

    def metadata(self) -> list[ParamMeta]:
        """Return names, dtypes and shapes, at the price of one pass."""
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._weights()


def buckets(weights: Weights, bucket_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Yield copies of the weights, as many together as fit; a larger tensor goes alone."""
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in weights:
        if bucket and size + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor.detach().clone(memory_format=torch.contiguous_format)))
        size += tensor.nbytes
    if bucket:
        yield bucket


def described(weights: Weights) -> dict[str, Any]:
    """Return names, dtypes and shapes as NCCL and IPC announce them."""
    items = [(name, tensor.dtype, list(tensor.shape)) for name, tensor in weights]
    return {
        "names": [name for name, _, _ in items],
        "dtype_names": [str(dtype).removeprefix("torch.") for _, dtype, _ in items],
        "shapes": [shape for _, _, shape in items],
    }


WeightTransferEngineFactory.register_engine("shared_memory", SharedMemoryEngine)
