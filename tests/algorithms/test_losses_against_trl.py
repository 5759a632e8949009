"""Our losses and gradients against TRL's own trainers: same models, same pairs, TRL's tokenising, padding and loss."""

from copy import deepcopy

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from rlhf.algorithms.logprobs import align, selected_logprobs, sequence_logprobs
from rlhf.algorithms.preference import dpo_loss, implicit_rewards
from rlhf.algorithms.reward_model import bradley_terry_loss

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
    """Arguments common to both trainers."""
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


@pytest.mark.parametrize(
    ("loss_type", "pairs_per_batch", "label_smoothing"),
    # TRL has cDPO only inside its optimal-transport loss, which over a single pair is cDPO itself.
    [("sigmoid", 4, 0.0), ("aot_unpaired", 1, 0.1)],
)
def test_dpo_equals_trl(tmp_path, tokenizer, loss_type, pairs_per_batch, label_smoothing):
    torch.manual_seed(0)
    policy, reference = LlamaForCausalLM(config()), LlamaForCausalLM(config())
    own_policy, own_reference = deepcopy(policy), deepcopy(reference)
    beta = 0.3
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=DPOConfig(
            **settings(tmp_path, beta=beta, loss_type=[loss_type], label_smoothing=label_smoothing),
            per_device_train_batch_size=pairs_per_batch,
        ),
        train_dataset=Dataset.from_list(
            [{"prompt": text(p), "chosen": text(c), "rejected": text(r)} for p, c, r in PAIRS]
        ),
        processing_class=tokenizer,
    )
    expected = first_epoch(trainer)

    prompts, chosen, rejected = zip(*PAIRS, strict=True)
    sums = [response_logprobs(own_policy, prompts, side) for side in (chosen, rejected)]
    with torch.no_grad():
        ref_sums = [response_logprobs(own_reference, prompts, side) for side in (chosen, rejected)]
    loss = dpo_loss(*sums, *ref_sums, beta, label_smoothing).mean()
    loss.backward()

    assert abs(expected.item() - 0.6931) > 0.1
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-5)
    assert_same_gradient(own_policy, policy)
    theirs = torch.tensor(trainer._metrics["train"]["rewards/chosen"]).mean()
    torch.testing.assert_close(
        implicit_rewards(sums[0], ref_sums[0], beta).mean().detach(), theirs, rtol=1e-5, atol=1e-5
    )


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
