"""The part `rollout` of `experiments.bench`: this loop against TRL's own tool loop, on the same episodes.

Both trainers start from the same weights, meet the same prompts in the same order and act in the same environments,
which TRL reaches through `environment_factory`; they take turns step by step. The learning rate is 0, so that the
weights stay as they are, and the temperature 1e-3: both sides go through all of their sampling code and yet write the
same ids, which is checked for every episode. A second sitting samples at temperature 1, each side from its own stream,
so that the episodes of a group differ as they do in training; there the tokens per second are compared.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments import bench

WORLD_TEMPLATE = (
    "{%- for m in messages %}{%- for call in m.tool_calls or [] %}"
    "{%- if call.function.name == 'search' %}<s>{{ call.function.arguments.query }}</s>"
    "{%- else %}{{ call.function | tojson }}{% endif %}{% endfor %}"
    "{{- '<r>' + m.content + '</r>' if m.role == 'tool' else m.content }}{% endfor %}"
)
CHAT_TEMPLATE = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for call in m.tool_calls or [] %}"
    "{{ '<tool_call>\n' + call.function | tojson + '\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def response_template(
    start: str | list[str], opening: str, closing: str, call: dict[str, Any], end: str
) -> dict[str, Any]:
    """How TRL's parser finds tool calls in a turn."""
    calls = {"open": opening, "close_pattern": closing, "repeats": True, **call}
    fields = {"tool_calls": calls, "content": {"close_pattern": end, "content": "text"}}
    return {"defaults": {"role": "assistant"}, "start_anchor": start, "fields": fields}


def _called(arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "search", "arguments": arguments}}


@dataclass(frozen=True)
class Case:
    """One model and the task that it acts in; `end` is a token that ends a turn beside the end of sequence."""

    name: str
    words: tuple[str, ...]
    template: str
    response: dict[str, Any]
    end: str | None = None
    pairs: int = 30
    warm_up: int = bench.WARM_UP


WORLD = ("task=search_world", "trainer.prompts_per_step=16", "trainer.rollouts_per_prompt=8")
WORLD_RESPONSE = response_template(
    ["?", "</r>"], "<s>", "</s>", {"content": "text", "transform": _called({"query": "{content}"})}, "<eos>"
)
CHAT_RESPONSE = response_template(
    "<|im_start|>assistant\n",
    "<tool_call>",
    r"</tool_call>\s*",
    {"content": "json", "transform": {"type": "function", "function": "{content}"}},
    r"<\|im_end\|>\s*",
)
LARGER = ("model.hidden_size=128", "model.layers=4", "model.feed_forward=256")
LARGER = (*LARGER, "model.warm_start.steps=250", "model.warm_start.learning_rate=3e-3")
REAL = ("model=smollm2", "task=multihop_qa", "task.form=hermes", "task.top_k=1", "task.passage_words=16")
REAL = (
    *REAL,
    "task.suffix=''",
    "trainer.prompts_per_step=4",
    "trainer.rollouts_per_prompt=4",
    "trainer.rows_per_device=4",
)
CASES = (
    Case("0.08 M", WORLD, WORLD_TEMPLATE, WORLD_RESPONSE, "</s>"),
    Case("0.6 M", (*WORLD, *LARGER), WORLD_TEMPLATE, WORLD_RESPONSE, "</s>"),
    Case("smollm2", (*REAL, "trainer.max_completion_tokens=72"), CHAT_TEMPLATE, CHAT_RESPONSE, pairs=5, warm_up=1),
)


def searches(question: str) -> list[dict[str, str]]:
    """A chat in which two questions were answered by a search, and `question`: a small model then searches too."""
    chat = []
    for asked, query, passage, answer in (
        ("who wrote Emma?", "author of Emma", "Emma (novel): Emma is a novel by Jane Austen.", "Jane Austen"),
        ("where is the Louvre?", "Louvre", "Louvre: The Louvre is a museum in Paris.", "Paris"),
    ):
        call = json.dumps({"name": "search", "arguments": {"query": query}})
        texts = (f"Search: {asked}", f"<tool_call>\n{call}\n</tool_call>", passage, answer)
        chat += [
            {"role": r, "content": t} for r, t in zip(("user", "assistant", "tool", "assistant"), texts, strict=True)
        ]
    return [*chat, {"role": "user", "content": f"Search: {question.strip()}"}]


@dataclass
class Watch:
    """What one side did in each step: CPU seconds of its rollout and of the model in it, ids, tokens written."""

    rollout: list[float] = field(default_factory=list)
    model: list[float] = field(default_factory=list)
    forwards: list[int] = field(default_factory=list)
    ids: list[list[list[int]]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def around(
        self, act: Callable[..., Any], owner: Any, name: str, read: Callable[[Any], tuple]
    ) -> Callable[..., Any]:
        """`act`, timed together with the calls of `owner.name` inside; `read` gives ids and masks of its outcome."""
        inside: list[float] = []
        forward = getattr(owner, name)

        def timed_forward(*args, **kw):
            began = time.thread_time()
            out = forward(*args, **kw)
            inside.append(time.thread_time() - began)
            return out

        def timed(*args, **kw):
            inside.clear()
            setattr(owner, name, timed_forward)
            began = time.thread_time()
            out = act(*args, **kw)
            self.rollout.append(time.thread_time() - began)
            setattr(owner, name, forward)
            self.model.append(sum(inside))
            self.forwards.append(len(inside))
            ids, masks = read(out)
            self.ids.append(ids)
            self.tokens.append(sum(map(sum, masks)))
            return out

        return timed


def environment_factory(task: Any, rows: list[Any]):
    """The task's environments in the form that TRL asks for."""

    class Environment:
        def reset(self, index: int, **_: Any) -> None:
            self._tools = task.environment(rows[index]).tools

        def search(self, query: str) -> str:
            """Looks something up.

            Args:
                query: What to look for.
            """
            return self._tools["search"](query)

    return Environment


def trl_trainer(ours: Any, case: Case, loaded: Any, task: Any, rows: list[Any]):
    """TRL's GRPOTrainer with the same arguments, prompts, tools and reward."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl.trainer.grpo_trainer import GRPOTrainer

    model, tokenizer = copy.deepcopy(loaded.model), copy.deepcopy(loaded.tokenizer)
    tokenizer.chat_template, tokenizer.response_template = case.template, case.response
    if case.end:
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(case.end)]
    args = copy.copy(ours.args)
    args.max_tool_calling_iterations = task.tools.max_calls

    def reward(completions, index, **_):
        return [task.score(turns[-1]["content"], rows[i]) for turns, i in zip(completions, index, strict=True)]

    chats = [r.prompt if isinstance(r.prompt, list) else [{"role": "user", "content": r.prompt}] for r in rows]
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[reward],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": chats, "index": list(range(len(rows)))}),
        processing_class=tokenizer,
        environment_factory=environment_factory(task, rows),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def prepared(case: Case, temperature: float) -> tuple[Any, Any, Any]:
    """Configuration, task and model of a case; the task gives the rows that both sides train on."""
    from hydra.utils import instantiate

    words = [f"trainer.max_steps={case.pairs + case.warm_up}", "trainer.save_every=0", "eval.every=0"]
    words += ["trainer.learning_rate=0", f"trainer.temperature={temperature}", *case.words]
    if "task=multihop_qa" in words:
        data = Path(os.environ["ASSAY_DATA"]) / "multihop_qa"
        words += [f"task.path={data / 'hotpotqa.jsonl.gz'}", f"task.corpus={data / 'corpus.jsonl.gz'}"]
    cfg = bench.configuration(*words)
    task = instantiate(cfg.task)
    loaded = instantiate(cfg.model).load(task, 0)
    rows = task.rows("train", 0)
    if loaded.chat:
        rows = [dataclasses.replace(row, prompt=searches(row.prompt)) for row in rows]
        loaded.tokenizer.chat_template = case.template
    task.rows = lambda *_: rows
    return cfg, task, loaded


def measure(case: Case, temperature: float) -> tuple[dict[str, Watch], dict[str, list[float]]]:
    """Both sides' watches and CPU seconds per step, warm-up included."""
    from experiments.decoder import CachedDecoder

    cfg, task, loaded = prepared(case, temperature)
    watches = {"ours": Watch(), "TRL": Watch()}

    def read(trajs):
        return [t.segments[0].completion_ids for t in trajs], [t.segments[0].model_mask for t in trajs]

    with tempfile.TemporaryDirectory() as folder:
        ours = bench.our_trainer(cfg, loaded, task, [], Path(folder))
        trl: Any = trl_trainer(ours, case, loaded, task, task.rows("train", 0))
        ours.default_rollout = watches["ours"].around(ours.default_rollout, CachedDecoder, "_scores", read)
        trl._generate = watches["TRL"].around(trl._generate, trl.model, "forward", lambda out: (out[1], out[2]))
        trainers = {"ours": ours, "TRL": trl}
        baton = bench.Baton(list(trainers))
        for name, trainer in trainers.items():
            bench.turns(trainer, name, baton, ours.args.seed, time.thread_time)
        threads = [threading.Thread(target=t.train) for t in trainers.values()]
        gc.collect()
        gc.freeze()  # else a collection of all that torch has loaded falls into some step of either side
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return watches, baton.seconds


def report(case: Case, temperature: float) -> None:
    watches, seconds = measure(case, temperature)
    kept = slice(case.warm_up, None)
    ours, trl = watches["ours"], watches["TRL"]
    episodes = [a == b for x, y in zip(ours.ids[kept], trl.ids[kept], strict=True) for a, b in zip(x, y, strict=True)]
    print(f"{case.name}, temperature {temperature:g}, {len(ours.ids[0])} episodes a step; ", end="")
    print(f"ids equal in {sum(episodes)} of {len(episodes)} episodes" if temperature < 0.1 else "each its own samples")
    speeds = {}
    for name, w in watches.items():
        speeds[name] = [n / s for n, s in zip(w.tokens[kept], w.rollout[kept], strict=True)]
        share = statistics.median(m / s for m, s in zip(w.model[kept], w.rollout[kept], strict=True))
        forwards, spent = statistics.median(w.forwards[kept]), statistics.median(seconds[name][kept])
        print(f"  {name:<4} {statistics.mean(w.tokens[kept]):.0f} tokens written, ", end="")
        print(
            f"{statistics.median(speeds[name]):.0f} a second; rollout {statistics.median(w.rollout[kept]):.3f} s ",
            end="",
        )
        print(f"({share:.0%} in {forwards:.0f} forwards), step {spent:.3f} s")
    steps = {name: [1 / s for s in spent[kept]] for name, spent in seconds.items()}
    for what, of in (("tokens per second of the rollout", speeds), ("steps per second", steps)):
        ratios = [a / b for a, b in zip(of["ours"], of["TRL"], strict=True)]
        print(f"  {what}, ours / TRL: {bench.interval(ratios)}, from {min(ratios):.2f} to {max(ratios):.2f}")


def rollout(*names: str) -> None:
    """Every case, or those named, at temperature 1e-3, the tiny ones at temperature 1 too.

    Seconds are CPU seconds of the one thread that a side runs in.
    """
    import torch

    torch.set_num_threads(1)
    for case in CASES:
        if not names or case.name in names:
            for temperature in (1e-3, 1.0) if case.end else (1e-3,):
                report(case, temperature)
