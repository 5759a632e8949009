"""Our losses and gradients against TRL's own trainers: same models, same pairs, TRL's tokenising, padding and loss."""

from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from rlhf.algorithms.logprobs import align, selected_logprobs, sequence_logprobs
from rlhf.algorithms.preference import (
    PairLogprobs,
    PairLoss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    robust_dpo_loss,
    simpo_loss,
)
from rlhf.algorithms.reward_model import bradley_terry_loss
from rlhf.data.sequences import LabelledSequence, answered
from rlhf.stages.kto import mismatches

PAD, EOS, WORDS = 0, 1, 32
PAIRS = [  # prompt, chosen, rejected as token ids, end-of-sequence left out
    ([5, 6, 7], [8, 9, 10, 11], [12]),
    ([13, 14], [15], [16, 17, 18, 19, 20]),
    ([21, 22, 23, 24, 25], [26, 27], [28, 29, 30]),
    ([31], [2, 3, 4, 5], [6, 7]),
]


@pytest.fixture
def tokenizer():
    vocabulary = {"<pad>": PAD, "</s>": EOS} | {f"w{i}": i for i in range(2, WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w2"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


def config(**extra):
    return LlamaConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
        **extra,
    )


def settings(folder, **extra):
    """Arguments common to all trainers."""
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        **extra,
    }


def first_epoch(trainer):
    """Return the trainer's mean loss over one epoch of equal batches, and leave its gradient on the model."""
    batches = list(trainer.get_train_dataloader())
    losses = [trainer.compute_loss(trainer.model, batch) / len(batches) for batch in batches]
    sum(losses).backward()
    return torch.stack(losses).sum().detach()


def response_logprobs(model, prompts, responses):
    """Sum log p over each response and its end-of-sequence, right-padded with garbage tokens."""
    rows = [prompt + response + [EOS] for prompt, response in zip(prompts, responses, strict=True)]
    width = max(map(len, rows)) + 2
    tokens = torch.tensor([row + [9] * (width - len(row)) for row in rows])
    starts = torch.tensor([[len(prompt)] for prompt in prompts])
    ends = torch.tensor([[len(row)] for row in rows])
    positions = torch.arange(width)
    logits = model(input_ids=tokens, attention_mask=(positions < ends).long()).logits
    logprobs = align(selected_logprobs(logits[:, :-1], tokens[:, 1:]))
    return sequence_logprobs(logprobs, (positions >= starts) & (positions < ends))


def text(tokens):
    return "".join(f" w{token}" for token in tokens)


def assert_same_gradient(ours, theirs):
    gradients = [{name: p.grad for name, p in model.named_parameters()} for model in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@dataclass(frozen=True)
class PairCase:
    """A loss of ours and TRL's settings for it.

    Where TRL takes a mean over all tokens of a batch and we one over each pair's own, a batch is one pair: there both
    are the same.
    """

    ours: PairLoss
    trl: dict[str, Any]
    pairs_per_batch: int


DPO = {
    "dpo": PairCase(partial(dpo_loss, beta=0.3), {"loss_type": ["sigmoid"]}, 4),
    # TRL has cDPO only inside its optimal-transport loss, which over a single pair is cDPO itself.
    "cdpo": PairCase(
        partial(dpo_loss, beta=0.3, label_smoothing=0.1), {"loss_type": ["aot_unpaired"], "label_smoothing": 0.1}, 1
    ),
    "length_normalised": PairCase(
        partial(dpo_loss, beta=0.3, length_normalised=True), {"loss_type": ["sigmoid_norm"]}, 4
    ),
    "nll": PairCase(
        partial(dpo_loss, beta=0.3, nll_coef=0.7), {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}, 1
    ),
    "robust": PairCase(
        partial(robust_dpo_loss, beta=0.3, label_noise=0.2), {"loss_type": ["robust"], "label_smoothing": 0.2}, 4
    ),
    "ipo": PairCase(partial(ipo_loss, beta=0.3), {"loss_type": ["ipo"]}, 4),
    "hinge": PairCase(partial(hinge_loss, beta=0.3), {"loss_type": ["hinge"]}, 4),
}
PER_TOKEN = {"length_normalised", "ipo"}
"""Where our implicit reward is per token, and TRL reports the sum whatever the loss."""


def pair_logprobs(policy, reference, pairs):
    """What a loss is given: sums over the completions, the end-of-sequence counted in their lengths."""
    prompts, chosen, rejected = zip(*pairs, strict=True)
    sums = [response_logprobs(policy, prompts, side) for side in (chosen, rejected)]
    with torch.no_grad():
        ref_sums = [response_logprobs(reference, prompts, side) for side in (chosen, rejected)]
    lengths = [torch.tensor([len(response) + 1 for response in side]) for side in (chosen, rejected)]
    return PairLogprobs(*sums, *ref_sums, *lengths)


def pair_dataset(pairs):
    return Dataset.from_list([{"prompt": text(p), "chosen": text(c), "rejected": text(r)} for p, c, r in pairs])


def assert_equal(ours, theirs):
    torch.testing.assert_close(ours, torch.as_tensor(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DPO)
def test_dpo_and_its_siblings_equal_trl(tmp_path, tokenizer, name):
    case = DPO[name]
    torch.manual_seed(0)
    policy, reference = LlamaForCausalLM(config()), LlamaForCausalLM(config())
    own_policy, own_reference = deepcopy(policy), deepcopy(reference)
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=DPOConfig(**settings(tmp_path, beta=0.3), **case.trl, per_device_train_batch_size=case.pairs_per_batch),
        train_dataset=pair_dataset(PAIRS),
        processing_class=tokenizer,
    )
    expected = first_epoch(trainer)

    out = case.ours(pair_logprobs(own_policy, own_reference, PAIRS))
    out.loss.mean().backward()

    assert abs(expected.item() - 0.6931) > 0.1
    assert_equal(out.loss.mean().detach(), expected)
    assert_same_gradient(own_policy, policy)
    if name not in PER_TOKEN:
        for side, reward in (("chosen", out.chosen_reward), ("rejected", out.rejected_reward)):
            theirs = trainer._metrics["train"][f"rewards/{side}"]
            assert_equal(reward.mean().detach(), sum(theirs) / len(theirs))


@pytest.mark.parametrize("pairs_per_batch", [1, 4])
def test_simpo_equals_trl(tmp_path, tokenizer, pairs_per_batch):
    torch.manual_seed(0)
    policy = LlamaForCausalLM(config())
    own_policy = deepcopy(policy)
    trainer = CPOTrainer(
        model=policy,
        args=CPOConfig(
            **settings(tmp_path, beta=2.0, loss_type="simpo", simpo_gamma=0.8, cpo_alpha=0.0),
            per_device_train_batch_size=pairs_per_batch,
        ),
        train_dataset=pair_dataset(PAIRS),
        processing_class=tokenizer,
    )
    expected = first_epoch(trainer)

    out = simpo_loss(pair_logprobs(own_policy, own_policy, PAIRS), beta=2.0, gamma=0.8)
    out.loss.mean().backward()

    assert_equal(out.loss.mean().detach(), expected)
    assert_same_gradient(own_policy, policy)
    theirs = trainer._stored_metrics["train"]["rewards/chosen"]
    assert_equal(out.chosen_reward.mean().detach(), sum(theirs) / len(theirs))


def test_orpo_equals_trl(tmp_path, tokenizer):
    """TRL's cross-entropy is over prompt and completion; a prompt of one token has nothing to predict."""
    pairs = [(prompt[:1], chosen, rejected) for prompt, chosen, rejected in PAIRS]
    torch.manual_seed(0)
    policy = LlamaForCausalLM(config())
    own_policy = deepcopy(policy)
    trainer = ORPOTrainer(
        model=policy,
        args=ORPOConfig(**settings(tmp_path, beta=0.4), per_device_train_batch_size=1),
        train_dataset=pair_dataset(pairs),
        processing_class=tokenizer,
    )
    expected = first_epoch(trainer)

    out = orpo_loss(pair_logprobs(own_policy, own_policy, pairs), beta=0.4)
    out.loss.mean().backward()

    assert_equal(out.loss.mean().detach(), expected)
    assert_same_gradient(own_policy, policy)
    theirs = trainer._stored_metrics["train"]["log_odds_chosen"]
    assert_equal((out.chosen_reward - out.rejected_reward).mean().detach(), sum(theirs) / len(theirs))


@pytest.mark.parametrize("above_0", [True, False])
def test_kto_equals_trl(tmp_path, tokenizer, above_0):
    """One batch of responses to different prompts; the reference point, too, is TRL's, above 0 and cut off there."""
    torch.manual_seed(0)
    policy, reference = LlamaForCausalLM(config()), LlamaForCausalLM(config())
    if not above_0:
        policy, reference = reference, policy
    own_policy, own_reference = deepcopy(policy), deepcopy(reference)
    labels = [True, False, True, True]
    rows = [(p, c if good else r) for (p, c, r), good in zip(PAIRS, labels, strict=True)]
    trainer = KTOTrainer(
        model=policy,
        ref_model=reference,
        args=KTOConfig(
            **settings(tmp_path, beta=0.3, desirable_weight=1.5, undesirable_weight=0.7), per_device_train_batch_size=4
        ),
        train_dataset=Dataset.from_list(
            [
                {"prompt": text(p), "completion": text(response), "label": good}
                for (p, response), good in zip(rows, labels, strict=True)
            ]
        ),
        processing_class=tokenizer,
    )
    expected = first_epoch(trainer)

    prompts, responses = (list(column) for column in zip(*rows, strict=True))
    sequences = [LabelledSequence(answered((*p,), (*r, EOS)), True) for p, r in rows]
    others = [other.tokens for other in mismatches(sequences, [tuple(p) for p in prompts], 1024)]
    mixed = [list(o[: len(o) - len(r) - 1]) for o, r in zip(others, responses, strict=True)]
    sums = response_logprobs(own_policy, prompts, responses)
    with torch.no_grad():
        ref_sums = response_logprobs(own_reference, prompts, responses)
        gaps = response_logprobs(own_policy, mixed, responses) - response_logprobs(own_reference, mixed, responses)
    kl = gaps.mean().clamp(min=0)
    assert (kl > 0) == above_0
    losses = kto_loss(sums, ref_sums, torch.tensor(labels), kl.expand(4), 0.3, 1.5, 0.7)
    losses.mean().backward()

    assert_equal(kl, trainer._metrics["train"]["kl"][0])
    assert_equal(losses.mean().detach(), expected)
    assert_same_gradient(own_policy, policy)


def test_bradley_terry_equals_trl(tmp_path, tokenizer):
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config(num_labels=1))
    own = deepcopy(model)
    margins = [0.0, 0.5, 1.5, 3.0]
    rows = [
        {"chosen_ids": p + c, "rejected_ids": p + r, "margin": margin}
        for (p, c, r), margin in zip(PAIRS, margins, strict=True)
    ]
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(**settings(tmp_path), per_device_train_batch_size=4),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    expected = first_epoch(trainer)

    chosen, rejected = (
        torch.stack([own(input_ids=torch.tensor([row[side]])).logits[0, 0] for row in rows])
        for side in ("chosen_ids", "rejected_ids")
    )
    loss = bradley_terry_loss(chosen, rejected, torch.tensor(margins)).mean()
    loss.backward()

    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-5)
    assert_same_gradient(own, model)
