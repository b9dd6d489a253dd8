"""The cached decoder against full forwards, tool calls as text, and the loop over episodes."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import lean
from experiments.decoder import CachedDecoder, supports
from experiments.engines.sampling import pick, uniforms
from experiments.engines.transformers import TransformersEngine
from experiments.rollout import EngineWriter, ToolLoop, episodes, writer_for
from experiments.tasks.search_world import SearchWorld
from experiments.tools import HERMES, SEARCH, ResultIds, ToolRunner, Tools, ToolText
from methods.base import assemble
from methods.errors import ConfigError


@pytest.fixture(scope="module")
def world():
    return SearchWorld(train_rows=60, eval_rows=24)


@pytest.fixture(scope="module")
def searcher(world):
    """An untrained model over the world's symbols, random enough to call tools now and then."""
    from experiments.models import Tiny

    return Tiny(warm_start=None, init_std=0.3).load(world, 0)


def prompts_of(searcher, world, count=8):
    return [searcher.tokenizer(row.prompt)["input_ids"] for row in world.rows("eval", 0)[:count]]


def alone(searcher, seed, temperature=1.0):
    """Turns of one row by full forwards over its whole history: what the decoder must equal."""
    uniform_1T, drawn = uniforms([seed], 200), 0

    def write(history, budget, ends, stop_id=None):
        nonlocal drawn
        out = []
        while len(out) < budget:
            with torch.no_grad():
                scores = searcher.model(input_ids=torch.tensor([history + out])).logits[:, -1]
            out.append(int(pick(scores, uniform_1T[:, drawn : drawn + 1], temperature)))
            drawn += 1
            if out[-1] in ends or out[-1] == stop_id:
                break
        return out

    return write


# ---------------------------------------------------------------- the decoder


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_turns_equal_full_forwards_whoever_the_neighbours_are(searcher, world, temperature):
    """Prompts of several lengths, shared and not; different budgets; rows that leave; appended text of any length."""
    prompts = [p for p in prompts_of(searcher, world, 5) for _ in range(2)]
    prompts = [p * (1 + i % 3) for i, p in enumerate(prompts)]
    rows = range(len(prompts))
    decoder = CachedDecoder(searcher.model, searcher.tokenizer, list(rows), 60, temperature=temperature)
    ends = {searcher.tokenizer.eos_token_id}
    reference = {i: alone(searcher, i, temperature) for i in rows}
    history = {i: list(p) for i, p in enumerate(prompts)}
    appended, budget = dict(history), {i: 1 + 2 * i for i in rows}
    for turn in range(3):
        written = decoder.write(appended, budget)
        assert list(written) and set(written) == set(appended)
        for i, ids in written.items():
            assert ids == reference[i](history[i], budget[i], ends), f"row {i}, turn {turn}"
            history[i] = history[i] + ids
        appended = {i: [4, 5, 6, 7, 8][: 1 + i % 5] for i in written if i % (turn + 2)}
        budget = {i: 9 - i % 4 for i in appended}
        history = {i: history[i] + appended[i] for i in appended}


def small_models():
    """A Qwen3 and a Llama, both with queries that share keys and with norms that are not all one."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    size = {"vocab_size": 30, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    for config, kind in ((Qwen3Config, Qwen3ForCausalLM), (LlamaConfig, LlamaForCausalLM)):
        torch.manual_seed(0)
        model = kind(config(**size, tie_word_embeddings=False)).eval()
        for name, weight in model.named_parameters():
            torch.nn.init.normal_(weight, float("norm" in name), 0.3)
        yield model


def test_the_lean_forward_is_the_models_own():
    """Rows of several lengths, padded on the left, then single tokens, against a forward over each row alone."""
    tokenizer = Vocabulary([])
    texts = [[3, 4, 5, 6, 7], [8], [9, 10, 11]]
    for model in small_models():
        assert lean.fits(model)
        decoder = CachedDecoder(model, tokenizer, [0, 1, 2], 8, temperature=0.0)
        assert decoder.lean is not None
        with torch.no_grad():
            for more in ([], [12], [13]):
                scores_NV = decoder._read([more or t for t in texts]) if more else decoder._read_prompts(texts)
                texts = [t + more for t in texts]
                for row, text in enumerate(texts):
                    own_V = model(input_ids=torch.tensor([text])).logits[0, -1]
                    assert torch.allclose(scores_NV[row].log_softmax(-1), own_V.log_softmax(-1), atol=1e-5)


def test_models_that_the_lean_forward_would_get_wrong_go_their_own_way():
    from transformers import LlamaConfig, LlamaForCausalLM

    model, _ = small_models()
    assert not lean.fits(model.to(torch.bfloat16))
    size = {"vocab_size": 30, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    size |= {"num_attention_heads": 4}
    for odd in ({"attention_bias": True}, {"hidden_act": "gelu"}, {"mlp_bias": True}):
        assert not lean.fits(LlamaForCausalLM(LlamaConfig(**size, **odd))), odd
    adapted = LlamaForCausalLM(LlamaConfig(**size))
    assert lean.fits(adapted)
    adapted.model.layers[0].self_attn.v_proj = torch.nn.Sequential(adapted.model.layers[0].self_attn.v_proj)
    assert not lean.fits(adapted)


@pytest.mark.parametrize("cut", range(9))
def test_stop_texts_over_any_cut_of_tokens(cut):
    """`</search>` written in two tokens, or in one with something around it; other tokens never end a turn."""
    from experiments.decoder import _stopping_tokens

    stop = "</search>"
    parts = [stop[:cut], stop[cut:] + "\n"] if cut else [f"a{stop}b"]
    tokenizer = Vocabulary([*parts, "<search>", "search", "a>", "\ufffd", " "])
    whole_V, may_V = _stopping_tokens(tokenizer, (stop,), len(tokenizer))
    assert whole_V.tolist() == [not cut] + [False] * (len(tokenizer) - 1)
    assert [tokenizer.texts[i] for i in may_V.nonzero().flatten()] == [*parts[1:], "\ufffd"]


class Vocabulary:
    """Tokens with given texts."""

    eos_token_id = 1

    def __init__(self, texts):
        self.texts = texts

    def __len__(self):
        return len(self.texts)

    def batch_decode(self, rows):
        return ["".join(self.texts[i] for i in row) for row in rows]


def test_nothing_is_computed_twice(searcher, world):
    prompt = prompts_of(searcher, world, 1)[0]
    decoder = CachedDecoder(searcher.model, searcher.tokenizer, [0, 1, 2, 3], 20)
    decoder.ends_V[:] = False
    decoder.write({i: prompt for i in range(4)}, {i: 5 for i in range(4)})
    # One shared prompt, and all but the last of five tokens in four rows.
    assert decoder.computed_tokens == len(prompt) + 4 * 4
    decoder.write({2: [4, 5]}, {2: 3})
    assert decoder.computed_tokens == len(prompt) + 16 + (1 + 2) + 2


def test_stop_text_ends_a_turn(searcher, world):
    prompts, rows = prompts_of(searcher, world, 8), dict.fromkeys(range(8), 60)
    free = CachedDecoder(searcher.model, searcher.tokenizer, list(range(8)), 60).write(dict(enumerate(prompts)), rows)
    # What this untrained model writes is up to its weights: the stop text is a word that it does write.
    words = {i: searcher.tokenizer.decode([i]) for i in sorted({i for ids in free.values() for i in ids[:-1]})}
    close, text = next((i, w) for i, w in words.items() if sum(w in s for s in world.symbols) == 1)
    decoder = CachedDecoder(searcher.model, searcher.tokenizer, list(range(8)), 60, stop=(text,))
    written = decoder.write(dict(enumerate(prompts)), rows)
    ends = {searcher.tokenizer.eos_token_id}
    for i, ids in written.items():
        assert ids == alone(searcher, i)(prompts[i], 60, ends, close)
    assert any(ids[-1] == close for ids in written.values())


def test_the_model_and_random_state_are_left_as_they_were(searcher, world):
    searcher.model.train()
    state = torch.random.get_rng_state()
    CachedDecoder(searcher.model, searcher.tokenizer, [0], 5).write({0: [4, 5]}, {0: 5})
    assert torch.equal(state, torch.random.get_rng_state()) and searcher.model.training
    searcher.model.eval()


def test_what_the_cache_cannot_serve_goes_through_the_engine(searcher):
    engine = TransformersEngine(searcher.model, searcher.tokenizer)
    assert isinstance(writer_for(engine, searcher.tokenizer, [0], 5), CachedDecoder)
    sliding = SimpleNamespace(
        config=SimpleNamespace(
            get_text_config=lambda: SimpleNamespace(layer_types=["sliding_attention"], _attn_implementation="sdpa")
        ),
        generate=None,
    )
    assert not supports(sliding)
    other = SimpleNamespace(generate=lambda requests: [])
    assert isinstance(writer_for(other, searcher.tokenizer, [0], 5), EngineWriter)


# ---------------------------------------------------------------- calls as text


def test_calls_are_read_and_attempts_kept():
    text = (
        'so <tool_call>\n{"name": "search", "arguments": {"query": "a"}}\n</tool_call><tool_call>{"name": </tool_call>'
    )
    assert HERMES.parse(text) == [{"tool": "search", "args": {"query": "a"}}, None]
    assert HERMES.parse("no call") == []
    assert HERMES.parse('<tool_call>{"name": "x", "arguments": [1]}</tool_call>') == [None]
    assert HERMES.parse('<tool_call>{"name": "x"}</tool_call>') == [{"tool": "x", "args": {}}]
    assert SEARCH.parse("<search>who</search>") == [{"tool": "search", "args": {"query": "who"}}]
    assert SEARCH.parse("<search>who") == [None]


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=60))
def test_any_text_can_be_parsed(text):
    for form in (HERMES, SEARCH):
        calls = form.parse(form.opening + text)
        assert calls and all(c is None or set(c) == {"tool", "args"} for c in calls)


def test_nested_arguments():
    call = {"name": "f", "arguments": {"a": {"b": [1, {"c": 2}]}}}
    assert HERMES.parse(f"<tool_call>{json.dumps(call)}</tool_call>") == [{"tool": "f", "args": call["arguments"]}]


def test_results_stand_where_the_template_puts_them():
    from experiments.tokenizers import tiny_tokenizer

    tokenizer = tiny_tokenizer(chat=True)
    (ids,) = ResultIds(tokenizer, HERMES)(["42"], 10)
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    whole = tokenizer.apply_chat_template(
        [*messages, {"role": "tool", "content": "42"}], tokenize=False, add_generation_prompt=True
    )
    before = tokenizer.apply_chat_template(messages, tokenize=False)
    assert before + tokenizer.decode(ids) == whole
    assert [len(shown) for shown in ResultIds(tokenizer, HERMES)(["4" * 100, ""], 10)] == [len(ids) + 8, len(ids) - 2]


def test_a_template_without_tools_is_refused():
    from experiments.tokenizers import tiny_tokenizer

    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = "{% for m in messages %}{% if m.role != 'tool' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(ConfigError, match="leaves a tool's message out"):
        ResultIds(tokenizer, HERMES)
    tokenizer.chat_template = "{{ raise_exception('no tools here') }}"
    with pytest.raises(ConfigError, match="cannot show"):
        ResultIds(tokenizer, HERMES)


def test_whatever_a_tool_does_the_run_lives():
    def slow(**_):
        time.sleep(30)

    def boom(**_):
        raise RuntimeError("boom")

    env = SimpleNamespace(
        tools={"ok": lambda x: x, "boom": boom, "slow": slow, "big": lambda: "y" * 10**6, "odd": lambda: 3}
    )
    calls = [
        {"tool": "ok", "args": {"x": "fine"}},
        None,
        {"tool": "none", "args": {}},
        {"tool": "boom", "args": {}},
        {"tool": "ok", "args": {"y": 1}},
        {"tool": "odd", "args": {}},
        {"tool": "big", "args": {}},
        {"tool": "slow", "args": {}},
    ]
    runner = ToolRunner(timeout=0.3, most_characters=1000)
    results = runner([(env, call) for call in calls])
    assert results[0] == "fine" and results[1] == "error: the call could not be read"
    assert "there is no tool 'none'" in results[2] and results[3] == "error: boom"
    assert results[4].startswith("error:") and "int" in results[5] and len(results[6]) == 1000
    assert results[7] == "error: no result within 0.3 s"
    assert runner.counts == {"calls": 8, "unparsable": 1, "errors": 4, "timeouts": 1}
    assert ToolRunner()([(env, call) for call in calls[:7]]) != [] and runner([(env, calls[0])]) == ["fine"]


# ---------------------------------------------------------------- the loop


def run_world(searcher, world, count=24, **keys):
    engine = TransformersEngine(searcher.model, searcher.tokenizer)
    rows = (world.rows("eval", 0) * 4)[:count]
    prompts = [searcher.tokenizer(row.prompt)["input_ids"] for row in rows]
    how = {"temperature": 1.0, "top_p": 1.0} | keys
    most = keys.pop("most", world.max_completion_tokens)
    how.pop("most", None)
    done = episodes(world, rows, prompts, engine, searcher.tokenizer, list(range(count)), most, **how)
    return rows, prompts, done


def test_masked_tokens_are_exactly_the_tool_text(searcher, world):
    rows, prompts, done = run_world(searcher, world, 64)
    assert any(len(e.turns) > 1 for e in done)
    for row, prompt, episode in zip(rows, prompts, done, strict=True):
        tool = [i for i, m in zip(episode.ids, episode.mask, strict=True) if not m]
        shown = "".join(f"<r>{t.result}</r>" for t in episode.turns if t.result is not None)
        # An error text holds symbols that the tiny vocabulary lacks; what was cut or unknown is compared as ids.
        expected = []
        for t in episode.turns:
            if t.result is not None:
                expected += ResultIds(searcher.tokenizer, world.tools.form)([t.result], world.tools.max_result_tokens)[
                    0
                ]
        assert tool == expected[: len(tool)]
        if "error" not in shown:
            assert searcher.tokenizer.decode(tool) == shown[: len(searcher.tokenizer.decode(tool))]
        traj = episode.trajectory(row, prompt, 0, 0)
        written = [i for t in traj.turns for i in episode.ids[t.start : t.end]]
        assert written == [i for i, m in zip(episode.ids, episode.mask, strict=True) if m]
        assert traj.length == len(written) <= len(episode.ids) <= world.max_completion_tokens
    batch = assemble([e.trajectory(r, p, 0, 0) for r, p, e in zip(rows, prompts, done, strict=True)], 0)
    assert bool(((batch.turn_ST >= 0) == batch.model_mask_ST.bool()).all())


def test_the_cache_and_an_engine_give_the_same_greedy_episodes(searcher, world):
    _, prompts, cached = run_world(searcher, world, 24, temperature=0.0)
    engine = TransformersEngine(searcher.model, searcher.tokenizer)
    form = world.tools.form
    writer = EngineWriter(engine, list(range(24)), temperature=0.0, stop=form.stop)
    loop = ToolLoop(
        searcher.tokenizer, world.tools, world.max_completion_tokens, engine.ends(), ToolRunner(), engine.context()
    )
    envs = [world.environment(row) for row in (world.rows("eval", 0) * 4)[:24]]
    plain = loop.run(writer, prompts, envs)
    assert [e.ids for e in plain] == [e.ids for e in cached]
    assert [[t.calls for t in e.turns] for e in plain] == [[t.calls for t in e.turns] for e in cached]


class Scripted:
    """Writes given turns; remembers what it was told."""

    def __init__(self, tokenizer, turns, eos=True):
        self.tokenizer, self.turns, self.eos, self.told = tokenizer, {i: iter(t) for i, t in enumerate(turns)}, eos, []

    def write(self, appended, budget):
        self.told.append({i: self.tokenizer.decode(ids) for i, ids in appended.items()})
        out = {}
        for i in appended:
            text = next(self.turns[i])
            ids = self.tokenizer(text)["input_ids"]
            out[i] = (ids if text.endswith("</s>") else [*ids, self.tokenizer.eos_token_id])[: budget[i]]
        return out


def scripted(searcher, turns, most=60, **tools):
    row = SimpleNamespace(meta={"records": {f"e{i}": f"e{i + 1}t0" for i in range(39)}, "noise": 0}, answer="e2")
    world = SearchWorld()
    keys = {"max_calls": 3, "max_result_tokens": 4} | tools
    loop = ToolLoop(searcher.tokenizer, Tools(world.tools.form, **keys), most, {1}, ToolRunner())
    writer = Scripted(searcher.tokenizer, turns)
    envs = [world.environment(row) for _ in turns]
    return loop.run(writer, [[5]] * len(turns), envs), writer


def test_episodes_end_as_documented(searcher):
    call = "<s>e1</s>"
    done, writer = scripted(searcher, [["=e2"], [call, "=e2"], [call, call, call, call], ["<s>e1", "=e1"]])
    assert [e.finish for e in done] == ["stop", "stop", "length", "stop"]
    assert [len(e.turns) for e in done] == [1, 2, 4, 2]
    assert [t.kind for t in done[2].turns] == ["call"] * 4
    assert [t.result for t in done[2].turns] == ["e2t0"] * 3 + [None]
    assert done[3].turns[0].calls == [None] and done[3].turns[0].result == "error: the call could not be read"
    assert writer.told[1][1] == "<r>e2t0</r>" and 0 not in writer.told[1]


def test_a_turn_that_is_neither_call_nor_answer_is_told_so(searcher):
    done, writer = scripted(searcher, [["e1", "=e2"]], answer="=", notice="error")
    assert [t.kind for t in done[0].turns] == ["invalid", "answer"] and writer.told[1][0] == "<r>error</r>"
    assert done[0].finish == "stop"


def test_budgets(searcher):
    call = "<s>e1</s>"
    # Three ids of the call and four of the result leave no room for a further turn.
    done, _ = scripted(searcher, [[call, "=e2"]], most=7)
    assert done[0].finish == "length" and len(done[0].ids) == 3 and done[0].turns[0].result == "e2t0"
    done, _ = scripted(searcher, [["=e2=e2=e2"]], max_turn_tokens=2)
    assert done[0].finish == "length" and len(done[0].ids) == 2


def test_a_prompt_that_fills_the_context_ends_the_episode(searcher, world):
    loop = ToolLoop(searcher.tokenizer, world.tools, 20, {1}, ToolRunner(), context=4)
    writer = Scripted(searcher.tokenizer, [["=e2"], ["=e2"]])
    done = loop.run(writer, [[5] * 4, [5, 5]], [SimpleNamespace(tools={})] * 2)
    assert done[0].ids == [1] and done[0].mask == [0] and done[0].finish == "length"
    assert len(done[1].ids) == 2 and done[1].finish == "length"  # two ids of room


# ---------------------------------------------------------------- the world


def test_the_world_is_as_deep_as_it_says():
    task = SearchWorld(train_rows=200, eval_rows=40)
    for row in task.rows("train", 3):
        here = row.meta["start"]
        for depth in range(1, row.meta["hops"] + 1):
            record = row.meta["records"][here]
            here, kind = record.split("t")[0], "t" + record.split("t")[1]
            assert (kind == row.meta["target"]) == (depth == row.meta["hops"])
        assert here == row.answer and task.score(f"={row.answer}", row) == 1.0 and task.score("=e", row) == 0.0
    assert [r.id for r in task.rows("eval", 1)] == [r.id for r in task.rows("eval", 1)]


def test_a_tier_may_be_held_out_of_training_but_not_of_the_demonstrations():
    task = SearchWorld(train_rows=80, eval_rows=40, targets=1)
    assert {r.tier for r in task.rows("train", 0)} == {"1", "2", "3"}
    assert {r.tier for r in task.warm_rows(0)} == {"1", "2", "3", "4"} == {r.tier for r in task.rows("eval", 0)}
    assert {r.meta["target"] for r in task.rows("eval", 0)} == {"t0"}


def test_noise_memory_and_distractors():
    from collections import Counter

    task = SearchWorld(train_rows=600, eval_rows=40, memory=0.6, tool_noise=1.0, distractors=2, demo_memory=1.0)
    rows = task.rows("train", 0)
    right = Counter(row.prompt.split("m")[1].rstrip("?") == row.answer for row in rows)
    assert 0.5 < right[True] / 600 < 0.7
    assert all(len(row.meta["segments"]) == 1 for row in rows)
    row = rows[0]
    shown = [task.environment(row).search(row.meta["start"]) for _ in range(2)]
    assert shown[0] == shown[1] and shown[0].count(",") == 2  # each episode meets the same noise
    differs = [
        task.environment(r).search(r.meta["start"]).split(",")[0] != r.meta["records"][r.meta["start"]] for r in rows
    ]
    assert sum(differs) > 500


def test_bad_settings_of_the_world():
    for keys in ({"memory": 2.0}, {"targets": 9}, {"hops": {"a": 0}, "mixture": {"a": 1}}, {"mixture": {"1": 1}}):
        with pytest.raises(ConfigError):
            SearchWorld(**keys)


def test_a_regular_expression_may_name_several_arguments():
    form = ToolText(call=r"<c>(?P<a>\w+),(?P<b>\w+)</c>", opening="<c>", tool="f")
    assert form.parse("<c>x,y</c>") == [{"tool": "f", "args": {"a": "x", "b": "y"}}]


def test_evaluation_runs_episodes_through_the_request_cache(searcher, world, tmp_path):
    from experiments import hooked
    from experiments.engines.cache import CachedEngine
    from experiments.services import Services
    from methods.base import Context
    from methods.objectives.base import Objective
    from methods.stack import Stack

    rows = world.rows("eval", 0)[:4]
    how = hooked.Sampling(2, 1.0, 1.0, world.max_completion_tokens, 5)
    runs = []
    for cached in (False, True):
        engine = TransformersEngine(searcher.model, searcher.tokenizer)
        engine = CachedEngine(engine, tmp_path) if cached else engine
        services = Services(engine, world, 0, SimpleNamespace(), searcher.tokenizer)
        ctx = Context("eval", 0, 0, 2, services=services)
        trajs, columns = hooked.rollouts(Stack([], Objective(), check=False), ctx, engine, rows, how)
        runs.append(([t.segments[0].completion_ids for t in trajs], columns))
    assert runs[0] == runs[1] and set(runs[0][1]) == {"searches", "excess", "seen", "waste"}
