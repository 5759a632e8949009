"""The language-model head, where it is one matrix product and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.models.tuning import unwrapped

_plain: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def plain_head(model: PreTrainedModel | PeftModel) -> Tensor | None:
    """Return the head's weight, `[V, H]`, if logits are its product with the last hidden states; None otherwise.

    Not plain are heads with a bias or adapters, models that scale or cap their logits (Cohere, Granite, Gemma 2), and
    weights that are cut over ranks.
    """
    plain = unwrapped(model)
    head = plain.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or hasattr(head.weight, "ds_id"):
        return None
    if plain not in _plain:
        _plain[plain] = _is_all(plain, head)
    return head.weight if _plain[plain] else None


def last_hidden(model: PreTrainedModel | PeftModel, inputs: Mapping[str, Any]) -> Tensor:
    """Return the last hidden states at every position of the inputs of the model's forward pass, `[B, T, H]`."""
    return unwrapped(model).base_model(**inputs).last_hidden_state


def vocabulary(model: PreTrainedModel | PeftModel) -> int:
    """Return how many logits the model has for a token."""
    return unwrapped(model).config.vocab_size


@torch.no_grad()
def _is_all(model: PreTrainedModel, head: nn.Linear) -> bool:
    """Let the model turn a hidden state into logits, and see whether they are the head's, bit for bit."""
    states = torch.linspace(-3, 3, head.in_features, dtype=head.weight.dtype, device=head.weight.device)[None, None]
    body = model.base_model
    body.forward = lambda *_, **__: _Output(last_hidden_state=states)
    try:
        logits = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=states.device), use_cache=False).logits
    finally:
        del body.forward
    return torch.equal(logits, head(states))


class _Output(SimpleNamespace):
    """What a model's body returns, its states alone."""

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]
