"""Every hook is called when and as documented: one toy method each, and several stacked."""

from __future__ import annotations

import pytest
import torch

from experiments import resample
from methods.base import Method, RunError
from methods.errors import ConfigError
from methods.objectives.policy_gradient import Bnpo, Dapo, Grpo, GspoToken
from methods.objectives.reinforce_pp import ReinforcePP


class Spy(Method):
    """Writes down the order of calls with what it saw."""

    def __init__(self, name="spy"):
        self.name = name
        self.calls = []

    def note(self, hook, **seen):
        self.calls.append((hook, seen))

    def names(self):
        return [hook for hook, _ in self.calls]


class Chain(Spy):
    """Chain hooks only, so that two can share a stack."""

    needs = frozenset({"old_logps", "entropies"})

    def prepare_rows(self, rows, ctx):
        self.note("prepare_rows", rows=len(rows), mode=ctx.mode, step=ctx.step)
        return rows

    def rewards(self, trajs, ctx):
        self.note("rewards", known=sorted(trajs[0].rewards))
        for t in trajs:
            t.rewards[f"from_{self.name}"] = 1.0

    def token_rewards(self, trajs, ctx):
        self.note("token_rewards", rows=ctx.batch.rows)
        return ctx.token_rewards_ST

    def advantages(self, adv_ST, ctx):
        b = ctx.batch
        outside = (adv_ST[b.model_mask_ST == 0] == 0).all()
        self.note("advantages", dtype=adv_ST.dtype, outside=bool(outside), entropies=b.entropies_ST is not None)
        return adv_ST

    def select(self, batch, ctx):
        self.note("select", trajs=len(batch.trajs))
        return batch

    def token_advantages(self, adv_BT, lctx):
        self.note("token_advantages", graph=lctx.logps_BT.requires_grad or lctx.entropies_BT.requires_grad)
        return adv_BT

    def extra_loss(self, lctx):
        self.note("extra_loss", graph=lctx.logps_BT.requires_grad)
        return None

    def after_step(self, ctx):
        self.note("after_step", step=ctx.step)

    def metrics(self):
        return {"calls": float(len(self.calls))}


def test_the_clock(make_trainer):
    """Generation hooks once per generation, loss hooks once per micro-batch, after_step once per optimiser step."""
    spy = Chain()
    make_trainer([spy], rows_per_device=8, updates_per_generation=2, iterations=2, max_steps=4).train()
    names = spy.names()
    for hook in ("prepare_rows", "rewards", "token_rewards", "advantages", "select"):
        assert names.count(hook) == 1, hook
    assert names[:5] == ["prepare_rows", "rewards", "token_rewards", "advantages", "select"]
    assert names.count("token_advantages") == names.count("extra_loss") == 8  # 2 slices x 2 updates x 2 iterations
    assert [seen["step"] for hook, seen in spy.calls if hook == "after_step"] == [1, 2, 3, 4]
    seen = dict(spy.calls)
    assert seen["prepare_rows"]["rows"] == 4 * 4 * 2 and seen["prepare_rows"]["mode"] == "train"
    assert seen["advantages"] == {"dtype": torch.float32, "outside": True, "entropies": True}
    assert seen["token_advantages"]["graph"] is False and seen["extra_loss"]["graph"] is True


def test_chains_run_in_written_order(make_trainer):
    log = []

    class Ordered(Method):
        def __init__(self, name):
            self.name = name

        def advantages(self, adv_ST, ctx):
            log.append(self.name)
            return adv_ST * 2 if self.name == "double" else adv_ST + (adv_ST != 0)

    trainer = make_trainer([Ordered("double"), Ordered("shift")], max_steps=1)
    seen = {}
    real = trainer.stack.select
    trainer.stack.select = lambda batch, ctx: seen.setdefault("adv", batch.adv_ST) is None or real(batch, ctx)
    trainer.train()
    assert log == ["double", "shift"]
    reward = trainer.last_ctx.total_reward()
    base = trainer.stack.objective.advantages(trainer.last_ctx)
    expected = torch.where(base != 0, base * 2 + 1, base)
    torch.testing.assert_close(seen["adv"], expected)
    assert reward.std() > 0


def test_the_reward_of_an_earlier_method_is_seen_by_the_next(make_trainer):
    first, second = Chain("first"), Chain("second")
    make_trainer([first, second], max_steps=1).train()
    assert dict(first.calls)["rewards"]["known"] == ["task"]
    assert dict(second.calls)["rewards"]["known"] == ["from_first", "task"]


class Demo(Method):
    """Puts a demonstration in the last slot of each group."""

    name = "demo"

    def rollout(self, rows, ctx, default):
        trajs = default(rows)
        self.generated = sum(t.length for t in trajs)
        for t in trajs:
            if t.sample_id == ctx.group_size - 1:
                t.segments[0].completion_ids = [5, 6, 7, ctx.tokenizer.eos_token_id]
                t.turns[0].end = 4
                t.is_demo, t.text = True, "012"
        return trajs


def test_rollout_owner_fills_slots(make_trainer):
    demo = Demo()
    trainer = make_trainer([demo], max_steps=1)
    trainer.train()
    demos = [t for t in trainer.last_ctx.trajs if t.is_demo]
    assert len(demos) == 4 and all(t.rewards["task"] == 1.0 for t in demos)
    assert trainer.cost["generated_tokens"] == demo.generated  # what was generated, not what was kept


class Slots(Method):
    """Generates all slots of a group but the last, which a demonstration takes."""

    name = "slots"

    def rollout(self, rows, ctx, default):
        from methods.base import Segment, Trajectory

        G = ctx.group_size
        free = [j for j in range(len(rows)) if j % G < G - 1]
        drawn = {j: t for j, t in zip(free, default([rows[j] for j in free], slots=free), strict=True)}
        self.generated = sum(t.length for t in drawn.values())
        out = []
        for j, row in enumerate(rows):
            demo = Trajectory(row.id, j // G, j % G, [Segment([1], [5, 6])], is_demo=True, text="01", row=row)
            out.append(drawn.get(j, demo))
        return out


def test_default_fills_some_slots(make_trainer):
    slots = Slots()
    trainer = make_trainer([slots], max_steps=1)
    trainer.train()
    trajs = trainer.last_ctx.trajs
    assert [(t.group_id, t.sample_id) for t in trajs] == [(g, s) for g in range(4) for s in range(4)]
    assert [t.is_demo for t in trajs] == [False, False, False, True] * 4
    assert all(t.row is trajs[4 * t.group_id].row for t in trajs)
    assert trainer.cost["generated_tokens"] == slots.generated


class Twice(Method):
    """Generates twice and keeps one half."""

    name = "twice"

    def rollout(self, rows, ctx, default):
        first, second = default(rows), default(rows)
        self.generated = sum(t.length for t in first + second)
        return second


def test_every_generated_token_counts(make_trainer):
    twice = Twice()
    trainer = make_trainer([twice], max_steps=1)
    trainer.train()
    assert trainer.cost["generated_tokens"] == twice.generated


class Segments(Method):
    """Cuts every completion of two or more tokens into two rows of one trajectory."""

    name = "segments"

    def rollout(self, rows, ctx, default):
        from methods.base import Segment, Turn

        trajs = default(rows)
        for t in trajs:
            (s,) = t.segments
            ids = s.completion_ids
            if len(ids) > 1:
                t.segments = [Segment(s.prompt_ids, ids[:1]), Segment(s.prompt_ids + ids[:1], ids[1:])]
                t.turns = [Turn(0, 0, 1), Turn(1, 0, len(ids) - 1)]
        return trajs

    def select(self, batch, ctx):
        batch.row_weight_S = 1.0 / torch.bincount(batch.traj_S)[batch.traj_S].float()
        return batch


def test_rows_are_segments_and_weights_hold_over_chunks(make_trainer):
    """More rows than rows_per_device run in chunks; the gradient is that of one big chunk."""
    grads = []
    for rows_per_device in (16, 4):
        trainer = make_trainer([Segments()], Grpo(), prompts_per_step=4, rows_per_device=16, max_steps=1)
        trainer.args.per_device_train_batch_size = rows_per_device
        trainer.train()
        assert trainer.last_ctx.batch.rows > 16
        grads.append(trainer.state.log_history[0]["grad_norm"])
    assert grads[0] == pytest.approx(grads[1], rel=1e-5)


class Pieces(Segments):
    """Rows from one trajectory without any select."""

    name = "pieces"
    select = Method.select


@pytest.mark.parametrize("objective", [Grpo, Dapo])
def test_more_rows_without_select_are_all_trained_with_the_same_gradient(objective, make_trainer):
    grads, trained = [], []
    for limit in (16, 4):
        trainer = make_trainer([Pieces()], objective(), rows_per_device=4, max_steps=1)
        trainer.args.per_device_train_batch_size = limit
        trainer.train()
        grads.append(trainer.state.log_history[0]["grad_norm"])
        trained.append((trainer.cost["trained_tokens"], int(trainer.last_ctx.batch.model_mask_ST.sum())))
    assert grads[0] == pytest.approx(grads[1], rel=1e-5)
    assert all(a == b for a, b in trained)


class Drop(Method):
    """Keeps the given share of trajectories."""

    name = "drop"

    def __init__(self, keep):
        self.keep = keep

    def select(self, batch, ctx):
        batch.extras["sample"] = batch.traj_S.float()
        return batch.take(list(range(0, len(batch.trajs), self.keep)))


class Check(Method):
    """Sees in the loss what select attached, aligned with its rows after shuffle and slicing."""

    name = "check"

    def __init__(self):
        self.seen = []

    def select(self, batch, ctx):
        batch.extras["first"] = batch.completion_ids_ST[:, 0].float()
        batch.extras["ids"] = batch.completion_ids_ST.float() * batch.completion_mask_ST
        return batch

    def extra_loss(self, lctx):
        torch.testing.assert_close(lctx.extras["first"], lctx.extras["ids"][:, 0])
        self.seen.append((lctx.mask_BT.sum(1), lctx.row_weight_B, lctx.adv_BT))
        return None


@pytest.mark.parametrize("keep", [2, 3, 5])
def test_select_drops_whole_trajectories_and_fills_up(keep, make_trainer):
    check = Check()
    trainer = make_trainer([Drop(keep), check], rows_per_device=4, max_steps=1)
    trainer.train()
    kept = len(range(0, 16, keep))
    masks = torch.cat([m for m, _, _ in check.seen])
    weights = torch.cat([w for _, w, _ in check.seen])
    assert (masks > 0).sum() == kept
    assert len(masks) % 4 == 0
    assert float(weights.sum()) == pytest.approx(4.0, rel=1e-5)  # one per micro-batch
    assert (weights[masks == 0] == 0).all()
    assert trainer.cost["trained_tokens"] == int(masks.sum())


def test_dropping_rows_equals_training_on_the_rest(make_trainer):
    """GRPO with half of the trajectories dropped has the gradient of the mean over the other half."""

    class Manual(Drop):
        name = "manual"

        def select(self, batch, ctx):
            keep = torch.zeros(len(batch.trajs))
            keep[:: self.keep] = 1.0
            batch.row_weight_S = keep[batch.traj_S]
            return batch

    grads = []
    for method in (Drop(2), Manual(2)):
        trainer = make_trainer([method], max_steps=1)
        trainer.train()
        grads.append(trainer.state.log_history[0]["grad_norm"])
    assert grads[0] == pytest.approx(grads[1], rel=1e-5)


class Replay(Method):
    """Adds the trajectories of the previous generation, with their stored old log-probs."""

    name = "replay"
    needs = frozenset({"old_logps"})

    def __init__(self):
        self.stored = None

    def select(self, batch, ctx):
        stored, self.stored = self.stored, batch.take(range(4))
        return batch if stored is None else batch.concat(stored)


def test_select_adds_stored_trajectories(make_trainer):
    check = Check()
    trainer = make_trainer([check, Replay()], max_steps=3)
    trainer.train()
    assert [len(m) for m, _, _ in check.seen] == [16, 16, 4, 16, 4]  # 20 rows run as chunks of rows_per_device


class TokenShape(Method):
    """Late weights on tokens."""

    name = "shape"
    token_credit = True

    def token_advantages(self, adv_BT, lctx):
        return adv_BT * (1 + torch.arange(adv_BT.shape[1]))


class AsAdvantage(TokenShape):
    name = "early"
    token_advantages = Method.token_advantages

    def advantages(self, adv_ST, ctx):
        return adv_ST * (1 + torch.arange(adv_ST.shape[1]))


@pytest.mark.parametrize("objective", [Grpo, Dapo, GspoToken, Bnpo])
def test_late_and_early_token_weights_agree_on_policy(objective, make_trainer):
    grads = []
    for method in (TokenShape(), AsAdvantage()):
        trainer = make_trainer([method], objective(), max_steps=1)
        trainer.train()
        grads.append(trainer.state.log_history[0]["grad_norm"])
    assert grads[0] == grads[1]


def test_late_weights_do_not_compound_over_iterations(make_trainer):
    seen = []

    class Peek(TokenShape):
        def token_advantages(self, adv_BT, lctx):
            seen.append(adv_BT.clone())
            return adv_BT * 3

    make_trainer([Peek()], iterations=3, max_steps=3).train()
    assert len(seen) == 3 and torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


class Own(Method):
    """Owns the loss: plain REINFORCE."""

    name = "own"

    def loss(self, lctx):
        return -(lctx.adv_BT * lctx.logps_BT * lctx.mask_BT).sum() / lctx.denominator_tokens


class Term(Method):
    name = "term"

    def extra_loss(self, lctx):
        return 0.5 * (lctx.logps_BT * lctx.mask_BT).sum() / lctx.mask_BT.sum()


def test_loss_owner_replaces_the_objective(make_trainer):
    """On policy the clipped token-mean objective and REINFORCE have equal gradients."""
    grads = []
    for methods in ([], [Own()]):
        trainer = make_trainer(methods, Dapo(), max_steps=1)
        trainer.train()
        grads.append(trainer.state.log_history[0]["grad_norm"])
    assert grads[0] == pytest.approx(grads[1], rel=1e-5)


def test_extra_loss_is_invariant_to_accumulation_and_adds_up(make_trainer):
    norms = {}
    for rows_per_device in (16, 8):
        for terms in (1, 2):
            methods = [Term() for _ in range(terms)]
            for i, m in enumerate(methods):
                m.name = f"term{i}"
            trainer = make_trainer(
                methods, Dapo(), rows_per_device=rows_per_device, max_steps=1, reward=lambda t, r: [1.0] * len(t)
            )
            trainer.train()
            norms[rows_per_device, terms] = trainer.state.log_history[0]["grad_norm"]
    assert norms[16, 2] == pytest.approx(2 * norms[16, 1], rel=1e-5)
    assert norms[8, 1] == pytest.approx(norms[16, 1], rel=0.05)


class Narrow(Method):
    name = "narrow"

    def __init__(self, width):
        self.width = width

    def clip_range(self, lctx):
        return self.width, torch.full((lctx.mask_BT.shape[0], 1), self.width)


def test_clip_range_owner(make_trainer):
    """A range of zero clips every token of the second pass that moved in the advantage's direction."""
    clipped = []
    for width in (0.0, 1e6):
        trainer = make_trainer([Narrow(width)], iterations=2, max_steps=2, learning_rate=1e-2)
        trainer.train()
        last = trainer.state.log_history[1]
        clipped.append(last["clip/low"] + last["clip/high"])
    assert clipped[0] > 0.1 and clipped[1] == 0.0


class Base(Method):
    name = "base"

    def base_advantages(self, ctx):
        return ctx.batch.model_mask_ST.float() * 0.25


def test_base_advantages_owner(make_trainer):
    trainer = make_trainer([Base()], max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["advantage/abs"] == pytest.approx(0.25)


class Tokens(Method):
    """Token rewards: 1 on the first token of each completion."""

    name = "tokens"

    def token_rewards(self, trajs, ctx):
        out = torch.zeros_like(ctx.batch.adv_ST)
        out[:, 0] = torch.arange(ctx.batch.rows).float()
        return out


def test_group_baseline_sums_token_rewards(make_trainer):
    trainer = make_trainer([Tokens()], max_steps=1)
    trainer.train()
    adv = trainer.stack.objective.group_advantages(trainer.last_ctx).view(-1, 4)
    std = torch.tensor([0.0, 1, 2, 3]).std()
    torch.testing.assert_close(adv, ((torch.arange(4.0) - 1.5) / (std + 1e-4)).expand(4, 4))


def test_reinforce_pp_whitens_token_returns(make_trainer):
    trainer = make_trainer([Tokens()], ReinforcePP(), max_steps=1)
    trainer.train()
    ctx = trainer.last_ctx
    mask = ctx.batch.model_mask_ST.bool()
    returns = torch.zeros_like(ctx.batch.adv_ST)
    returns[:, 0] = torch.arange(ctx.batch.rows).float()
    values = returns[mask]
    expected = (values - values.mean()) / (values.var() + 1e-8).sqrt()
    torch.testing.assert_close(ctx.batch.adv_ST[mask], expected)


# ---------------------------------------------------------------- refusals and failures


class Wrong(Method):
    name = "wrong"

    def prepare_rows(self, rows, ctx):
        return rows[:-1]


def test_prepare_rows_may_not_change_the_count(make_trainer):
    with pytest.raises(ConfigError, match="number of rows"):
        make_trainer([Wrong()], max_steps=1).train()


def test_infinite_and_missing_rewards_stop_the_run(make_trainer):
    with pytest.raises(RunError, match="infinite"):
        make_trainer([], reward=lambda texts, rows: [float("inf")] * len(texts)).train()
    with pytest.raises(RunError, match="NaN"):
        make_trainer([], reward=lambda texts, rows: [None] * len(texts)).train()


def test_some_missing_rewards_get_no_advantage(make_trainer):
    def half(texts, rows):
        return [float(len(t)) if i % 2 else None for i, t in enumerate(texts)]

    trainer = make_trainer([], reward=half, max_steps=1)
    trainer.train()
    adv = trainer.last_ctx.batch.adv_ST
    assert (adv[::2] == 0).all() and (adv[1::2] != 0).any()


def test_reward_weights_and_roles(make_trainer):
    from experiments.rewards import RewardSpec

    specs = [
        RewardSpec("a", lambda t, r: [1.0] * len(t), 2.0, "outcome"),
        RewardSpec("b", lambda t, r: [3.0] * len(t), 0.0, "aux"),
    ]
    trainer = make_trainer([], rewards=specs, max_steps=1)
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["reward"] == 2.0 and logs["reward/b"] == 3.0 and logs["groups/dead"] == 1.0
    assert trainer.last_ctx.reward_name("outcome") == "a"
    with pytest.raises(ConfigError, match="role 'format'"):
        trainer.last_ctx.reward_name("format")


# ---------------------------------------------------------------- dynamic sampling


def test_dynamic_sampling_replaces_dead_groups_and_remembers_its_place(make_trainer):
    def often_dead(texts, rows):
        return [float(len(t)) if hash_of(r) % 3 == 0 else 1.0 for t, r in zip(texts, rows, strict=True)]

    trainer = make_trainer([], Dapo(dynamic_sampling=True, max_draws=6), reward=often_dead, max_steps=2)
    trainer.train()
    assert trainer.state.log_history[1]["groups/dead"] < 0.6
    assert trainer.stream_position > 0
    assert len(trainer.last_ctx.rewards_all["task"]) > len(trainer.last_ctx.trajs) == 16
    assert [t.sample_id for t in trainer.last_ctx.trajs] == [0, 1, 2, 3] * 4
    state = trainer.state_dict()
    again = make_trainer([], Dapo(dynamic_sampling=True), reward=often_dead)
    again.load_state_dict(state)
    assert [r.id for r in resample.fresh_rows(again, 3)] == [r.id for r in resample.fresh_rows(trainer, 3)]


def hash_of(row):
    import zlib

    return zlib.crc32(row.id.encode())


# ---------------------------------------------------------------- services


class Asks(Method):
    name = "asks"

    def advantages(self, adv_ST, ctx):
        from experiments.engines.base import Request

        state = torch.random.get_rng_state()
        results = ctx.generate([Request(prompt="1+2=", max_tokens=3, n=2)], stream="probe")
        assert torch.equal(state, torch.random.get_rng_state())
        self.texts = [r.text for r in results[0]]
        forward = ctx.forward(ctx.trajs, ["logps", "entropies", "hidden"])
        self.shapes = {k: tuple(v.shape) for k, v in forward.items()}
        self.scores = ctx.score(["3"], [ctx.rows[0]])
        self.embedded = ctx.embed(["one two", "one two", "x", ""])
        self.draws = ctx.rng("a").random(2).tolist() + ctx.rng("a").random(2).tolist()
        return adv_ST


def test_services(make_trainer):
    asks = Asks()
    trainer = make_trainer([asks], max_steps=1)
    trainer.train()
    batch = trainer.last_ctx.batch
    S, T = batch.completion_ids_ST.shape
    assert len(asks.texts) == 2
    assert asks.shapes == {"logps": (S, T), "entropies": (S, T), "hidden": (S, T, 64)}
    assert len(asks.scores) == 1
    similar = asks.embedded @ asks.embedded.T
    assert similar[0, 1] == pytest.approx(1.0) and similar[0, 2] < 0.5 and similar[3].abs().sum() == 0
    assert asks.draws[:2] == asks.draws[2:]
    logs = trainer.state.log_history[0]
    assert logs["time/service/generate"] > 0 and logs["cost/forwarded_tokens"] > 0
    assert logs["time/hook/asks"] < logs["time/service/generate"] + logs["time/service/forward"] + 1


def test_forward_gives_the_policys_log_probs(make_trainer):
    """Log-probs of the service are those of the model's own logits."""
    seen = {}

    class Look(Method):
        name = "look"

        def advantages(self, adv_ST, ctx):
            seen["logps"] = ctx.forward(ctx.trajs, ["logps"])["logps"]
            return adv_ST

    trainer = make_trainer([Look()], max_steps=1, learning_rate=0.0)
    trainer.train()
    b = trainer.last_ctx.batch
    ids = torch.cat([b.prompt_ids_SP, b.completion_ids_ST], 1)
    mask = torch.cat([b.prompt_mask_SP, b.completion_mask_ST], 1)
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=mask).logits
    width = b.completion_ids_ST.shape[1]
    plain = torch.log_softmax(logits[:, -width - 1 : -1], -1).gather(2, b.completion_ids_ST.unsqueeze(2)).squeeze(2)
    on = b.completion_mask_ST.bool()
    torch.testing.assert_close(seen["logps"][on], plain[on], atol=1e-5, rtol=1e-5)


class Critic(Grpo):
    """An objective with a trained module on the policy's hidden states."""

    needs = frozenset({"hidden"})
    modules_learning_rate = 0.1

    def modules(self, policy):
        if not hasattr(self, "head"):
            self.head = torch.nn.Linear(64, 1)
        return {"value": self.head}

    def loss(self, lctx):
        values_BT = self.head(lctx.hidden_BTD).squeeze(-1)
        fit = ((values_BT - 1.0) ** 2 * lctx.mask_BT).sum() / lctx.denominator_tokens
        return super().loss(lctx) + fit


def test_objective_modules_are_trained_and_saved(make_trainer):
    trainer = make_trainer([], Critic(), max_steps=3)
    before = trainer.stack.objective.head.weight.detach().clone()
    trainer.train()
    assert not torch.equal(before, trainer.stack.objective.head.weight)
    other = make_trainer([], Critic(), max_steps=3)
    other.load_state_dict(trainer.state_dict())
    assert torch.equal(other.stack.objective.head.weight, trainer.stack.objective.head.weight)


def test_gradients_of_objective_modules_do_not_pile_up(make_trainer):
    seen = []

    class Constant(Grpo):
        def modules(self, policy):
            if not hasattr(self, "weight"):
                self.weight = torch.nn.Linear(1, 1, bias=False)
            return {"weight": self.weight}

        def loss(self, lctx):
            if self.weight.weight.grad is not None:
                seen.append(float(self.weight.weight.grad))
            return super().loss(lctx) + self.weight.weight.sum()

    trainer = make_trainer([], Constant(), max_steps=4)
    trainer.train()
    assert all(g == 0.0 for g in seen) or seen == []


def test_a_stream_goes_on_within_a_step(make_trainer):
    class TwoTurns(Method):
        name = "two_turns"

        def advantages(self, adv_ST, ctx):
            from experiments.engines.base import Request

            ask = [Request(prompt="1+2=", max_tokens=5) for _ in range(20)]
            self.first = [r[0].text for r in ctx.generate(ask, stream="a")]
            self.second = [r[0].text for r in ctx.generate(ask, stream="a")]
            return adv_ST

    runs = []
    for _ in range(2):
        method = TwoTurns()
        make_trainer([method], max_steps=1).train()
        runs.append((method.first, method.second))
    assert runs[0] == runs[1] and runs[0][0] != runs[0][1]


def test_rewards_of_weight_zero_neither_train_nor_keep_a_group_alive(make_trainer):
    from experiments.rewards import RewardSpec

    specs = [
        RewardSpec("task", lambda t, r: [1.0] * len(t), 1.0, "outcome"),
        RewardSpec("length", lambda t, r: [float(len(x)) for x in t], 0.0, "aux"),
    ]
    trainer = make_trainer([], Dapo(dynamic_sampling=True, max_draws=2), rewards=specs, max_steps=1)
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["groups/dead"] == 1.0 and logs["groups/draws"] == 2


class FirstGroupLives(Method):
    name = "first"
    keeps_dead_groups = True

    def advantages(self, adv_ST, ctx):
        first = torch.tensor([float(t.group_id == ctx.trajs[0].group_id) for t in ctx.trajs])
        return first[ctx.batch.traj_S].unsqueeze(1) * ctx.batch.model_mask_ST


@pytest.mark.parametrize(("methods", "live"), [([], 0.0), ([FirstGroupLives()], 0.25)])
def test_groups_that_have_an_advantage_are_counted(make_trainer, methods, live):
    trainer = make_trainer(methods, reward=lambda texts, rows: [0.7] * len(texts), rollouts_per_prompt=5, max_steps=1)
    trainer.train()
    logs = trainer.state.log_history[0]
    assert (logs["groups/dead"], logs["groups/live"]) == (1.0, live)


@pytest.mark.parametrize(("live", "hinted"), [(0.0, True), (0.9, False)])
def test_a_run_is_not_said_to_lack_signal_that_it_has(tmp_path, capsys, live, hinted):
    from experiments.progress import Progress

    Progress(tmp_path / "runs" / "x", "one run")(1, 1, {"groups/dead": 1.0, "groups/live": live})
    assert ("no signal" in capsys.readouterr().err) == hinted


def test_a_loss_that_is_no_number_stops_the_run(make_trainer, tmp_path):
    from experiments.recorder import Recorder, StopSignals
    from experiments.records import RunWriter

    class Broken(Method):
        name = "broken"

        def extra_loss(self, lctx):
            return lctx.logps_BT.sum() * float("nan")

    trainer = make_trainer([Broken()])
    writer = RunWriter.open(tmp_path / "run", {"experiment": "x"}, {})
    recorder = Recorder(
        writer,
        state=trainer.state_dict,
        evaluate=lambda step: None,
        boundary=1,
        eval_every=0,
        keep=1,
        stop=StopSignals(),
        progress=lambda *_: None,
    )
    trainer.attach(recorder, writer.sample)
    trainer.args.logging_nan_inf_filter = False
    with pytest.raises(RunError, match="not finite"):
        trainer.train()


class Credit(Method):
    """Unequal credit inside a row, not declared."""

    name = "credit"

    def token_advantages(self, adv_BT, lctx):
        return adv_BT * torch.arange(adv_BT.shape[1])


def test_undeclared_token_credit_on_a_sequence_ratio_is_refused(make_trainer):
    from methods.objectives.policy_gradient import Gspo

    with pytest.raises(ConfigError, match="gspo_token"):
        make_trainer([Credit()], Gspo(), max_steps=1).train()


def test_self_check_names_what_moved(monkeypatch):
    from trl import GRPOTrainer

    from experiments import trl_check

    assert trl_check.self_check() == []
    monkeypatch.delattr(GRPOTrainer, "_tokenize_prompts")
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self, model, batch: None)
    problems = trl_check.self_check()
    assert "GRPOTrainer._tokenize_prompts is gone" in problems
    assert "GRPOTrainer._compute_loss lost its parameter 'inputs'" in problems
    with pytest.raises(ConfigError, match="_tokenize_prompts"):
        trl_check.require_trl()
