"""Whole runs with tools: what is masked out is the tools' text, and whatever a tool does, the run lives."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest

from experiments import run as runs
from experiments.tasks.search_world import SearchWorld, World
from experiments.tools import HERMES, SEARCH, Tools
from experiments.trainer import AssayTrainer
from methods.errors import ConfigError


@pytest.fixture(scope="module")
def train(conf, tmp_path_factory):
    """train(words...) -> (finished record, [(trajectories, dict that the loss sees)] of every generation)."""
    from hydra import compose, initialize_config_dir

    words = ["task=search_world", "task.train_rows=600", "task.eval_rows=16", "model.warm_start.steps=80"]
    words += [
        "trainer.max_steps=3",
        "trainer.save_every=0",
        "trainer.prompts_per_step=8",
        "trainer.rollouts_per_prompt=4",
    ]
    words += ["eval.every=0", "eval.items=4", "eval.samples=1", "eval.kl_probe=0", "scale=cpu"]

    def make(*more: str, **patches):
        seen = []
        inputs = AssayTrainer._to_inputs

        def to_inputs(self, generated, selected):
            out = inputs(self, generated, selected)
            seen.append((generated.trajs, out))
            return out

        with pytest.MonkeyPatch.context() as patch, initialize_config_dir(str(conf), version_base=None):
            patch.setattr(AssayTrainer, "_to_inputs", to_inputs)
            for name, value in patches.items():
                patch.setattr(SearchWorld, name, value)
            path = runs.run(compose("train", [*words, f"results_dir={tmp_path_factory.mktemp('results')}", *more]))
        return json.loads((path / "run.json").read_text()), seen

    return make


@pytest.mark.slow
def test_the_masked_out_tokens_of_every_trajectory_of_a_run_are_the_tools_text(train):
    from experiments.tokenizers import tiny_tokenizer

    record, seen = train("task.tool_noise=0.3", "task.distractors=1", "task.max_calls=3")
    tokenizer = tiny_tokenizer(SearchWorld().symbols)
    counts = Counter()
    for trajs, inputs in seen:
        for row, traj in enumerate(trajs):
            real = inputs["completion_mask"][row].bool()
            ids, mine = inputs["completion_ids"][row][real], inputs["tool_mask"][row][real].bool()
            # The result of a last call may have found no room, or no call was left.
            results = [t.result for t in traj.turns[:-1]]
            # A result is cut to its share; words of an error that the tiny vocabulary lacks come back as <unk>.
            shown = [tokenizer.decode(tokenizer(result)["input_ids"][:7]) for result in results]
            assert tokenizer.decode(ids[~mine]) == "".join(f"<r>{text}</r>" for text in shown)
            counts["whole"] += sum(a == b for a, b in zip(shown, results, strict=True))
            assert not inputs["tool_mask"][row][~real].any()
            written = [token for turn in traj.turns for token in ids[turn.start : turn.end].tolist()]
            assert ids[mine].tolist() == written
            counts["trajectories"] += 1
            counts["results"] += len(results)
            counts["several"] += len(results) > 1
    assert record["status"] == "finished" and counts["trajectories"] == 3 * 8 * 4
    assert counts["whole"] > 50 and counts["several"] > 10


class Hostile(World):
    """By the number of the entity: answers, raises, hangs, returns a megabyte, returns no text."""

    def search(self, entity: str) -> str:
        kind = int(entity[1:]) % 5
        if kind == 1:
            raise RuntimeError("boom")
        if kind == 2:
            time.sleep(2.0)
        return ("e1t1", "", "e1t1", "e1" * 500_000, 7)[kind]  # type: ignore[return-value]


@pytest.mark.slow
def test_a_run_with_tools_that_raise_hang_and_flood_goes_on(train):
    form = SearchWorld.tools
    began = time.monotonic()
    record, seen = train(
        "trainer.max_steps=2",
        environment=lambda self, row: Hostile(self, row),
        tools=property(lambda self: replace(form.fget(self), timeout=0.2)),
    )
    assert record["status"] == "finished" and time.monotonic() - began < 120
    starts, longest = Counter(), 0
    for trajs, _ in seen:
        for traj in trajs:
            longest = max(longest, *(t.end for t in traj.turns))
            for turn in traj.turns:
                if turn.result is not None:
                    starts[turn.result[:14]] += 1
    for expected in ("e1t1", "error: boom", "error: no resul", "e1e1e1", "error: the tool returned int"):
        assert any(s.startswith(expected[:14]) for s in starts), (expected, starts)
    assert longest <= SearchWorld().max_completion_tokens


@pytest.mark.slow
def test_a_context_that_is_too_short_ends_episodes_and_not_the_run(train):
    record, seen = train("model.max_length=14", "trainer.max_steps=2", "model.warm_start.seed=1")
    assert record["status"] == "finished"
    trajs = [t for some, _ in seen for t in some]
    assert all(len(t.segments[0].prompt_ids) + len(t.segments[0].completion_ids) <= 14 for t in trajs)
    cut = [t for t in trajs if t.finish == "length"]
    assert cut and len(cut) + sum(t.finish == "stop" for t in trajs) == len(trajs)
    # A result that no longer fits is recorded and not shown.
    assert any(t.turns[-1].result is not None for t in cut)


# ---------------------------------------------------------------- other engines


class Endpoint(BaseHTTPRequestHandler):
    """A chat endpoint that answers the k-th message of the assistant by the script of the question."""

    script: ClassVar[dict[str, list[str]]] = {}
    asked: ClassVar[list[dict]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        talk = body["messages"]
        written = sum(m["role"] in ("assistant", "tool") for m in talk)
        turn = written // 2 if self.path_of(talk) == "hermes" else talk[-1]["content"].count("<information>")
        text = self.script[talk[0]["content"]][turn]
        status = 400 if text == "refuse" else 200
        for stop in body.get("stop", []):
            text = text.split(stop)[0]
        choice = {"message": {"content": text}, "finish_reason": "length" if text.endswith("...") else "stop"}
        usage = {"prompt_tokens": 9, "completion_tokens": len(text)}
        data = json.dumps({"choices": [choice], "usage": usage} if status == 200 else {"error": "too long"}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def path_of(self, talk: list[dict]) -> str:
        return "search" if len(talk) == 2 and talk[1]["role"] == "assistant" else "hermes"

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint():
    from experiments.engines.openai import OpenAIEngine

    Endpoint.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield OpenAIEngine(f"http://127.0.0.1:{server.server_port}/v1", "m", backoff=0.01, attempts=2)
    server.shutdown()
    server.server_close()


class Lookup:
    """A task with one tool, as far as evaluation needs it."""

    def __init__(self, form, **keys):
        self.tools = Tools(form, max_result_tokens=3, **keys)

    def environment(self, row):
        return SimpleNamespace(tools={"search": lambda query: f"{query} is 123456789"})

    def measure(self, trajs):
        return [{"searches": float(sum(t.result is not None for t in traj.turns))} for traj in trajs]


def evaluated(engine, task, script, max_tokens=500):
    from experiments import hooked
    from experiments.services import Services
    from experiments.tasks.base import Row
    from methods.base import Context
    from methods.objectives.base import Objective
    from methods.stack import Stack

    Endpoint.script = script
    services = Services(engine, task, 0, SimpleNamespace())
    how = hooked.Sampling(1, 1.0, 1.0, max_tokens, 5)
    rows = [Row(question, question, "x") for question in script]
    trajs, columns = hooked.rollouts(Stack([], Objective(), check=False), Context("eval", 0, 0, 1, services=services),
                                     engine, rows, how)  # fmt: skip
    return trajs, columns, [r[0] for r in hooked.as_results(trajs, 1)]


def hermes(query: str) -> str:
    return f'<tool_call>{{"name": "search", "arguments": {{"query": "{query}"}}}}</tool_call>'


def test_an_endpoint_runs_episodes_in_messages(endpoint):
    script = {
        "plain": ["yes"],
        "once": [hermes("Rome"), "Italy"],
        "bad": ["<tool_call>{", "sorry"],
        "cut": ["I think that ..."],
        "lost": [hermes("Oslo"), "refuse"],
        "endless": [hermes("a"), hermes("b"), hermes("c")],
    }
    trajs, columns, results = evaluated(endpoint, Lookup(HERMES, max_calls=2), script)
    assert [t.finish for t in trajs] == ["stop", "stop", "stop", "length", "error", "length"]
    assert [[turn.kind for turn in t.turns] for t in trajs[:3]] == [["answer"], ["call", "answer"], ["call", "answer"]]
    assert trajs[1].turns[0].result == "Rome is 123456789" and trajs[2].turns[0].calls == [None]
    told = next(
        b["messages"] for b in Endpoint.asked if b["messages"][0]["content"] == "once" and len(b["messages"]) > 1
    )
    # A result is cut to twelve characters, four for each of its tokens.
    assert told[1:] == [{"role": "assistant", "content": hermes("Rome")}, {"role": "tool", "content": "Rome is 1234"}]
    assert results[4].finish == "error" and "400" in str(results[4].error) and results[4].text == ""
    assert columns["searches"] == [0.0, 1.0, 1.0, 0.0, 1.0, 2.0]
    assert results[1].usage.completion_tokens == len(hermes("Rome")) + len("Italy")


def test_a_form_without_chat_goes_on_in_the_assistants_message(endpoint):
    script = {"q": ["I look. <search>Rome</search>", " <search>Bern</search>", " so Italy"], "open": ["<search>", "no"]}
    trajs, _, _ = evaluated(endpoint, Lookup(SEARCH), script)
    assert [turn.calls for turn in trajs[0].turns][:2] == [
        [{"tool": "search", "args": {"query": "Rome"}}],
        [{"tool": "search", "args": {"query": "Bern"}}],
    ]
    assert trajs[0].text == " so Italy" and [t.finish for t in trajs] == ["stop", "stop"]
    last = max((b for b in Endpoint.asked if b["messages"][0]["content"] == "q"), key=lambda b: len(str(b["messages"])))
    shown = "\n\n<information>{}</information>\n\n"
    assert [m["content"] for m in last["messages"][1:]] == [
        "I look. <search>Rome</search>" + shown.format("Rome is 1234") + " <search>Bern</search>"
        + shown.format("Bern is 1234")
    ]  # fmt: skip
    assert last["continue_final_message"] and not last["add_generation_prompt"]


def test_the_models_budget_ends_an_episode_at_an_endpoint(endpoint):
    trajs, _, _ = evaluated(
        endpoint, Lookup(HERMES), {"once": [hermes("Rome"), "Italy"]}, max_tokens=len(hermes("Rome"))
    )
    assert trajs[0].finish == "length" and len(trajs[0].turns) == 1 and trajs[0].turns[0].result is None


def test_plain_text_endpoints_take_forms_without_messages_only(endpoint):
    endpoint.endpoint = "completions"
    from experiments.messages import Conversation

    talk = Conversation(SimpleNamespace(tools={}), [{"role": "user", "content": "q:"}], 9)
    tools = Lookup(SEARCH).tools
    talk.add("assistant", "<search>a</search>")
    assert talk.request(True, tools).prompt == "q:<search>a</search>"
    talk.add("tool", "b")
    with pytest.raises(ConfigError, match=r"engine\.endpoint=chat"):
        talk.request(True, tools)


def fake_vllm(model, tokenizer, monkeypatch):
    """vLLM's offline engine over `model`, greedily: ids with the end token and with what spells a stop text, prompts
    that must begin with what the same row was shown before, so that its prefix cache is of use."""
    import torch

    vllm, sampling, errors = (ModuleType(n) for n in ("vllm", "vllm.sampling_params", "vllm.exceptions"))
    shown: list[list[int]] = []

    class LLM:
        def __init__(self, folder, **options):
            assert options["enable_prefix_caching"]
            context = model.config.max_position_embeddings
            self.model_config = SimpleNamespace(
                max_model_len=context, try_get_generation_config=lambda: {"eos_token_id": [tokenizer.eos_token_id]}
            )

        def get_tokenizer(self):
            return tokenizer

        def generate(self, prompts, params, *, use_tqdm):
            return [self.one(p["prompt_token_ids"], s) for p, s in zip(prompts, params, strict=True)]

        def one(self, prompt, params):
            assert params.temperature == 0 and params.n == 1
            shown.append(prompt)
            ids, finish = [], "length"
            while len(ids) < params.max_tokens and finish == "length":
                with torch.no_grad():
                    ids.append(int(model(input_ids=torch.tensor([prompt + ids])).logits[0, -1].argmax()))
                if ids[-1] == tokenizer.eos_token_id or any(s in tokenizer.decode(ids) for s in params.stop or []):
                    finish = "stop"
            text = tokenizer.decode(ids, skip_special_tokens=True)
            for stop in params.stop or []:
                text = text.split(stop)[0]
            out = SimpleNamespace(text=text, token_ids=tuple(ids), logprobs=None, finish_reason=finish)
            return SimpleNamespace(outputs=[out])

    names = {"LLM": LLM, "SamplingParams": SimpleNamespace, "__version__": "0.31.0"}
    vllm.__dict__.update(names)
    sampling.__dict__["StructuredOutputsParams"] = SimpleNamespace
    errors.__dict__["VLLMClientError"] = type("VLLMClientError", (Exception,), {})
    for module in (vllm, sampling, errors):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return shown


def test_vllm_writes_the_same_greedy_episodes_from_growing_prefixes(monkeypatch):
    from experiments.engines.transformers import TransformersEngine
    from experiments.engines.vllm import VllmEngine
    from experiments.models import Tiny
    from experiments.rollout import EngineWriter, episodes, writer_for

    world = SearchWorld(train_rows=60, eval_rows=24)
    loaded = Tiny(warm_start=None, init_std=0.3, max_length=40).load(world, 0)
    shown = fake_vllm(loaded.model, loaded.tokenizer, monkeypatch)
    engine = VllmEngine("folder", chat=False)
    assert isinstance(writer_for(engine, loaded.tokenizer, [0], 9), EngineWriter)
    rows = world.rows("eval", 0)
    prompts = [loaded.tokenizer(row.prompt)["input_ids"] for row in rows]
    how = {"temperature": 0.0, "top_p": 1.0}
    seeds, most = list(range(len(rows))), world.max_completion_tokens
    done = episodes(world, rows, prompts, engine, engine.tokenizer, seeds, most, **how)
    own = TransformersEngine(loaded.model, loaded.tokenizer)
    expected = episodes(world, rows, prompts, own, loaded.tokenizer, seeds, most, **how)
    assert [(e.ids, e.mask, e.finish) for e in done] == [(e.ids, e.mask, e.finish) for e in expected]
    assert sum(len(e.turns) for e in done) == len(shown) > len(rows)
    whole = [p + e.ids for p, e in zip(prompts, done, strict=True)]
    assert all(any(w[: len(prompt)] == prompt for w in whole) for prompt in shown)
