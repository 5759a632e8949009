"""Training a policy on its own rollouts: generate, score, learn, publish the new weights, whatever the method."""

from __future__ import annotations

from rlhf.data.reading import read_prompts
from rlhf.data.tokenize import tokenize_prompts
from rlhf.models.tokenizer import ChatTokenizer
from rlhf.recipe.online_schema import AnyOnlineStage, OnlineDpoStage, PolicyGradientStage
from rlhf.recipe.resources import reference_in_policy
from rlhf.roles import Policy, Reference, Roles, SharedReference, WeightReceipt
from rlhf.stages.context import StageContext
from rlhf.stages.experience import staleness
from rlhf.stages.old_logprobs import settled
from rlhf.stages.online_dpo import OnlineDpo
from rlhf.stages.online_draw import draw
from rlhf.stages.online_step import Method, Training, going_on, make_step, steps
from rlhf.stages.overlap import overlapped
from rlhf.stages.policy_gradient import PolicyGradient, start_estimator
from rlhf.stages.sft import Summary


def run(stage: AnyOnlineStage, context: StageContext) -> Summary:
    """Train the policy for the stage's steps, or until the budget is used up, and save it merged."""
    stage = settled(stage, context.recipe.model.dtype)
    tokenizer = context.tokenizer(stage.policy)
    prompts = tokenize_prompts(read_prompts(stage.prompts), tokenizer, stage.max_prompt_tokens)
    roles, method = start_roles(stage, context, tokenizer)
    watched = context.judge(stage.gold, tokenizer.pad_id) if stage.gold else None
    context.tracker.begin("", stage.steps)
    loop = overlapped if staleness(stage) else in_turn
    receipt = loop(Training(stage, context, roles, method, watched, prompts, tokenizer.pad_id))
    context.save(roles.policy)
    return {"steps": receipt.version, "weight_version": receipt.version, "publish_bytes": receipt.bytes}


def in_turn(training: Training) -> WeightReceipt:
    """Generate and learn in turn, each step with the weights that the last one left; return the last receipt."""
    with going_on(training) as going:
        receipt = training.publish(going.step)
        for step in steps(training, going.step):
            drawn = draw(training.roles, training.prompts, step.number, training.stage, training.context)
            step.clock.lap("generate")
            receipt = make_step(training, step, drawn)
            going.done(receipt.version, lambda: {"method": training.method.carry()})
    return receipt


def start_roles(stage: AnyOnlineStage, context: StageContext, tokenizer: ChatTokenizer) -> tuple[Roles, Method]:
    """Start all roles, the method's critic included."""
    launcher = context.launcher
    policy = launcher.policy(
        context.trained("policy", "causal", stage.policy, stage.optimizer, stage.tuning, temperature=stage.temperature)
    )
    if reference_in_policy(context.recipe, stage):
        reference: Reference = SharedReference(policy)
    else:
        reference = launcher.reference(context.frozen("reference", "causal", stage.policy, stage.temperature))
    reward = context.judge(stage.reward, tokenizer.pad_id)
    method = start_method(stage, context, policy)
    return Roles(policy, reference, reward, launcher.rollout(context.rollout(stage.policy))), method


def start_method(stage: PolicyGradientStage | OnlineDpoStage, context: StageContext, policy: Policy) -> Method:
    """Return the stage's method for a policy."""
    if isinstance(stage, OnlineDpoStage):
        return OnlineDpo(stage, context, policy)
    return PolicyGradient(stage, context, policy, start_estimator(stage, context))
