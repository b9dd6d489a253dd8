"""The empty stack, and a stack that implements every hook as the identity, equal TRL's own trainer bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch

from methods.base import Method

OBJECTIVES = {
    "grpo": {},
    "dr_grpo": {"scale_rewards": "none"},
    "bnpo": {},
    "dapo": {"epsilon_high": 0.28},
    "cispo": {"epsilon_high": 5.0},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    "sapo": {},
}
LAYOUTS = {
    "one batch": {},
    "accumulation": {"rows_per_device": 8},
    "off policy": {"rows_per_device": 8, "updates_per_generation": 2, "iterations": 2, "max_steps": 4},
}


class Identity(Method):
    """Every hook overridden, nothing changed."""

    name = "identity"

    def prepare_rows(self, rows, ctx):
        return list(rows)

    def rollout(self, rows, ctx, default):
        return default(rows)

    def rewards(self, trajs, ctx):
        return None

    def token_rewards(self, trajs, ctx):
        return ctx.token_rewards_ST

    def advantages(self, adv_ST, ctx):
        return adv_ST

    def select(self, batch, ctx):
        return batch

    def token_advantages(self, adv_BT, lctx):
        return adv_BT

    def clip_range(self, lctx):
        return None

    def extra_loss(self, lctx):
        return None

    def after_step(self, ctx):
        return None

    def eval_metrics(self, trajs, ctx):
        return {}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        return None

    def metrics(self):
        return {}


class IdentityNoClip(Identity):
    """For objectives without a clip range."""

    clip_range = Method.clip_range


def plain_trl(trainer, arithmetic, random_model, reward, loss_type, extra):
    """TRL's own trainer on the same data, seed and arguments as `trainer`."""
    from datasets import Dataset
    from transformers import PrinterCallback, set_seed
    from trl import GRPOConfig, GRPOTrainer

    rows = arithmetic.rows("train", 0)
    args = {k: v for k, v in trainer.args.to_dict().items() if k in GRPOConfig.__dataclass_fields__}
    keep = ("output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
    keep += (
        "num_generations",
        "num_iterations",
        "max_steps",
        "learning_rate",
        "logging_steps",
        "seed",
        "use_cpu",
        "bf16",
    )
    keep += ("max_completion_length", "warmup_steps", "lr_scheduler_type", "temperature", "top_k", "save_strategy")
    keep += ("report_to", "disable_tqdm", "dataloader_pin_memory", "beta")
    chosen = {k: args[k] for k in keep} | {"gradient_checkpointing": False, "loss_type": loss_type} | extra
    set_seed(trainer.args.seed)
    plain = GRPOTrainer(
        model=copy.deepcopy(random_model.model),
        reward_funcs=[lambda completions, **kw: reward(completions, None)],
        args=GRPOConfig(**chosen),
        train_dataset=Dataset.from_dict({"prompt": [r.prompt for r in rows]}),
        processing_class=random_model.tokenizer,
    )
    plain.remove_callback(PrinterCallback)
    return plain


def history(trainer, key):
    return [h[key] for h in trainer.state.log_history if key in h]


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def train_both(plain, ours):
    from transformers import set_seed

    for trainer in (plain, ours):
        set_seed(trainer.args.seed)
        trainer.train()


def build(name, **keys):
    from methods.objectives import policy_gradient as pg

    cls = {c.name: c for c in vars(pg).values() if isinstance(c, type) and getattr(c, "name", "")}[name]
    return cls(**keys)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("kind", ["empty", "identity"])
def test_equals_trl(kind, name, layout, make_trainer, arithmetic, random_model, digit_share):
    objective = build(name)
    identity = Identity() if objective.clips else IdentityNoClip()
    stack = [] if kind == "empty" else [identity]
    ours = make_trainer(stack, objective, **LAYOUTS[layout])
    plain = plain_trl(ours, arithmetic, random_model, digit_share, name, OBJECTIVES[name])
    train_both(plain, ours)
    assert any(abs(x) > 0 for x in history(ours, "grad_norm"))
    assert history(ours, "loss") == history(plain, "loss")
    assert history(ours, "grad_norm") == history(plain, "grad_norm")
    assert torch.equal(weights(ours), weights(plain))


def test_equals_trl_with_reference_model(make_trainer, arithmetic, random_model, digit_share):
    ours = make_trainer([], build("grpo", beta=0.1), max_steps=3)
    plain = plain_trl(ours, arithmetic, random_model, digit_share, "grpo", {})
    train_both(plain, ours)
    assert history(ours, "loss") == history(plain, "loss")
    assert torch.equal(weights(ours), weights(plain))
    assert history(ours, "kl")[-1] > 0


def test_another_reward_breaks_the_equality(make_trainer, arithmetic, random_model):
    ours = make_trainer([], build("grpo"))
    plain = plain_trl(ours, arithmetic, random_model, lambda texts, rows: [float(len(t)) for t in texts], "grpo", {})
    train_both(plain, ours)
    assert not torch.equal(weights(ours), weights(plain))
