"""KTO: single responses, desirable or not, against a reference point that every batch estimates anew."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from rlhf.algorithms.ordering import wins
from rlhf.data.collate import collate_labelled
from rlhf.data.lazy import Lazy
from rlhf.data.sequences import LabelledSequence, TokenSequence, answered
from rlhf.data.splits import digest_array, group_numbers
from rlhf.engines.preference_objectives import Kto
from rlhf.errors import DataError
from rlhf.recipe.preference_schema import KtoStage
from rlhf.roles import Reference
from rlhf.stages.context import StageContext
from rlhf.stages.epochs import train_epochs
from rlhf.stages.pairs import load_examples
from rlhf.stages.reference_cache import reference_sums, response_sums
from rlhf.stages.sft import Summary
from rlhf.types import LabelledBatch


@dataclass(frozen=True)
class Example:
    """A labelled response, its mismatch, and the sums of the reference's logprobs over the response in both."""

    labelled: LabelledSequence
    mismatched: TokenSequence
    ref_logprob: float
    mismatched_ref_logprob: float


def run(stage: KtoStage, context: StageContext) -> Summary:
    """Train on the responses and save the merged policy; `heldout_*` are measured against their own reference point.

    The policy before its first step is the reference, so its logprobs are computed once, up front, unless an earlier
    run has left them. What the methods on pairs call accuracy is `heldout_pair_accuracy`, where the held-out responses
    come in pairs.
    """
    tokenizer = context.tokenizer(stage.policy)
    split = load_examples(stage, context, tokenizer)
    spec = context.trained("policy", "causal", stage.policy, stage.optimizer, stage.tuning)
    policy = context.launcher.policy(spec)
    prompts = Lazy(lambda i: _split(split.train[i].sequence)[0], len(split.train))
    sides = [(rows, mismatches(rows, prompts, stage.max_length)) for rows in (split.train, split.heldout)]
    groups = [sequences for rows, others in sides for sequences in (_sequences(rows), others)]
    sums = reference_sums(policy, spec, groups, tokenizer.pad_id, context)
    train, heldout = (
        _examples(*side, own, mixed) for side, own, mixed in zip(sides, sums[::2], sums[1::2], strict=True)
    )
    batch = partial(labelled_batch, policy, pad_id=tokenizer.pad_id)
    objective = Kto(stage.beta, stage.desirable_weight, stage.undesirable_weight)
    trained = train_epochs(policy, train, batch, objective, stage, context, heldout)
    summary: Summary = {"rows": len(train), "desirable": sum(row.labelled.desirable for row in train) / len(train)}
    summary |= {"heldout_rows": len(heldout), **trained.summary()}
    if heldout and split.paired:
        summary["heldout_pair_accuracy"] = pair_accuracy(policy, heldout, tokenizer.pad_id)
    context.save(policy)
    return summary


def mismatches(
    rows: Sequence[LabelledSequence], prompts: Sequence[tuple[int, ...]], max_length: int
) -> Sequence[TokenSequence]:
    """Return the response of each row i after prompt i + 1, or the next one (in a circle) that is not the row's own.

    A prompt loses its beginning where the sequence would be longer than `max_length` and the longest row. Raises
    DataError when there is no other prompt.
    """
    longest = max([max_length, *(len(row.sequence.tokens) for row in rows)])
    following = _following(prompts)
    if following is None and any(_split(row.sequence)[0] == prompts[0] for row in rows):
        raise DataError("all rows have the same prompt; KTO's reference point takes responses to other prompts")

    def mismatch(index: int) -> TokenSequence:
        own, response = _split(rows[index].sequence)
        place = (index + 1) % len(prompts)
        other = prompts[place]
        if other == own and following is not None:
            other = prompts[int(following[place])]
        return answered(other[-(longest - len(response)) :], response)

    return Lazy(mismatch, len(rows))


def _following(prompts: Sequence[tuple[int, ...]]) -> np.ndarray | None:
    """Return where, after each place in the circle, the next prompt is that differs; None where all are the same."""
    alike = group_numbers(digest_array(map(_digest, prompts)))
    changes = np.flatnonzero(alike != np.roll(alike, -1)) + 1
    if not len(changes):
        return None
    after = np.searchsorted(changes, np.arange(len(alike)), "right")
    return np.append(changes, changes[0] + len(alike))[after] % len(alike)


def _sequences(rows: Sequence[LabelledSequence]) -> Sequence[TokenSequence]:
    return Lazy(lambda i: rows[i].sequence, len(rows))


def _examples(
    rows: Sequence[LabelledSequence], others: Sequence[TokenSequence], own: Sequence[float], mixed: Sequence[float]
) -> Sequence[Example]:
    return Lazy(lambda i: Example(rows[i], others[i], own[i], mixed[i]), len(rows))


def labelled_batch(policy: Reference, rows: Sequence[Example], pad_id: int) -> LabelledBatch:
    """Return the rows as a batch, with the reference point that belongs to the policy as it is now.

    z0 = max(0, mean over the rows of log p - log ref of their mismatches), an estimate of KL(p || ref) that stays
    the same however the batch is cut (Ethayarajh et al. 2024, section 4.1).
    """
    batch = collate_labelled([row.labelled for row in rows], pad_id)
    sums = response_sums(policy, [row.mismatched for row in rows], pad_id)
    kl = float((torch.tensor(sums) - torch.tensor([row.mismatched_ref_logprob for row in rows])).mean())
    return replace(
        batch,
        ref_logprobs=torch.tensor([row.ref_logprob for row in rows]),
        kl=torch.full((len(rows),), max(0.0, kl)),
    )


def pair_accuracy(policy: Reference, rows: Sequence[Example], pad_id: int) -> float:
    """Return the share of pairs (every two rows) whose desirable response has the larger log-ratio; a tie is half."""
    own = response_sums(policy, Lazy(lambda i: rows[i].labelled.sequence, len(rows)), pad_id)
    ratios = torch.tensor(own) - torch.tensor([row.ref_logprob for row in rows])
    return float(wins(ratios[::2], ratios[1::2]).mean())


def _split(sequence: TokenSequence) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the prompt and the response."""
    start = sequence.response_mask.index(True)
    return sequence.tokens[:start], sequence.tokens[start:]


def _digest(prompt: tuple[int, ...]) -> bytes:
    return hashlib.blake2b(array("q", prompt).tobytes(), digest_size=16).digest()
