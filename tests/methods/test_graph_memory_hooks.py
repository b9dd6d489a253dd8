"""Graph memory in real steps: making the memory, using it, its state, its controls, and what it refuses."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiments.services import Services
from experiments.tasks.base import Row
from methods.base import Context, Segment, Trajectory, Turn
from methods.controls import Flip, Shuffle
from methods.errors import ConfigError
from methods.graph_memory.graph import Edges, Memory, Strategy, memory_of, state_of
from methods.graph_memory.graph_memory import GraphMemory
from methods.graph_memory.prompts import before, question_of, reward_gap
from methods.ha_dw import HaDw
from methods.objectives.graph_weights import GraphWeights
from methods.objectives.policy_gradient import Grpo
from methods.stack import Stack

ADVICE = ["1+1=2", "2+2=4", "3+3=6"]


def embed(texts):
    return Services(None, None, 0, SimpleNamespace()).embed(texts).numpy()


def dense(edges, shape):
    weights = np.zeros(shape)
    weights[edges.source_E, edges.target_E] = edges.weight_E
    return weights


@pytest.fixture
def memory():
    """Three stored questions on two paths, three strategies of different weight."""
    asked = ["1+2-3=", "5*3+1-2=", "7+7="]
    none = np.zeros((3, 2), np.int64)
    to_paths = Edges(np.array([0, 1, 2]), np.array([0, 1, 0]), np.ones(3), none)
    ends = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 2])
    to_strategies = Edges(*ends, np.array([1.0, 0.5, 0.7, 1.2]), np.zeros((4, 2), np.int64))
    return Memory(asked, embed(asked), [("a",), ("b",)], [Strategy(t) for t in ADVICE], to_paths, to_strategies)


class Seen(GraphMemory):
    """Keeps what each generation showed and the rewards it was judged on."""

    def __init__(self, **keys):
        super().__init__(**keys)
        self.rows, self.steps = [], []

    def prepare_rows(self, rows, ctx):
        out = super().prepare_rows(rows, ctx)
        if ctx.mode == "train":
            self.rows.append([(row.id, row.prompt) for row in out])
        return out

    def _weigh(self, ctx, activation, p_BM, chosen_B):
        before_it = copy.deepcopy(self.store)
        super()._weigh(ctx, activation, p_BM, chosen_B)
        questions = [question_of(row) for row in ctx.rows[:: ctx.group_size]]
        rewards = ctx.reward("task").view(len(questions), -1).tolist()
        self.steps.append((before_it, questions, rewards, chosen_B, copy.deepcopy(self.store)))


def made(make_trainer, method, *controls, steps=5):
    trainer = make_trainer([method, *controls], GraphWeights(), max_steps=steps, folder=None)
    start = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert all(torch.equal(x, start[name]) for name, x in trainer.model.state_dict().items())
    return trainer


def test_the_two_stages(make_trainer):
    method = Seen(memory_questions=8, weight_questions=8, planted=ADVICE, temperature=2.0)
    trainer = made(make_trainer, method)
    ids = [[row for row, _ in rows[::4]] for rows in method.rows]
    assert not set(ids[0] + ids[1]) & set(ids[2] + ids[3]) and ids[4] == ids[2]  # stage 1 once, stage 2 over and over
    assert len(set(ids[0] + ids[1])) == len(set(ids[2] + ids[3])) == 8
    plain = dict(row for rows in method.rows[:2] for row in rows) | {i: p for r in method.rows[2:] for i, p in r[::4]}
    assert not any("\n" in prompt for prompt in plain.values())
    tried = 0
    for rows in method.rows[2:]:
        for g in range(4):
            prompts = [prompt for _, prompt in rows[4 * g : 4 * g + 4]]
            assert prompts[0] == prompts[1] and prompts[2] == prompts[3]
            told, _, question = prompts[2].rpartition("\n")
            assert question == prompts[0] and told in ["", *ADVICE]
            tried += bool(told)
    assert tried and trainer.cost["trained_tokens"] == 0
    assert sorted(method.used) == sorted({i for r in ids for i in r})
    assert {s.text for s in method.store.strategies} == set(ADVICE)
    log = next(h for h in reversed(trainer.state.log_history) if "graph_memory/gap" in h)
    assert log["graph_memory/weight/1+1=2"] > 0 and log["graph_memory/questions"] == 8


def reference_step(memory, question, reward, k, method, sign=1.0):
    """dL/dw of one question with dense matrices and autograd, written from the formulas."""
    Q, J, M = memory.sizes
    s = np.clip(embed([question])[0] @ memory.embedding_QD.T, 0, 1)
    s[np.argsort(-s, kind="stable")[method.neighbours :]] = 0
    W = [
        torch.tensor(dense(e, shape), dtype=torch.float64, requires_grad=True)
        for e, shape in ((memory.to_paths, (Q, J)), (memory.to_strategies, (J, M)))
    ]
    rho = torch.tensor(s, dtype=torch.float64) @ W[0] @ W[1]
    reached = rho > 0
    if not reached.any():
        return None
    half = len(reward) // 2
    gap = sign * (np.mean(reward[half:]) - np.mean(reward[:half]))
    log_p = rho[k] / method.temperature - torch.logsumexp(rho[reached] / method.temperature, 0)
    (-gap * log_p).backward()
    return [w.grad.numpy() for w in W]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_updates_of_real_steps_against_autograd(make_trainer, memory, sign):
    method = Seen(memory=memory, memory_questions=0, weight_questions=12, neighbours=2, temperature=1.5)
    controls = [] if sign > 0 else [Flip("graph_memory.gap")]
    made(make_trainer, method, *controls, steps=3)
    assert len(method.steps) == 3
    moved = 0.0
    for old, questions, rewards, chosen, new in method.steps:
        total = [np.zeros((3, 2)), np.zeros((2, 3))]
        for question, reward, k in zip(questions, rewards, chosen, strict=True):
            if (slopes := reference_step(old, question, reward, int(k), method, sign)) is not None:
                total = [t + x for t, x in zip(total, slopes, strict=True)]
        for name, shape, slope in (("to_paths", (3, 2), total[0]), ("to_strategies", (2, 3), total[1])):
            was, now = (getattr(m, name) for m in (old, new))
            at = dense(was, shape) > 0
            wanted = np.clip(dense(was, shape) - method.learning_rate * slope, 0.01, 5)[at]
            assert dense(now, shape)[at] == pytest.approx(wanted, abs=1e-6)
            moved += abs(now.weight_E - was.weight_E).sum()
    assert moved > 0


def test_training_shows_the_best_strategies_to_whole_groups(make_trainer, memory):
    method = Seen(memory=memory, shown=2, neighbours=2)
    trainer = make_trainer([method], Grpo(), max_steps=2)
    before_it = state_of(method.store)
    trainer.train()
    assert len(method.rows) == 2
    for rows in method.rows:
        for g in range(4):
            prompts = {prompt for _, prompt in rows[4 * g : 4 * g + 4]}
            (prompt,) = prompts
            *told, question = prompt.split("\n")
            rho = memory.activate(embed([question]), 2).relevance_BM[0]
            order = [int(k) for k in np.argsort(-rho, kind="stable") if rho[k] > 0][:2]
            assert told == [ADVICE[k] for k in order]
    for name, x in state_of(method.store)["to_strategies"].items():
        assert torch.equal(x, before_it["to_strategies"][name])


def context(mode="train", objective="grpo", rows=(), group=2):
    services = SimpleNamespace(
        embed=lambda texts: torch.from_numpy(embed(texts)),
        train_rows=lambda count, name: list(rows),
        limits=SimpleNamespace(objective=objective),
        rng=lambda name: np.random.default_rng(0),
    )
    return Context(mode, 0, 0, group, services=services)


def row(name, prompt, **meta):
    return Row(name, prompt, "1", meta=meta)


def test_questions_of_the_memory_are_not_trained_on(memory):
    method = GraphMemory(memory=memory)
    method.earlier, method.used = ["a"], ["b"]
    rows = [row(name, f"{i}+1=") for i, name in enumerate("abcd")]
    asked = [r for r in rows[:3] for _ in range(2)]
    out = method.prepare_rows(asked, context(rows=rows))
    assert [r.id for r in out[::2]] == ["c", "d", "c"]
    with pytest.raises(ConfigError, match="too few training questions"):
        method.prepare_rows(asked[:2], context(rows=rows[:2]))
    with pytest.raises(ConfigError, match="too few training questions"):
        method.prepare_rows(asked, context(objective="graph_weights", rows=rows))


def test_a_leak_is_refused_in_evaluation(memory):
    method = GraphMemory(memory=memory)
    fine = method.prepare_rows([row("x", "7+7-1=")] * 2, context("eval"))
    assert fine[0].prompt.endswith("\n7+7-1=")
    with pytest.raises(ConfigError, match=r"evaluation question is in the memory.*row y"):
        method.prepare_rows([row("x", "7+7-1=")] * 2 + [row("y", "7+7=")] * 2, context("eval"))


def test_bare_questions(memory):
    rows = [row("x", "7+7-1=")] * 2
    assert GraphMemory().prepare_rows(rows, context("eval")) == rows
    assert GraphMemory(memory=memory, shown=0).prepare_rows(rows, context("eval")) == rows
    strange = [row("x", "")] * 2  # its embedding is the zero vector
    assert GraphMemory(memory=memory).prepare_rows(strange, context("eval")) == strange


def test_advice_in_a_chat_and_the_question_of_a_row():
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "p"}]
    told = before(row("x", chat), "A.\nB.")
    assert [m["content"] for m in told.prompt] == ["s", "A.\nB.\nq", "p"] and chat[1]["content"] == "q"
    assert question_of(row("x", chat)) == "q" and question_of(row("x", chat, question="who?")) == "who?"
    assert before(row("x", "q"), "") == row("x", "q")


def test_the_gap_leaves_unscored_rollouts_out():
    nan = math.nan
    rewards = torch.tensor([[0, 1, 1, 1], [nan, 1, 0, nan], [nan, nan, 1, 1], [1, 1, nan, nan]], dtype=torch.float32)
    assert reward_gap(rewards).tolist() == [0.5, -1.0, 0.0, 0.0]
    assert reward_gap(torch.tensor([[1.0, 0.0, 0.5]])).tolist() == [-0.75]  # of three the first is without


def test_an_unscored_rollout_is_neither_success_nor_failure():
    direct, called = [Turn(0, 0, 1)], [Turn(0, 0, 1, "call", [{}], "r"), Turn(0, 1, 2)]
    trajs = [Trajectory("a", 0, k, [Segment([0], [1, 2])], turns) for k, turns in enumerate((called, direct, direct))]
    fake = SimpleNamespace(
        reward=lambda name: torch.tensor([1.0, math.nan, 0.0]), reward_name=lambda role: "task", trajs=trajs,
        group_size=3, tokenizer=SimpleNamespace(batch_decode=lambda ids: ["x"] * len(ids)), step=0,
        rows=[row("a", "1+1=")] * 3, embed=lambda texts: torch.from_numpy(embed(texts)),
    )  # fmt: skip
    method = GraphMemory()
    method._build(fake)
    assert method.store.to_paths.count_E2.tolist() == [[1, 0], [0, 1]]  # one success, one failure


def test_a_gap_needs_two_rollouts(memory):
    rows = [row(str(i), f"{i}+1=") for i in range(40)]
    asked = context(objective="graph_weights", rows=rows, group=1)
    with pytest.raises(ConfigError, match="rollouts_per_prompt"):
        GraphMemory(memory_questions=2, weight_questions=8).prepare_rows(rows[:2], asked)


def test_shuffled_relevance_shows_other_strategies(memory):
    method = GraphMemory(memory=memory, shown=1, neighbours=2)
    ctx = context("eval")
    ctx.signal_fn = Stack([method, Shuffle("graph_memory.relevance")], Grpo(), check=False).signal
    asked = [row(str(i), f"7+7+{i}-3=") for i in range(1, 7)]
    told = [r.prompt.split("\n")[0] for r in method.prepare_rows([r for r in asked for _ in range(2)], ctx)[::2]]
    ctx.signal_fn = None
    plain = [r.prompt.split("\n")[0] for r in method.prepare_rows([r for r in asked for _ in range(2)], ctx)[::2]]
    assert told != plain


def test_state_and_inheritance(memory):
    method = GraphMemory(memory=memory)
    method.earlier, method.used, method.last = ["a"], ["b"], {"gap": 0.5}
    fresh, heir = GraphMemory(), GraphMemory()
    fresh.load_state_dict(method.state_dict())
    assert (fresh.earlier, fresh.used, fresh.last) == (["a"], ["b"], {"gap": 0.5})
    Stack([heir], Grpo()).inherit({"graph_memory": method.state_dict(), "ha_dw": {}})
    assert (heir.earlier, heir.used, heir.last) == (["a", "b"], [], {})
    for other in (fresh, heir):
        assert other.store.questions == memory.questions and other.store.index_of == memory.index_of
    own = GraphMemory(memory=memory_of(state_of(Memory())))
    own.inherit(method.state_dict())
    assert own.store.questions == []  # a memory that the user names goes first


@pytest.mark.parametrize(
    ("keys", "where"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"neighbours": 0}, "neighbours"),
        ({"shown": -1}, "shown"),
        ({"planted": "Be polite."}, "planted"),
        ({"planted": [3]}, "planted"),
        ({"memory": "m.safetensors"}, "memory"),
    ],
)
def test_impossible_settings_are_refused(keys, where):
    with pytest.raises(ConfigError, match=f"method.graph_memory.{where}"):
        GraphMemory(**keys)


def test_the_objective_serves_the_memory_alone():
    Stack([GraphMemory(), Flip("graph_memory.gap")], GraphWeights())
    for methods in ([], [HaDw()], [GraphMemory(), HaDw()]):
        with pytest.raises(ConfigError, match="serves graph_memory alone") as refusal:
            Stack(methods, GraphWeights())
        assert refusal.value.fix.startswith("choose objective=grpo")
