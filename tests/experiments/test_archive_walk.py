"""The archive: its rows, its tools, its symbolic quality, walks by a perfect reader, and a real training step on it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from experiments.services import Services
from experiments.tasks.archive_walk import ENTITIES, SYMBOLS, TOKEN, Archive, ArchiveWalk, PairForm, key, pairs
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
    """Keeps a page up to its asked pair, at the level with room for that, and answers from memory."""
    rest, _, asked = prompt.rstrip("f").partition("?")
    _, _, page = rest.partition("d")
    shown, known = pairs(page), [p for p in pairs(rest) if key(p) == asked]
    answer = f"!{asked}" + (known[0] if known else "u")
    if not page:
        return answer if prompt.endswith("f") else re.search(r"oe\d+", rest)[0]
    kept = shown[: max((n for n, p in enumerate(shown, 1) if key(p) == asked), default=0)]
    level = next(k for k, room in enumerate((0, 1, 2, 4, 6), 1) if room >= len(kept))
    action = page[len("".join(shown)) :]
    return f"l{level}" + "".join(kept) + (action if action != "f" else "f" + answer)


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
    assert rows == task.rows("eval", 3) != task.rows("eval", 4) and Counter(r.tier for r in rows)["16"] == 6
    for row in rows:
        assert task.score(row.answer, row) == 1 and task.score(row.answer[:-1] + "x", row) == 0
        assert all(len(page) == 6 for page in row.meta["written"])
        assert sum(key(p) == row.meta["asked"] for page in row.meta["written"] for p in page) == 1
    assert {r.tier for r in task.rows("train", 0)} == {"3", "5"}


def test_every_symbol_comes_back_and_demonstrations_fit_the_prompt(task):
    assert len(SYMBOLS) < 200
    tokenizer = tiny_tokenizer(SYMBOLS)
    for row in task.warm_rows(0)[:200]:
        ids = tokenizer(row.prompt + row.demo)["input_ids"]
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == row.prompt + row.demo
        assert len(tokenizer(row.prompt)["input_ids"]) <= 20
        assert len(tokenizer(row.demo)["input_ids"]) < task.max_completion_tokens


def test_demonstrations_choose_levels_and_lose_facts(task):
    def levels(task):
        return Counter(m[1] for m in (re.match(r"l(\d)", r.demo) for r in task.warm_rows(0)) if m)

    random = levels(replace(task, demo_right=0.0))
    assert set(random) == set("12345") and max(random.values()) < 2 * min(random.values())
    right = levels(replace(task, demo_right=1.0))
    assert right["1"] == right.total() - len(task.rows("train", 0))  # one page of each walk holds the asked pair
    answers = [r for r in task.warm_rows(0) if "!" in r.demo]
    assert {r.demo.endswith("u") for r in answers} == {True, False}


def test_a_page_is_opened_once_and_a_page_beside_the_walk_tells_nothing(task):
    row = next(r for r in task.rows("eval", 0) if r.tier == "5")
    archive = Archive(row)
    beside = next(e for e in ENTITIES if e not in row.meta["walk"])
    assert archive.open(row.meta["walk"][0]) == "".join(row.meta["written"][0]) + "o" + row.meta["walk"][1]
    assert not [p for p in pairs(archive.open(beside)) if key(p) in row.meta["asked"]]
    for entity in (beside, row.meta["walk"][0]):
        with pytest.raises(LookupError, match="before"):
            archive.open(entity)
    with pytest.raises(LookupError, match="there is no"):
        archive.open("e99")


@pytest.mark.parametrize(
    "bad",
    [
        {"demo_right": 2},
        {"demo_right": float("nan")},
        {"max_prompt_tokens": 10},
        {"mixture": {"2": 1}},
        {"pages": {"2": 0}, "mixture": {"2": 1}},
    ],
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
PAGE = ["p0k0v0", "p1k2v1", "p2k1v2", "p3k3v3", "p4k0v1", "p5k0v2"]


@pytest.mark.parametrize(
    ("kept", "level", "ratio", "fit", "info", "sem"),
    [
        (PAGE[:4], 4, 1, 1, 1, 1),  # up to the asked pair, the fourth of the page
        (["p0k0v0", "p1k2v1", "p2k1v3", "p3k3v3"], 4, 1, 1, 1, 0.75),  # a wrong value
        (["p0k0v0", "p1k2v1"], 3, 1, 0.75, 0, 1),
        ([], 1, 1, 0.25, 0, 1),
        (PAGE, 1, 0.035674, 0.25, 1, 1),  # the whole page under the shortest level: exp(-(1 - 4/6) / 0.1)
    ],
)
def test_symbolic_quality(kept, level, ratio, fit, info, sem):
    row = SimpleNamespace(meta={"asked": "k3"})
    got = PairForm(row, Scale()).quality(Document("d", _text(PAGE) + "oe3"), Zip("d", level, _text(kept)))
    assert [got[p] for p in ("ratio", "level", "info", "sem")] == pytest.approx([ratio, fit, info, sem], abs=1e-6)
    assert got["relevance"] == 4
    page = _text(p for p in PAGE if "k3" not in p)
    assert PairForm(row, Scale()).quality(Document("d", page), Zip("d", 1, ""))["com"] == 1
    assert set(PairForm(row, Scale()).quality(Document("d", ""), Zip("d", 1, "")).values()) == {0.0}  # an empty page


@pytest.mark.parametrize(("place", "level"), [(0, 2), (1, 3), (2, 4), (3, 4), (4, 5), (5, 5), (None, 1)])
def test_the_level_that_a_page_asks_for_has_room_for_the_asked_pair(place, level):
    page = [f"p{i}k{2 if i == place else 1}v0" for i in range(6)]
    assert PairForm(SimpleNamespace(meta={"asked": "k2"}), Scale()).needed(Document("d", _text(page) + "f")) == level


def _text(kept):
    return "".join(kept)


# ---- walks ----
def test_a_perfect_reader_answers_every_question_within_the_prompt(task):
    rows = task.rows("eval", 0)
    trajs, columns, seen = walk(task, rows, max_turns=40)
    assert all(task.score(t.text, t.row) == 1 for t in trajs)
    assert columns["turns"] == [len(r.meta["walk"]) + 1 for r in rows] and set(columns["finished"]) == {1.0}
    assert max(columns["peak_prompt"]) <= 20 and not any(columns["overflow_cut"]) and not any(columns["forced"])
    assert sum(columns["quality"]) / len(rows) > 0.9 and max(len(TOKEN.findall(p)) for p in seen) <= 20


def test_without_compression_long_walks_lose_their_beginning(task):
    rows = [r for r in task.rows("eval", 0) if r.tier == "16"]
    trajs, columns, seen = walk(task, rows, max_turns=40, compression="none")
    assert all(columns["overflow_dropped"]) and max(len(TOKEN.findall(p)) for p in seen) <= 20
    assert sum(task.score(t.text, t.row) for t in trajs) < 0.5 * len(trajs)


def test_a_walk_of_256_turns_keeps_the_prompt_flat():
    task = ArchiveWalk(pages={"255": 255}, mixture={"255": 1}, train_rows=1, eval_rows=1)
    rows = task.rows("eval", 0)
    trajs, columns, _ = walk(task, rows, max_turns=300)
    assert columns["turns"] == [256] and columns["peak_prompt"][0] <= 20 and len(trajs[0].segments) == 256
    assert not columns["overflow_cut"][0] and not columns["overflow_dropped"][0]  # irrelevant pages leave nothing
    assert task.score(trajs[0].text, trajs[0].row) == 1


def test_a_page_longer_than_the_prompt_is_halved_until_it_fits(task):
    rows = [r for r in task.rows("eval", 0) if r.tier == "3"]
    settings = {"max_prompt_tokens": 8, "max_turns": 4}
    trajs, columns, seen = walk(task, rows, **settings)
    assert max(len(TOKEN.findall(p)) for p in seen) <= 8 and all(columns["overflow_document"])
    assert all(t.turns[1].scores["source"] == 3 for t in trajs if len(t.turns) > 1)


def test_a_cap_forces_the_answer_and_uniform_levels_are_written_for_the_model(task):
    rows = [r for r in task.rows("eval", 0) if r.tier == "5"][:2]
    trajs, columns, seen = walk(task, rows, max_turns=3)
    assert columns["forced"] == [1, 1] and seen[-1].endswith("f") and all(t.turns[-1].kind == "forced" for t in trajs)
    after = walk(task, rows, lambda p: reader(re.sub(r"l\d$", "", p)).partition("l")[2][1:], max_turns=3,
                 compression="uniform", level=4)  # fmt: skip
    assert all(p.endswith("l4") for p in after[2] if "d" in p)


# ---- a real step ----
def scripted(trainer, agent):
    """Lets `agent` write the turns that the model would; the model is trained on them as they are."""

    def generate(requests, stream):
        prompts = trainer._tokenizer.batch_decode([r["prompt_ids"] for r in requests])
        out = []
        for k, prompt in enumerate(prompts):
            text = agent(prompt) if k % 3 else agent(prompt).replace("l1", "l4")
            text = text.rpartition("p")[0] if "f" in text and k % 5 == 0 else text
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
