"""Our advantages and losses against TRL's GRPO and RLOO trainers: their own code, on a small model of theirs."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from rlhf.algorithms.advantages import group_centred, group_normalised, leave_one_out
from rlhf.engines.policy_objectives import ClippedPolicy
from rlhf.types import Experience, TokenBatch

GROUP, LONGEST = 3, 6
REWARDS = [0.5, -1.0, 2.0, 0.25, 0.25, 1.0]
PROMPT, LENGTHS = 4, [6, 2, 4, 5, 1, 6]


def trainer_of(kind, config, folder, model_folder, rewards=REWARDS, **extra):
    def reward(completions, **_):
        return rewards[: len(completions)]

    arguments = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "per_device_train_batch_size": len(rewards),
        "num_generations": GROUP,
        "max_completion_length": LONGEST,
        "loss_type": "grpo",
        **extra,
    }
    if config is RLOOConfig:
        del arguments["loss_type"]
    return kind(
        model=LlamaForCausalLM.from_pretrained(model_folder),
        reward_funcs=reward,
        args=config(**arguments),
        train_dataset=Dataset.from_list([{"prompt": "ab"}, {"prompt": "cd"}]),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
    )


@pytest.mark.parametrize(
    ("kind", "config", "settings", "ours"),
    [
        (GRPOTrainer, GRPOConfig, {"scale_rewards": "group"}, group_normalised),
        (GRPOTrainer, GRPOConfig, {"scale_rewards": "none"}, group_centred),
        (RLOOTrainer, RLOOConfig, {"normalize_advantages": False, "beta": 0.0}, leave_one_out),
    ],
    ids=["grpo", "dr_grpo", "rloo"],
)
def test_advantages_equal_trl(tmp_path, tiny_folder, kind, config, settings, ours):
    trainer = trainer_of(kind, config, tmp_path, tiny_folder, **settings)
    rows = [{"prompt": prompt} for prompt in ("ab", "cd") for _ in range(GROUP)]
    expected = trainer._generate_and_score_completions(rows)["advantages"]
    groups = torch.arange(len(REWARDS)) // GROUP
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(ours(torch.tensor(REWARDS), groups), expected)


def experience(model, spread):
    """Random tokens; old and reference log-probabilities lie around the model's, `spread` apart."""
    generator = torch.Generator().manual_seed(4)
    columns = torch.arange(PROMPT + LONGEST)
    real = columns < PROMPT + torch.tensor(LENGTHS)[:, None]
    mask = real & (columns >= PROMPT)
    tokens = torch.randint(6, 262, mask.shape, generator=generator).masked_fill(~real, 0)
    with torch.no_grad():
        logits = model(input_ids=tokens, attention_mask=real.long()).logits[:, :-1]
    logprobs = logits.log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)
    logprobs = torch.nn.functional.pad(logprobs, (1, 0))

    def near(scale):
        return (logprobs + scale * torch.randn(mask.shape, generator=generator)).masked_fill(~mask, 0)

    old = near(spread)
    advantages = torch.tensor(REWARDS)[:, None] * mask
    zeros = torch.zeros(mask.shape)
    return Experience(TokenBatch(tokens, real, mask, old), torch.tensor(REWARDS), zeros, old, near(0.5), advantages)


def trl_inputs(batch):
    return {
        "prompt_ids": batch.batch.tokens[:, :PROMPT],
        "prompt_mask": batch.batch.attention_mask[:, :PROMPT].long(),
        "completion_ids": batch.batch.tokens[:, PROMPT:],
        "completion_mask": batch.batch.response_mask[:, PROMPT:].long(),
        "advantages": batch.scores,
        "old_per_token_logps": batch.old_logprobs[:, PROMPT:],
        "ref_per_token_logps": batch.ref_logprobs[:, PROMPT:],
    }


def assert_same_gradient(ours, theirs):
    gradients = [{name: p.grad for name, p in model.named_parameters()} for model in (ours, theirs)]
    assert max(gradient.abs().max() for gradient in gradients[0].values()) > 1e-3
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("loss_type", "aggregation"), [("grpo", "sequence"), ("bnpo", "token"), ("dr_grpo", "constant")]
)
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_loss_and_gradient_equal_trls_grpo(tmp_path, tiny_folder, loss_type, aggregation, kl_coef):
    """The KL as in GRPO's paper; the default of TRL 1.16 multiplies it by the ratio (DeepSeek-V3.2)."""
    trainer = trainer_of(
        GRPOTrainer,
        GRPOConfig,
        tmp_path,
        tiny_folder,
        loss_type=loss_type,
        beta=kl_coef,
        use_bias_correction_kl=False,
        epsilon=0.2,
        epsilon_high=0.3,
    )
    model = LlamaForCausalLM.from_pretrained(tiny_folder)
    trainer.model.eval()
    batch = experience(model, spread=0.4)
    expected = trainer._compute_loss(trainer.model, trl_inputs(batch))
    expected.backward()

    ours = ClippedPolicy(0.2, 0.3, 2.0, 1.0, aggregation, LONGEST, kl_coef, "k3")
    total, metrics = ours.loss(model, batch)
    loss = total / ours.count(batch)
    loss.backward()

    assert 0 < metrics["clip_fraction"] < 1
    torch.testing.assert_close(loss, expected)
    assert_same_gradient(model, trainer.model)


def test_at_ratio_1_the_gradient_is_that_of_trls_rloo(tmp_path, tiny_folder):
    """RLOO's action is the whole response; ours sums its tokens, so at ratio 1 the two differ by the divisor alone."""
    trainer = trainer_of(RLOOTrainer, RLOOConfig, tmp_path, tiny_folder, beta=0.0)
    model = LlamaForCausalLM.from_pretrained(tiny_folder)
    trainer.model.eval()
    batch = experience(model, spread=0.0)
    inputs = trl_inputs(batch) | {"old_logps": batch.old_logprobs.sum(dim=1)}
    trainer._compute_loss(trainer.model, inputs).backward()

    ours = ClippedPolicy(0.2, 0.2, 2.0, 1.0, "token", LONGEST, 0.0, "k1")
    (ours.loss(model, batch)[0] / len(batch)).backward()

    assert_same_gradient(model, trainer.model)
