"""ZipRL's loop and hooks: what a turn sees and leaves, every degenerate case, overflow, and credit on real rows."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from experiments.services import Services
from experiments.tools import SEARCH, Tools
from methods.base import Context, Segment, Trajectory, Turn, assemble
from methods.controls import Shuffle
from methods.errors import ConfigError
from methods.objectives.policy_gradient import Dapo, Grpo
from methods.objectives.ppo import Ppo
from methods.stack import Stack
from methods.ziprl import measures
from methods.ziprl.forms import Document, TextForm, Zip
from methods.ziprl.quality import Scale
from methods.ziprl.ziprl import ZipRl

PAGES = {
    "curie": "1. Marie Curie was born in Warsaw. She won two prizes.\n2. Polish cuisine is rich in meat.",
    "none": "",
}
GOOD = '<zip doc="d1" level="5">Marie Curie was born in Warsaw.</zip>'
BOTH = GOOD + '<zip doc="d2" level="1">Food.</zip>'


def search(query: str) -> str:
    if query == "boom":
        raise RuntimeError("the index is gone")
    if query == "hang":
        time.sleep(1.0)
    return PAGES[query]


def answers(*texts):
    """An agent that writes these turns, then finishes; it keeps the prompts that it was shown."""
    left, seen = list(texts), []

    def agent(prompt):
        seen.append(prompt)
        return left.pop(0) if left else "<tool>finish(Warsaw)</tool>"

    agent.seen = seen
    return agent


@pytest.fixture
def play():
    """play(method, agent, rows=1) -> (trajectories, context); characters are tokens."""

    def make(method, agent, rows=1, question="Where was Curie born?", group=None, mode="train", timeout=None):
        tools = Tools(SEARCH, timeout=timeout)
        runner = Services(None, SimpleNamespace(tools=tools), 0, SimpleNamespace())

        def generate(requests, stream):
            assert stream == f"ziprl/{mode}"
            texts = [agent("".join(map(chr, r["prompt_ids"]))) for r in requests]
            return [[SimpleNamespace(text=t, ids=list(map(ord, t)), finish="stop")] for t in texts]

        services = SimpleNamespace(
            encode=lambda prompts: [list(map(ord, p)) for p in prompts],
            tokenizer=SimpleNamespace(eos_token_id=0, __call__=None),
            limits=SimpleNamespace(max_completion_tokens=99),
            generate=generate,
            env=lambda row: SimpleNamespace(tools={"search": search}),
            call=runner.call,
        )
        ctx = Context(mode, 0, 0, group or rows, services=services)
        data = [SimpleNamespace(id=f"r{i}", meta={"question": question}, prompt=question) for i in range(rows)]
        ctx.trajs = method.rollout(data, ctx, default=None)
        return ctx.trajs, ctx

    return make


def test_a_turn_sees_raw_documents_once_and_keeps_their_zips(play):
    agent = answers("<tool>search(curie)</tool>", BOTH + "<tool>search(none)</tool>")
    (traj,), _ = play(ZipRl(), agent)
    assert [t.kind for t in traj.turns] == ["call", "call", "answer"] and traj.finish == "stop"
    first, second, third = agent.seen
    assert "(nothing yet)" in first and "level 5 (ultra-fine, 70% to 100% of its length)" in first
    assert "She won two prizes." in second and '<document id="d2">Polish cuisine' in second
    assert "She won" not in third and "cuisine" not in third
    assert "- search(curie)\n  d1: Marie Curie was born in Warsaw.\n  d2: Food." in third
    assert traj.text == "<answer>Warsaw</answer>"
    # one row per turn, exactly what was shown and written
    assert [s.prompt_ids for s in traj.segments] == [list(map(ord, p)) for p in agent.seen]
    assert [(t.segment, t.start, t.end) for t in traj.turns] == [(k, 0, len(s.completion_ids)) for k, s in
                                                                enumerate(traj.segments)]  # fmt: skip
    assert traj.turns[0].calls == [{"tool": "search", "args": {"query": "curie"}}]
    assemble([traj], 0)


def test_the_quality_of_a_turn_is_the_mean_over_its_documents(play):
    (traj,), _ = play(ZipRl(), answers("<tool>search(curie)</tool>", BOTH))
    assert measures.QUALITY not in traj.turns[0].scores  # nothing to zip: missing, not 0
    form = ZipRl()._form(traj.row, SimpleNamespace(tools={}))
    parts = [
        form.quality(Document("d1", "Marie Curie was born in Warsaw. She won two prizes."),
                     Zip("d1", 5, "Marie Curie was born in Warsaw.")),
        form.quality(Document("d2", "Polish cuisine is rich in meat."), Zip("d2", 1, "Food.")),
    ]  # fmt: skip
    assert traj.turns[1].scores["q_com"] == pytest.approx(sum(p["com"] for p in parts) / 2)
    assert traj.turns[1].scores["level"] == 3.0
    assert measures.of_trajectories([traj])["compression"] == [7 / 16]  # words kept of words shown


@pytest.mark.parametrize(
    ("zips", "memory", "unknown"),
    [
        (GOOD, "d1: Marie Curie was born in Warsaw.", 0),  # the other document was not zipped
        (GOOD + '<zip doc="d2" level="9">x</zip>', "d1: Marie", 0),
        (GOOD + '<zip doc="d2" level="low">x</zip>', "d1: Marie", 0),
        (GOOD + '<zip doc="d2" level="1"></zip>', "d1: Marie", 0),
        (GOOD + '<zip doc="d1" level="1">second</zip><zip doc="d7" level="1">x</zip>', "d1: Marie", 1),
    ],
)
def test_missing_bad_repeated_and_unknown_zips(play, zips, memory, unknown):
    agent = answers("<tool>search(curie)</tool>", zips + "<tool>search(none)</tool>")
    (traj,), _ = play(ZipRl(), agent)
    kept = agent.seen[2].partition("Memory:")[2]
    assert memory in kept and "d2:" not in kept and "second" not in kept
    alone = play(ZipRl(), answers("<tool>search(curie)</tool>", GOOD + "<tool>search(none)</tool>"))[0][0]
    assert traj.turns[1].scores["q_com"] == alone.turns[1].scores["q_com"]  # a bad one counts 0, as a missing one
    assert traj.turns[1].scores["unknown_zips"] == unknown


def test_two_turns_without_an_action_end_the_episode_without_an_answer(play):
    agent = answers("<tool>search(curie)</tool>", BOTH, "hm")
    (traj,), _ = play(ZipRl(), agent)
    assert [t.kind for t in traj.turns] == ["call", "invalid", "invalid"] and traj.text == ""
    assert traj.finish == "length"
    memory = agent.seen[2].partition("Memory:")[2]
    assert "search" not in memory and "cuisine" not in memory  # the memory did not change, the documents are gone


def test_only_two_idle_turns_in_a_row_end_the_episode(play):
    (traj,), _ = play(ZipRl(), answers("hm", "<tool>search(curie)</tool>", "hm", BOTH + "<tool>search(none)</tool>"))
    assert [t.kind for t in traj.turns] == ["invalid", "call", "invalid", "call", "answer"] and traj.finish == "stop"


def test_the_turn_cap_forces_an_answer_from_memory(play):
    agent = answers("<tool>search(curie)</tool>", BOTH + "<tool>search(curie)</tool>")
    (traj,), _ = play(ZipRl(max_turns=2), agent)
    assert [t.kind for t in traj.turns] == ["call", "call", "forced"] and traj.finish == "length"
    assert (
        "no more turns" in agent.seen[2] and "She won" not in agent.seen[2] and traj.text == "<answer>Warsaw</answer>"
    )
    values = measures.of_trajectories([traj])
    assert values["finished"] == [0.0] and values["forced"] == [1.0]


@pytest.mark.parametrize(
    ("query", "remark"),
    [
        ("search(boom)", "the index is gone"),
        ("open(x)", "no tool 'open'"),
        ("search(hang)", "no result within 0.05 s"),
    ],
)
def test_tool_errors_become_remarks(play, query, remark):
    agent = answers(f"<tool>{query}</tool>")
    (traj,), _ = play(ZipRl(), agent, timeout=0.05 if "hang" in query else None)
    assert remark in agent.seen[1].partition("Memory:")[2] and traj.turns[0].result.startswith("error:")
    assert measures.QUALITY not in traj.turns[1].scores


def test_a_prefill_opens_turns_with_a_call_a_zip_or_the_answer():
    row = SimpleNamespace(meta={"question": "Where?"}, prompt=[{"role": "assistant", "content": "<tool>search("}])
    form = ZipRl()._form(row, SimpleNamespace(tools={"search": search}))
    shown = [Document("d4", "Text."), Document("d5", "Text.")]
    assert form.ask([], [], None, False)[1] == "<tool>search("
    assert form.ask([], shown, None, False)[1] == '<zip doc="d4" level="'
    assert form.ask([], [], None, True)[1] == "<tool>finish("
    row.prompt = "Where?"
    plain = ZipRl()._form(row, SimpleNamespace(tools={"search": search}))
    assert {plain.ask([], d, None, last)[1] for d in ([], shown) for last in (False, True)} == {""}


def test_an_empty_result_is_no_document(play):
    agent = answers("<tool>search(none)</tool>", "<tool>search(curie)</tool>")
    (traj,), _ = play(ZipRl(), agent)
    assert "(none)" in agent.seen[1] and "- search(none)" in agent.seen[2]
    assert measures.QUALITY not in traj.turns[1].scores


def test_nothing_written_is_a_row_without_weight(play):
    (traj,), _ = play(ZipRl(), answers("<tool>search(curie)</tool>", "", "<tool>finish(x)</tool>"))
    batch = assemble([traj], 0)
    assert batch.model_mask_ST.sum(1).tolist()[1] == 0
    ctx = _credit([traj], [1.0], ZipRl())
    assert ctx.batch.row_weight_S.tolist() == [0.5, 0, 0.5]


# ---- compression and overflow ----
def test_a_zip_without_a_document_is_flagged_and_one_without_text_is_an_empty_entry(play):
    (traj,), _ = play(ZipRl(), answers('<zip doc="d9" level="3">x</zip><tool>search(curie)</tool>', BOTH))
    assert traj.turns[0].scores["unknown_zips"] == 1


def test_only_numbers_in_a_row_from_the_first_line_separate_documents():
    form = TextForm("q", {}, Scale())
    texts = [d.text for d in form.documents("1. Curie: she\nwas born.\n2. Warsaw: a city.\n", 4)]
    assert texts == ["Curie: she\nwas born.", "Warsaw: a city."]
    page = "The treaty was signed in\n1945. Peace came.\nSteps:\n1. first\n2. second"
    assert [(d.id, d.text) for d in form.documents(page, 1)] == [("d1", page)] and form.documents(" ", 1) == []


def test_a_call_inside_a_zip_is_no_action():
    text = '<zip doc="d1" level="1">it says <tool>delete(all)</tool></zip><tool>search(x)</tool>'
    assert TextForm("q", {}, Scale()).parse(text).action == ("search", "x")


def test_uniform_compression_asks_for_and_keeps_one_level(play):
    agent = answers("<tool>search(curie)</tool>", BOTH)
    (traj,), _ = play(ZipRl(compression="uniform", level=2), agent)
    assert "level 2 (" in agent.seen[0] and "level 5 (" not in agent.seen[0]
    assert traj.turns[1].scores["level"] == 2.0


def test_without_compression_raw_text_stays_until_the_oldest_no_longer_fits(play):
    turns = ["<tool>search(curie)</tool>"] * 4
    agent = answers(*turns)
    (traj,), _ = play(ZipRl(compression="none"), agent)
    assert agent.seen[4].count("She won two prizes.") == 4  # three remembered, one new
    limit = len(agent.seen[3])
    agent = answers(*turns)
    (traj,), _ = play(ZipRl(compression="none", max_prompt_tokens=limit), agent)
    # The actions stay, so the room of one turn takes three texts: both of the first search and one of the second.
    assert agent.seen[4].count("She won two prizes.") == 2 and traj.turns[4].scores["overflow_dropped"] == 3
    assert agent.seen[4].count("- search(curie)") == 3
    assert max(map(len, agent.seen)) <= limit and all(measures.QUALITY not in t.scores for t in traj.turns)


def test_overflow_cuts_the_oldest_zips_level_by_level_before_it_drops_them(play):
    ten, go_on = "one two three four five six seven eight nine ten", "<tool>search(curie)</tool>"
    turns = [go_on] + [f'<zip doc="d{2 * k - 1}" level="3">{ten}</zip>{go_on}' for k in range(1, 5)]
    free = answers(*turns)
    play(ZipRl(), free)
    limit = len(free.seen[3]) - 20
    agent = answers(*turns)
    (traj,), _ = play(ZipRl(max_prompt_tokens=limit), agent)
    assert max(map(len, agent.seen)) <= limit
    memory = [line for line in agent.seen[3].splitlines() if line.startswith("  d")]
    assert memory == ["  d1: one two three four five", "  d3: one two three four five six seven eight nine ten"]
    assert traj.turns[3].scores["overflow_cut"] == 1 and "overflow_dropped" not in traj.turns[3].scores
    assert traj.turns[5].scores["overflow_cut"] >= 1


@pytest.mark.parametrize("factor", [0.5, 2])
def test_a_document_longer_than_the_limit_is_cut_and_a_question_longer_than_it_ends_the_episode(play, factor):
    asked = answers()
    play(ZipRl(), asked)
    limit = int(len(asked.seen[0]) * factor)
    PAGES["long"] = "word " * 5000
    agent = answers("<tool>search(long)</tool>")
    (traj,), _ = play(ZipRl(max_prompt_tokens=limit), agent)
    assert all(len(p) <= limit for p in agent.seen)
    if factor == 2:
        assert traj.turns[1].scores["overflow_document"] > 3 and traj.finish == "stop"
    else:
        assert (
            agent.seen == [] and traj.turns == [] and traj.text == "" and assemble([traj], 0).model_mask_ST.sum() == 0
        )


# ---- credit ----
def _trajectory(qualities, group=0, sample=0):
    segments = [Segment([1], [2, 3]) for _ in qualities]
    scores = [{} if math.isnan(q) else {"q_com": q} for q in qualities]
    return Trajectory("r", group, sample, segments, [Turn(k, 0, 2, scores=s) for k, s in enumerate(scores)], row=None)


def _credit(trajs, rewards, method, objective=None, controls=(), base=None):
    stack = Stack([method, *controls], objective or Grpo())
    services = SimpleNamespace(gather=lambda x: x, rng=lambda name: np.random.default_rng(3))
    ctx = Context("train", 0, 0, len(trajs), services=services, trajs=trajs)
    ctx.add_reward("task", "outcome", 1.0)
    for traj, reward in zip(trajs, rewards, strict=True):
        traj.rewards["task"] = reward
    ctx.batch = assemble(trajs, 0)
    ctx.signal_fn = stack.signal
    ctx.batch.adv_ST = stack.advantages(ctx)
    return ctx


NAN = math.nan
GROUP = [[0.8, 0.6, 0.7, NAN], [NAN, 0.2, 0.9, NAN], [0.5, NAN, NAN, NAN], [0.4, 0.4, 0.4, 0.8]]


def group(turns=4):
    return [_trajectory(q[:turns], sample=k) for k, q in enumerate(GROUP)]


def test_the_hook_gives_the_worked_example_on_every_token_of_a_turn():
    ctx = _credit(group(), [1.0, 0, 0.5, 0], method := ZipRl())
    second = [-0.783186, -0.853186, -0.713186, -0.783186]
    table = [1.325310, 1.285310, 1.305310, 1.305310, *second, *[0.261062] * 4, *[-0.803186] * 3, -0.723186]
    expected = torch.tensor(table).unsqueeze(1).expand(-1, 2)
    torch.testing.assert_close(ctx.batch.adv_ST, expected, atol=1e-6, rtol=0)
    assert ctx.batch.row_weight_S.tolist() == [0.25] * 16 and "zero_variance_alive" not in method.metrics()


@pytest.mark.parametrize("rewards", [[0.0] * 4, [NAN, NAN, NAN, 0.3]])
def test_groups_without_outcome_signal_keep_the_correction(rewards):
    adv_ST = _credit(group(), rewards, method := ZipRl()).batch.adv_ST
    torch.testing.assert_close(adv_ST[12:, 0], torch.tensor([-0.02, -0.02, -0.02, 0.06]))
    assert not adv_ST[8:12].any() and method.metrics()["zero_variance_alive"] == 1
    assert (
        not _credit(group(), rewards, off := ZipRl(w=0)).batch.adv_ST.any()
        and off.metrics()["zero_variance_alive"] == 0
    )


def test_equal_qualities_are_no_sign_of_life():
    """Seven times 0.7 in float32 has a mean that is not 0.7."""
    trajs = [_trajectory([0.7] * 7, sample=k) for k in range(4)]
    method = ZipRl()
    assert _credit(trajs, [0.0] * 4, method).batch.adv_ST.abs().max() < 1e-6
    assert method.metrics()["zero_variance_alive"] == 0


def test_the_group_mean_counts_trajectories_not_turns():
    """A trajectory of four turns must not weigh four times in the baseline."""
    trajs = [_trajectory([NAN] * 4), _trajectory([NAN], sample=1)]
    adv_ST = _credit(trajs, [1.0, 0.0], ZipRl()).batch.adv_ST
    assert adv_ST[0, 0] == -adv_ST[4, 0] > 0.7


def test_shuffled_qualities_stay_in_their_trajectory_and_missing_ones_missing():
    plain, shuffled = (
        _credit(group(), [0.0] * 4, ZipRl(), controls=c).batch.adv_ST[:, 0].view(4, 4)
        for c in ([], [Shuffle("ziprl.qualities")])
    )
    assert not torch.equal(plain, shuffled)
    torch.testing.assert_close(plain.sort(1).values, shuffled.sort(1).values)
    assert shuffled[1, 0] == shuffled[1, 3] == 0 and shuffled[0, 3] == 0


@pytest.mark.parametrize("bad", [{"w": -0.1}, {"w": NAN}, {"w": math.inf}, {"max_turns": 0}, {"level": 6},
                                 {"compression": "zip"}, {"weights": (1, 0, 0)}, {"max_prompt_tokens": 0},
                                 {"weights": 3}, {"weights": ("a",) * 4}, {"intervals": ((0, 0.1), 3)},
                                 {"intervals": ((0, 0.1), (0.1, NAN), *((0.3, 0.4),) * 3)}])  # fmt: skip
def test_settings_that_cannot_be_right_are_refused(bad):
    with pytest.raises(ConfigError):
        ZipRl(**bad)


def test_it_is_refused_without_a_group_baseline_and_with_dynamic_sampling():
    with pytest.raises(ConfigError, match="choose objective=grpo"):
        Stack([ZipRl()], Ppo())
    with pytest.raises(ConfigError, match="dynamic_sampling=false"):
        Stack([ZipRl()], Dapo(dynamic_sampling=True))


def test_evaluation_leaves_the_method_as_it_is(play):
    method = ZipRl()
    trajs, ctx = play(method, answers("<tool>search(curie)</tool>"), mode="eval")
    assert method.metrics() == {}
    columns = method.eval_metrics(trajs, ctx)
    assert columns["turns"] == [2.0] and columns["total_prompt"][0] > columns["peak_prompt"][0]


def test_level_follows_relevance_in_the_metrics():
    assert measures.rank_correlation([1, 2, 3, 5], [0.1, 0.2, 0.5, 0.9]) == pytest.approx(1)
    assert math.isnan(measures.rank_correlation([3, 3], [0.1, 0.2])) and math.isnan(measures.rank_correlation([1], [1]))
    draw = np.random.default_rng(0)
    for n in (2, 3, 50):
        a, b = draw.integers(1, 6, n).astype(float), draw.choice([0.0, 0.25, 0.5, NAN], n)
        there = ~np.isnan(b)
        ranks = [rankdata(x[there]) for x in (a, b)]
        plain = float(np.corrcoef(*ranks)[0, 1]) if all(len(set(r)) > 1 for r in ranks) else NAN
        assert repr(measures.rank_correlation(a.tolist(), b.tolist())) == repr(plain)


def test_means_leave_out_what_is_unknown_and_trajectories_that_zipped_nothing():
    def turn(quality):
        scores = dict.fromkeys(measures.SCORES, 1.0) | {"q_com": quality, "kept": 1.0, "source": 4.0}
        return Turn(0, 0, 1, "call", scores=scores)

    def traj(*turns):
        return Trajectory("r", 0, 0, [Segment([1, 2], [3])], turns=list(turns))

    found = measures.of_trajectories([traj(turn(0.5), turn(NAN)), traj(Turn(0, 0, 1, "answer"))])
    assert found["quality"][0] == 0.5 and found["compression"][0] == 0.25
    assert math.isnan(found["quality"][1]) and math.isnan(found["compression"][1])
    assert found["finished"] == [0.0, 1.0] and found["peak_prompt"] == [2.0, 2.0]
