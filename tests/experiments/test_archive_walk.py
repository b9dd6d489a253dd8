"""The archive: its rows, its tools, its symbolic quality, walks by a perfect reader, and a real training step on it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from experiments.services import Services
from experiments.tasks.archive_walk import SYMBOLS, TOKEN, Archive, ArchiveWalk, PairForm, key, pairs
from experiments.tokenizers import tiny_tokenizer
from methods.base import Context
from methods.errors import ConfigError
from methods.objectives.policy_gradient import Grpo
from methods.stack import Stack
from methods.ziprl.forms import Document, Zip
from methods.ziprl.quality import Scale
from methods.ziprl.ziprl import ZipRl


@pytest.fixture(scope="module")
def task():
    return ArchiveWalk(train_rows=60, eval_rows=25)


def reader(prompt: str) -> str:
    """Keeps the asked pairs, at the level that fits their number, and answers from memory."""
    head, _, rest = prompt.rstrip("f").partition(":")
    start, relation = re.fullmatch(r"q(e\d+)(k\d+)", head).groups()
    asked = re.match(r"(?:k\d+(?![\dev]))*", rest)[0]
    memory, _, page = rest[len(asked) :].rstrip("=").partition("d")
    asked = re.findall(r"k\d+", asked)
    known = "".join(p for p in re.findall(r"k\d+v\d+", memory) if key(p) in asked)
    if not page:
        return known if prompt.endswith("f") else f"o{start}"
    entity = re.match(r"e\d+", page)[0]
    shown = pairs(page[len(entity) :])
    kept = [p for p in shown if key(p) in asked]
    zipped = f"z{entity}l{1 + len(kept)}" + "".join(kept)
    after = [p for p in shown if key(p) == relation]
    return zipped + ("o" + after[0].removeprefix(relation) if after else "f" + known + "".join(kept))


def walk(task, rows, agent=reader, **settings):
    """The trajectories of an agent that reads and writes text, and the prompts that it saw."""
    tokenizer, seen = tiny_tokenizer(SYMBOLS), []

    def generate(requests, stream):
        prompts = [tokenizer.decode(r["prompt_ids"]) for r in requests]
        seen.extend(prompts)
        texts = [agent(p) for p in prompts]
        return [[SimpleNamespace(text=t, ids=tokenizer(t)["input_ids"] + [tokenizer.eos_token_id])] for t in texts]

    services = SimpleNamespace(
        encode=lambda prompts: [tokenizer(p)["input_ids"] for p in prompts],
        tokenizer=tokenizer,
        limits=SimpleNamespace(max_completion_tokens=task.max_completion_tokens),
        generate=generate,
        env=task.environment,
        call=Services(None, task, 0, SimpleNamespace()).call,
    )
    ctx = Context("eval", 0, 0, 1, services=services)
    method = ZipRl(**{"max_prompt_tokens": task.max_prompt_tokens} | settings)
    trajs = method.rollout(rows, ctx, default=None)
    return trajs, method.eval_metrics(trajs, ctx), seen


# ---- rows and tools ----
def test_rows_are_the_same_for_a_seed_and_the_gold_answer_scores_1(task):
    rows = task.rows("eval", 3)
    assert rows == task.rows("eval", 3) != task.rows("eval", 4) and Counter(r.tier for r in rows)["16"] == 5
    for row in rows:
        assert task.score(row.answer, row) == 1 and task.metrics(row.answer, row) == {"f1": 1.0}
        assert task.score(row.answer[:-1] + "x", row) == 0 == task.metrics("", row)["f1"]
        assert 1 <= len(re.findall("v", row.answer)) <= task.max_facts
        assert all(len(page) == 12 for page in row.meta["written"])
    assert {r.tier for r in task.rows("train", 0)} == {"2", "3", "5"}


def test_every_symbol_comes_back_and_demonstrations_fit_the_prompt(task):
    assert len(SYMBOLS) < 500
    tokenizer = tiny_tokenizer(SYMBOLS)
    for row in task.warm_rows(0)[:200]:
        ids = tokenizer(row.prompt + row.demo)["input_ids"]
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == row.prompt + row.demo
        assert len(tokenizer(row.prompt)["input_ids"]) <= 56
        assert len(tokenizer(row.demo)["input_ids"]) < task.max_completion_tokens


def test_demonstrations_choose_levels_at_random_and_lose_facts(task):
    found = [re.match(r"ze\d+l(\d)", r.demo) for r in task.warm_rows(0)]
    levels = Counter(m[1] for m in found if m)
    assert set(levels) == set("12345") and max(levels.values()) < 2 * min(levels.values())


def test_a_page_is_opened_once_and_a_page_beside_the_walk_tells_nothing(task):
    row = task.rows("eval", 0)[0]
    archive = Archive(row)
    beside = next(e for e in ("e0", "e1", "e2", "e3", "e4", "e5", "e6", "e7") if e not in row.meta["walk"])
    assert archive.open(row.meta["walk"][0]).endswith("".join(row.meta["written"][0]))
    assert not [p for p in pairs(archive.open(beside)) if key(p) in row.meta["asked"]]
    for entity in (beside, row.meta["walk"][0]):
        with pytest.raises(LookupError, match="before"):
            archive.open(entity)
    with pytest.raises(LookupError, match="there is no"):
        archive.open("e99")


@pytest.mark.parametrize(
    "bad", [{"keys": 5}, {"relevant": 2}, {"mixture": {"2": 1}}, {"pages": {"2": 0}, "mixture": {"2": 1}}]
)
def test_settings_that_cannot_be_met_are_refused(bad):
    with pytest.raises(ConfigError):
        ArchiveWalk(**bad)


@pytest.mark.parametrize("method", ["[]", "[ha_dw]"])
def test_a_stack_that_runs_no_episodes_is_refused(method):
    from experiments.bench import configuration
    from experiments.run import check

    with pytest.raises(ConfigError, match=r"add method=\[ziprl_archive\]"):
        check(configuration("task=archive_walk", f"method={method}"))
    check(configuration("task=archive_walk", "method=[ziprl_archive]"))


# ---- quality ----
PAGE = [f"k{k}v{k}" for k in range(4, 15)] + ["k0e1"]


@pytest.mark.parametrize(
    ("kept", "level", "ratio", "fit", "info", "sem"),
    [
        (["k4v4", "k5v5", "k6v6"], 3, 1, 1, 1, 1),  # both asked pairs and one more: level 3 asks for 3 to 5
        (["k4v4", "k5v9", "k6v6"], 3, 1, 1, 0.5, 2 / 3),  # a wrong value is neither kept nor true
        ([], 1, 1, 0.5, 0, 1),
        (PAGE, 1, 0.001273, 0.5, 1, 1),  # the whole page under the shortest level: exp(-(1 - 4/12) / 0.1)
    ],
)
def test_symbolic_quality(kept, level, ratio, fit, info, sem):
    row = SimpleNamespace(meta={"asked": ["k4", "k5"]})
    got = PairForm(row, Scale()).quality(Document("e1", _text(PAGE)), Zip("e1", level, _text(kept)))
    assert [got[p] for p in ("ratio", "level", "info", "sem")] == pytest.approx([ratio, fit, info, sem], abs=1e-6)
    assert got["relevance"] == 2
    nothing = PairForm(SimpleNamespace(meta={"asked": ["k15"]}), Scale())
    assert nothing.quality(Document("e1", _text(PAGE)), Zip("e1", 1, ""))["com"] == 1
    assert set(nothing.quality(Document("e1", ""), Zip("e1", 1, "")).values()) == {0.0}  # an empty page


def _text(kept):
    return "".join(kept)


# ---- walks ----
def test_a_perfect_reader_answers_every_question_within_the_prompt(task):
    rows = task.rows("eval", 0)
    trajs, columns, seen = walk(task, rows, max_turns=40)
    assert all(task.score(t.text, t.row) == 1 for t in trajs)
    assert columns["turns"] == [len(r.meta["walk"]) + 1 for r in rows] and set(columns["finished"]) == {1.0}
    assert max(columns["peak_prompt"]) <= 56 and not any(columns["overflow_cut"]) and not any(columns["forced"])
    assert sum(columns["quality"]) / len(rows) > 0.9 and max(len(TOKEN.findall(p)) for p in seen) <= 56


def test_without_compression_long_walks_lose_their_beginning(task):
    rows = [r for r in task.rows("eval", 0) if r.tier == "16"]
    trajs, columns, seen = walk(task, rows, max_turns=40, compression="none")
    assert all(columns["overflow_dropped"]) and max(len(TOKEN.findall(p)) for p in seen) <= 56
    assert not any(task.score(t.text, t.row) for t in trajs)


def test_a_walk_of_256_turns_keeps_the_prompt_flat():
    task = ArchiveWalk(pages={"255": 255}, mixture={"255": 1}, train_rows=1, eval_rows=1, relevant=0.02)
    rows = task.rows("eval", 0)
    trajs, columns, _ = walk(task, rows, max_turns=300)
    assert columns["turns"] == [256] and columns["peak_prompt"][0] <= 56 and len(trajs[0].segments) == 256
    assert not columns["overflow_cut"][0] and not columns["overflow_dropped"][0]  # irrelevant pages leave nothing
    assert task.score(trajs[0].text, trajs[0].row) == 1


def test_a_page_longer_than_the_prompt_is_halved_until_it_fits(task):
    rows = [r for r in task.rows("eval", 0) if r.tier == "2"]
    settings = {"max_prompt_tokens": 14, "max_turns": 4}
    trajs, columns, seen = walk(task, rows, **settings)
    assert max(len(TOKEN.findall(p)) for p in seen) <= 14 and all(columns["overflow_document"])
    assert all(t.turns[1].scores["source"] in (3, 6) for t in trajs if len(t.turns) > 1)


def test_a_cap_forces_the_answer_and_uniform_levels_are_written_for_the_model(task):
    rows = [r for r in task.rows("eval", 0) if r.tier == "5"][:2]
    trajs, columns, seen = walk(task, rows, max_turns=3)
    assert columns["forced"] == [1, 1] and seen[-1].endswith("=f") and all(t.turns[-1].kind == "forced" for t in trajs)
    after = walk(task, rows, lambda p: reader(re.sub(r"=ze\d+l\d$", "=", p)).partition("l")[2][1:], max_turns=3,
                 compression="uniform", level=4)  # fmt: skip
    assert all(re.search(r"=ze\d+l4$", p) for p in after[2] if "d" in p)


# ---- a real step ----
def scripted(trainer, agent):
    """Lets `agent` write the turns that the model would; the model is trained on them as they are."""

    def generate(requests, stream):
        prompts = trainer._tokenizer.batch_decode([r["prompt_ids"] for r in requests])
        out = []
        for k, prompt in enumerate(prompts):
            text = agent(prompt) if k % 3 else agent(prompt).replace("l1", "l4")
            text = text.rpartition("k")[0] if "f" in text and k % 5 == 0 else text
            ids = [*trainer._tokenizer(text)["input_ids"], trainer._tokenizer.eos_token_id]
            out.append([SimpleNamespace(text=text, ids=ids, finish="stop")])
        return out

    trainer.services.generate = generate


def make(tmp_path, name, *words, method=("w=0.2",)):
    from hydra.utils import instantiate

    from experiments.bench import configuration, our_trainer

    settings = [f"method.ziprl.{m}" for m in method]
    cfg = configuration(
        "task=archive_walk", "method=[ziprl_archive]", "model.warm_start=null", "trainer.max_steps=1",
        "trainer.save_every=0", "eval.every=0", "task.train_rows=60", "trainer.prompts_per_step=4",
        "trainer.rollouts_per_prompt=4", *settings, *words,
    )  # fmt: skip
    task = instantiate(cfg.task)
    loaded = instantiate(cfg.model).load(task, 0)
    trainer = our_trainer(cfg, loaded, task, [instantiate(cfg.method.ziprl)], tmp_path / name)
    scripted(trainer, reader)
    return trainer


def test_a_real_step_equals_a_plain_reference_and_does_not_depend_on_chunks(tmp_path):
    """Rows, advantages, weights and the loss written out; with few rows per device the gradient is the same."""
    trainer = make(tmp_path, "whole")
    caught = {}
    real = trainer.stack.loss

    def loss(lctx):
        caught.setdefault("lctx", []).append((lctx, real(lctx)))
        return caught["lctx"][-1][1]

    trainer.stack.loss = loss
    trainer.train()
    batch, trajs = trainer.last_ctx.batch, trainer.last_ctx.trajs
    assert batch.rows == sum(len(t.segments) for t in trajs) > 2 * len(trajs)
    expected_S, weight_S = [], []
    for group in range(4):
        members = [t for t in trajs if t.group_id == group]
        rewards = torch.tensor([t.rewards["task"] for t in members])
        base = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        for a, t in zip(base.tolist(), members, strict=True):
            q = [turn.scores.get("q_com") for turn in t.turns]
            known = [x for x in q if x is not None]
            expected_S += [a + (0.2 * (x - sum(known) / len(known)) if x is not None else 0.0) for x in q]
            weight_S += [1 / len(t.turns)] * len(t.turns)
    first_S = batch.adv_ST[:, 0]
    torch.testing.assert_close(first_S, torch.tensor(expected_S), atol=1e-5, rtol=0)
    assert (batch.adv_ST == first_S.unsqueeze(1) * batch.model_mask_ST).all()
    # at the first update every ratio is 1: the loss is minus the mean over trajectories of the mean over turns
    total = sum(float(value.detach()) for _, value in caught["lctx"])
    plain = -sum(a * w for a, w in zip(expected_S, weight_S, strict=True)) / len(trajs)
    assert total == pytest.approx(plain, abs=1e-6) and max(map(abs, expected_S)) > 0.5
    small = make(tmp_path, "chunks")
    small.args.per_device_train_batch_size = 5
    small.train()
    norms = [t.state.log_history[0]["grad_norm"] for t in (trainer, small)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) and norms[0] > 0


def test_hindsight_replay_moves_a_batch_of_equal_rewards(tmp_path):
    """All episodes right, compressed well or badly: the outcome alone gives no gradient at all."""
    norms = {}
    for w in (0.0, 0.2):
        trainer = make(tmp_path, str(w), method=(f"w={w}",))
        trainer.reward_specs = [replace(trainer.reward_specs[0], fn=lambda texts, rows: [1.0] * len(texts))]
        trainer.train()
        norms[w] = trainer.state.log_history[0]["grad_norm"]
        assert trainer.stack.metrics()["ziprl/zero_variance_alive"] == float(w > 0)
    assert norms[0.0] == 0.0 < norms[0.2]


def test_a_record_shows_every_turn_and_evaluation_samples_as_it_was_told(tmp_path):
    from experiments import collect, hooked

    trainer = make(tmp_path, "whole")
    trainer.train()
    ctx = trainer.last_ctx
    shown = collect.samples(ctx, ctx.batch, trainer._tokenizer, 8)[0]
    assert len(shown["tokens"]) == len(shown["advantages"]) > 10 and shown["tokens"][0] == "o"
    asked, real = [], trainer.services.generate
    trainer.services.generate = lambda requests, stream: asked.append((requests, stream)) or real(requests, stream)
    how = hooked.Sampling(samples=2, temperature=0.25, top_p=0.5, max_tokens=65, seed=0)
    rows = trainer.task.rows("eval", 0)[:3]
    context = trainer.new_context("eval")
    trajs, columns = hooked.rollouts(trainer.stack, context, trainer.services.engine, rows, how, None)
    assert [t.group_id for t in trajs] == [0, 0, 1, 1, 2, 2] and len(columns["peak_prompt"]) == 6
    assert {(r["temperature"], r["top_p"]) for requests, _ in asked for r in requests} == {(0.25, 0.5)}
    assert {stream for _, stream in asked} == {"ziprl/eval"}


def test_a_task_without_tools_is_trained_as_without_the_method(make_trainer):
    losses = []
    for methods in ([], [ZipRl()]):
        trainer = make_trainer(methods, Grpo())
        trainer.train()
        losses.append([(h["loss"], h["grad_norm"]) for h in trainer.state.log_history if "loss" in h])
    assert losses[0] == losses[1]
    assert Stack([ZipRl()], Grpo()).owner("rollout") is not None
