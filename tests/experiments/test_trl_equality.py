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


# ---------------------------------------------------------------- rollouts by vLLM and TRL's correction

CORRECTED = {"use_vllm": True, "vllm_importance_sampling_correction": True, "vllm_importance_sampling_clip_max": 1.3}


class FakeVLLM:
    """TRL's VLLMGeneration: made-up completions of a fixed stream, with log-probs that are a little off the model's.

    Every fifth completion has one token whose log-prob vLLM could not give.
    """

    def __init__(self, *, model, max_completion_length, temperature, **options):
        self.model, self.length, self.temperature, self.options = model, max_completion_length, temperature, options
        self.syncs = self.calls = 0

    def sync_weights(self):
        self.syncs += 1

    def generate(self, prompts, images, num_generations, profiler=None):
        self.calls += 1
        random = torch.Generator().manual_seed(100 + self.calls)
        vocabulary = self.model.config.vocab_size
        ids = [torch.randint(4, vocabulary, (self.length,), generator=random).tolist() for _ in prompts]
        logps = []
        for k, (prompt, written) in enumerate(zip(prompts, ids, strict=True)):
            logps.append([[x] for x in self._logps(prompt, written, random)])
            if k % 5 == 0:
                logps[-1][1] = [None]
        return prompts, ids, logps, None

    def _logps(self, prompt, written, random):
        with torch.no_grad():
            logits = self.model(torch.tensor([prompt + written])).logits[0, len(prompt) - 1 : -1] / self.temperature
        exact = logits.log_softmax(-1).gather(1, torch.tensor(written)[:, None])[:, 0]
        return (exact + 0.5 * torch.randn(len(written), generator=random)).tolist()


@pytest.fixture
def fake_vllm(monkeypatch):
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", FakeVLLM)


@pytest.mark.parametrize(
    ("mode", "name"),
    [(f"{level}_{how}", "grpo") for level in ("sequence", "token") for how in ("mask", "truncate")]
    + [("sequence_mask", "gspo"), ("token_truncate", "cispo"), ("token_mask", "sapo")],
)
def test_the_corrected_loss_is_trl_s(mode, name, fake_vllm, make_trainer, arithmetic, random_model, digit_share):
    theirs = {"cispo": {"epsilon_high": 5.0}, "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence",
              "epsilon": 3e-4, "epsilon_high": 4e-4}}.get(name, {})  # fmt: skip
    how = CORRECTED | {"vllm_importance_sampling_mode": mode}
    ours = make_trainer([], build(name), rows_per_device=8, **how)
    plain = plain_trl(ours, arithmetic, random_model, digit_share, name, theirs | how)
    train_both(plain, ours)
    assert history(ours, "loss") == pytest.approx(history(plain, "loss"), rel=1e-5, abs=1e-8)
    torch.testing.assert_close(weights(ours), weights(plain), rtol=0, atol=5e-5)  # Adam's step is 1e-3
    for key in ("sampling_logp_difference/mean", "sampling_logp_difference/max", "importance_sampling_ratio/min",
                "importance_sampling_ratio/mean", "importance_sampling_ratio/max"):  # fmt: skip
        assert history(ours, f"sampling/{key}") == pytest.approx(history(plain, f"sampling/{key}"), rel=1e-4), key
    assert 0 < history(ours, "sampling/importance_sampling_ratio/cut")[0] < 1
    assert ours.vllm_generation.syncs == 2 and ours.vllm_generation.options["mode"] == "colocate"


def test_without_the_correction_other_weights_come_out(fake_vllm, make_trainer):
    with_it = make_trainer([], **CORRECTED)
    without = make_trainer([], use_vllm=True, vllm_importance_sampling_correction=False)
    for trainer in (with_it, without):
        trainer.train()
    assert not torch.equal(weights(with_it), weights(without))
    assert not any(key.startswith("sampling/") for key in without.state.log_history[0])
