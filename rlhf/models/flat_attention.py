"""Attention within the segments of a flat batch, registered with transformers for every model that can use it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from rlhf.models.flat import FlatBatch, Segment
from rlhf.models.tuning import unwrapped

NAME = "rlhf_flat"
SHORT = {torch.bfloat16: 1024, torch.float32: 512}
"""Keys up to which plain matrix products on a CPU beat torch's flash kernel, whose backward is slow there."""

BLOCK = 256
"""Queries multiplied with their keys at once: a longer segment is cut, so as not to compute what causality hides."""

TILE = 32
"""Queries and keys of a product on a CPU come in multiples of it: oneDNN compiles a kernel for
every new shape, which takes longer than the product of a short segment."""

LAYERS = {"full_attention", "sliding_attention"}


def use_flat_attention(model: PreTrainedModel) -> None:
    """Let the model take flat batches, if all that mixes its positions is plain or sliding causal attention."""
    if _fits(model):
        model.set_attn_implementation(NAME)


def runs_flat(model: nn.Module) -> bool:
    """Return whether the model takes flat batches, and no others."""
    return isinstance(model, PreTrainedModel | PeftModel) and unwrapped(model).config._attn_implementation == NAME


def _fits(model: PreTrainedModel) -> bool:
    config = model.config
    if not model._supports_attention_backend or model._is_stateful:
        return False
    if getattr(config, "attention_dropout", 0) or getattr(config, "attn_logit_softcapping", None):
        return False
    if not LAYERS.issuperset(getattr(config, "layer_types", None) or LAYERS):
        return False
    return not any(hasattr(module, "sinks") for module in model.modules())


def flat_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    flat: FlatBatch | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return the attention's output, `[1, N, heads, size]`: transformers' interface, `flat` is handed to the model.

    query `[1, heads, N, size]`; key and value `[1, key heads, N, size]`.
    """
    if flat is None or not getattr(module, "is_causal", True):
        raise TypeError(f"{type(module).__name__} attends to a flat batch, and got none")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = sliding_window if sliding_window and sliding_window < flat.longest else None
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        return _varlen(q, k, v, scale, window, flat)[None], None
    if not q.is_cuda and flat.longest <= SHORT.get(q.dtype, 0):
        masks = _Masks(flat.longest, q.shape[1] // k.shape[1], window, q)
        tiles = tuple(_Tile(part) for segment in flat.segments for part in segment.cut(BLOCK))
        return _Products.apply(q, k, v, scale, masks, tiles)[None], None
    return _segment_by_segment(q, k, v, scale, window, flat.segments)[None], None


def _varlen(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, flat: FlatBatch) -> Tensor:
    """Use torch's kernel for sequences of different lengths; the last query of a segment sees its last key."""
    from torch.nn.attention.varlen import varlen_attn

    if flat.key_index is not None:
        k, v = k.index_select(0, flat.key_index), v.index_select(0, flat.key_index)
    bounds = (flat.query_bounds, flat.key_bounds)
    longest = (max(segment.queries for segment in flat.segments), flat.longest)
    left = -1 if window is None else window - 1
    grouped = q.shape[1] != k.shape[1]
    out = varlen_attn(q, k, v, *bounds, *longest, scale=scale, window_size=(left, 0), enable_gqa=grouped)
    assert isinstance(out, Tensor)
    return out


def _segment_by_segment(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, segments: tuple[Segment, ...]
) -> Tensor:
    """Use torch's attention for one segment after the other, `[N, heads, size]`."""
    cut = [segment.queries for segment in segments]
    queries, keys, values = (states.split(cut) for states in (q, k, v))
    at = {(segment.start, segment.stop): number for number, segment in enumerate(segments)}
    parts = []
    for number, segment in enumerate(segments):
        trunk = at.get(segment.prefix)
        seen = [number] if trunk is None else [trunk, number]
        own = (queries[number], *(torch.cat([states[i] for i in seen]) for states in (keys, values)))
        plain = trunk is None and window is None
        mask = None if plain else _allowed(segment, window, q.device)
        query, key, value = (states.transpose(0, 1)[None] for states in own)
        out = scaled_dot_product_attention(query, key, value, mask, 0.0, plain, scale=scale, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def _allowed(segment: Segment, window: int | None, device: torch.device) -> Tensor:
    """Return which keys each query of a segment sees, `[queries, keys]` bool."""
    last = torch.arange(segment.keys - segment.queries, segment.keys, device=device)[:, None]
    keys = torch.arange(segment.keys, device=device)
    return (keys <= last) if window is None else (keys <= last) & (keys > last - window)


@dataclass(frozen=True)
class _Tile:
    """A part of a segment with the tokens behind it that fill its products up to whole multiples of TILE.

    The first `queries` tokens from the part's start, and `keys` from the start of its prefix and segment; what is not
    the part's own is computed and dropped. Zeros stand in where the row ends, so that a tile's shape, and with it what
    is rounded how, does not depend on where in a row it stands.
    """

    part: Segment

    @property
    def queries(self) -> int:
        return _whole(self.part.queries)

    @property
    def keys(self) -> int:
        return _whole(self.part.keys)


def _whole(count: int) -> int:
    return -(-count // TILE) * TILE


def _rows(states: Tensor, start: int, count: int) -> Tensor:
    """Return `[count, heads, size]` from `start` on, zeros behind the row's end."""
    rows = states[start : start + count]
    return rows if len(rows) == count else pad(rows, (0, 0, 0, 0, 0, count - len(rows)))


class _Masks:
    """What is added to the scores of a segment: 0 where a query sees a key, -inf elsewhere."""

    def __init__(self, longest: int, groups: int, window: int | None, like: Tensor) -> None:
        longest += TILE
        allowed = _allowed(Segment(0, longest), window, like.device)
        self.whole = torch.zeros(longest, longest, dtype=like.dtype).masked_fill(~allowed, float("-inf"))
        self.groups = groups

    def of(self, tile: _Tile) -> Tensor:
        """Return the mask of a tile for all query heads of a key head, `[1, groups * queries, keys]`."""
        first = tile.part.keys - tile.part.queries
        mask = self.whole[first : first + tile.queries, : tile.keys]
        return mask.repeat(self.groups, 1)[None]


class _Products(torch.autograd.Function):
    """softmax(q k' * scale + mask) v, tile by tile and by batched matrix products."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, masks: _Masks, tiles: tuple[_Tile, ...]
    ) -> Tensor:
        """Map q `[N, heads, size]` and k, v `[N, key heads, size]` to `[N, heads, size of v]`."""
        out = q.new_empty(*q.shape[:2], v.shape[-1])
        learns = any(ctx.needs_input_grad)
        kept = []
        for tile in tiles:
            queries, keys, values = _queries(q, tile, k.shape[1]), _keys(k, tile), _keys(v, tile)
            scores = torch.baddbmm(masks.of(tile), queries, keys.transpose(1, 2), alpha=scale)
            weights = scores.softmax(-1)
            _put_queries(out, tile, torch.bmm(weights, values))
            if learns:
                weights.unflatten(1, (-1, tile.queries))[:, :, tile.part.queries :] = 0
                kept.append(weights)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scale, ctx.tiles = scale, tiles
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of q, k and v; those of a shared prefix are the sum over all who see it."""
        q, k, v, *weights = ctx.saved_tensors
        (grad,) = grads
        summed = any(tile.part.prefix[1] or tile.part.before for tile in ctx.tiles)
        wide = torch.float32 if summed else q.dtype
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for tile, weight in zip(ctx.tiles, weights, strict=True):
            queries, keys, values = _queries(q, tile, k.shape[1]), _keys(k, tile), _keys(v, tile)
            out = _queries(grad, tile, k.shape[1])
            _add_keys(dv, tile, torch.bmm(weight.transpose(1, 2), out))
            dweight = torch.bmm(out, values.transpose(1, 2))
            dscore = torch._softmax_backward_data(dweight, weight, -1, weight.dtype).mul_(ctx.scale)
            _put_queries(dq, tile, torch.bmm(dscore, keys))
            _add_keys(dk, tile, torch.bmm(dscore.transpose(1, 2), queries))
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _queries(states: Tensor, tile: _Tile, key_heads: int) -> Tensor:
    """Return a tile's queries by key head, `[key heads, groups * queries, size]`."""
    own = _rows(states, tile.part.start, tile.queries).unflatten(1, (key_heads, -1))
    return own.permute(1, 2, 0, 3).flatten(1, 2)


def _put_queries(states: Tensor, tile: _Tile, values: Tensor) -> None:
    """Write what `_queries` would return, the part's own alone."""
    own = states[tile.part.start : tile.part.stop].unflatten(1, (values.shape[0], -1))
    own.copy_(values.unflatten(1, (-1, tile.queries))[:, :, : tile.part.queries].permute(2, 0, 1, 3))


def _keys(states: Tensor, tile: _Tile) -> Tensor:
    """Return what a tile sees, and what is masked there, `[key heads, keys, size]`."""
    part = tile.part
    shared = part.prefix[1] - part.prefix[0]
    own = _rows(states, part.start - part.before, tile.keys - shared)
    seen = torch.cat([states[slice(*part.prefix)], own]) if shared else own
    return seen.transpose(0, 1)


def _add_keys(states: Tensor, tile: _Tile, values: Tensor) -> None:
    """Add to what `_keys` returned, the part's own alone."""
    part = tile.part
    added = values[:, : part.keys].transpose(0, 1)
    shared = part.prefix[1] - part.prefix[0]
    if shared:
        states[slice(*part.prefix)] += added[:shared]
    states[part.start - part.before : part.stop] += added[shared:]


AttentionInterface.register(NAME, flat_attention)
