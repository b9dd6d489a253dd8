"""`assay judge` over an engine that answers by rule: verdicts, rubrics, the filter, interruption, and no leak."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from experiments.engines.base import BaseEngine, Result, Usage, failed
from experiments.engines.cache import CachedEngine
from experiments.judging import run as running
from experiments.judging.judges import ByRubric, Direct, Rating
from experiments.judging.pairs import FAILED, UNPARSABLE, Item, Question, questions
from methods.errors import AssayError, ConfigError, RunError


def boxes(text: str) -> dict[str, str]:
    return {tag: body.strip("\n") for tag, body in re.findall(r"<(\w+)>\n(.*?)\n</\1>", text, re.DOTALL)}


def profile(answer: str) -> str:
    status = "fail" if "bad" in answer else "pass"
    finding = {"criterion": "asked for", "status": status, "severity": 2, "claim": "c", "evidence": answer[:9]}
    return json.dumps({"criteria_candidates": [], "findings": [finding | {"instruction_anchor": "do"}]})


RUBRIC = {"hard_rules": [{"rule_id": "1", "type": "forbid", "criterion": "Is bad", "test": "look for bad"}]}


class Program(BaseEngine):
    """Answers every prompt of CDRRM by rule. Without a rubric it prefers the longer answer, with one the one that is
    not bad. `after` calls raise KeyboardInterrupt."""

    name = "program"

    def __init__(
        self, after: int | None = None, broken: str = "", first: bool = False, why: str = "the prompt fills the context"
    ) -> None:
        super().__init__()
        self.after, self.broken, self.first, self.why, self.asked = after, broken, first, why, []

    def identity(self):
        return {"engine": "program"}

    def _stream(self, requests):
        for index, request in enumerate(requests):
            if self.after is not None and len(self.asked) >= self.after:
                raise KeyboardInterrupt
            self.asked.append(request.messages)
            if self.broken and self.broken in request.messages[1]["content"]:
                yield index, failed(request, self.why)
                continue
            yield index, [Result(self.answer(*request.messages[:2]), None, None, "stop", Usage(9, 1))]

    def answer(self, system: dict, user: dict) -> str:
        found = boxes(user["content"])
        if "response" in found:
            return "no idea" if "mute" in found["response"] else profile(found["response"])
        if system["content"].startswith(("You are given the diagnoses", "You write the rubric")):
            return "Here it is:\n```json\n" + json.dumps(RUBRIC) + "\n```"
        a, b = found["response_a"], found["response_b"]
        if self.first:
            return "Winner: Response A"
        if "rubric" in found and ("bad" in a) != ("bad" in b):
            return f"By the rule.\nFinal Judgment\nWinner: Response {'B' if 'bad' in a else 'A'}"
        return "Winner: Response A" if (len(a), a) > (len(b), b) else "Winner: Response B"


def pair(k: int, chosen: str = "good", rejected: str = "bad and longer") -> Item:
    return Item(str(k), "pairs", "all", f"do {k}", (f"{chosen} {k}", f"{rejected} {k}"), (1.0, 0.0))


def judged(judge, items, orders="both"):
    asked = list(questions(items, 0, "pairs", orders))
    return asked, list(running.in_order(judge, iter(asked)))


# ---------------------------------------------------------------- judges


def test_a_rubric_turns_the_verdict():
    items = [pair(k) for k in range(8)]
    _, direct = judged(Direct(Program()), items)
    assert all(v.choice == 1 - v.question.gold for v in direct)  # the longer one
    judge = ByRubric(Program())
    _, ruled = judged(judge, items)
    assert all(v.choice == v.question.gold for v in ruled) and not judge.counts
    one_step = ByRubric(Program(), writer="one_step")
    assert all(v.choice == v.question.gold for v in judged(one_step, items)[1])


def test_swapping_the_answers_swaps_every_verdict():
    items = [pair(k, rejected="bad" * (k % 5)) for k in range(50)]
    for judge in (Direct(Program()), ByRubric(Program()), ByRubric(Program(), writer="one_step")):
        asked = list(questions(items, 3, "pairs", "seeded"))
        one = list(running.in_order(judge, iter(asked)))
        other = list(running.in_order(judge, (q.swapped() for q in asked)))
        assert sum(v.choice != 1 - w.choice for v, w in zip(one, other, strict=True)) == 0


def test_the_label_reaches_no_prompt():
    """The released code presents the chosen answer as A and spells the winner in a template."""
    items = [pair(k) for k in range(200)]
    relabelled = [Item(i.id, i.benchmark, i.subset, i.prompt, i.responses, i.grades[::-1]) for i in items]
    seen = []
    for labelled in (items, relabelled):
        engine = Program()
        asked = [Question(item, (0, 1)) for item in labelled]
        list(ByRubric(engine).judge(asked))
        seen.append(engine.asked)
    assert seen[0] == seen[1] and len(seen[0]) == 800
    first = sum(q.gold == 0 for q in questions(items, 0, "pairs", "seeded"))
    assert 70 < first < 130


def test_what_cannot_be_read_is_counted():
    items = [pair(0), pair(1, chosen="mute"), pair(2, rejected="good too"), pair(3, chosen="broken")]
    engine = Program(broken="broken 3")
    judge = ByRubric(engine)
    _, found = judged(judge, items, "seeded")
    assert found[0].choice == found[0].question.gold
    assert judge.counts["profile: not JSON"] == 1
    assert judge.counts["rubric: both profiles are the same"] == 1
    assert judge.counts["no rubric: asked directly"] == 3
    assert found[3].choice == FAILED and judge.counts["request failed: the prompt fills the context"] == 2
    assert judge.counts["verdict: no winner"] == 0


def test_what_is_whole_before_the_token_limit_counts():
    from experiments.judging.asking import Asker
    from experiments.judging.rubrics import read
    from methods.cdrrm.rubric import Rubric

    asker, whole = Asker(Program(), 9), json.dumps(RUBRIC)
    texts = [whole + "\nAnd so on and", whole[:-20]]
    one, other = read(asker, [Result(text, None, None, "length") for text in texts], Rubric.parse, "rubric")
    assert isinstance(one, Rubric) and str(other) == "cut off: not JSON" and asker.counts == {"rubric: cut off": 1}


def test_a_verdict_alone():
    class Short(Program):
        def answer(self, system, user):
            return " B, because" if "1" in user["content"] else "ecause of A"

    engine = Short()
    _, found = judged(Direct(engine, analysis=False), [pair(0), pair(1)], "seeded")
    assert [v.choice for v in found] == [UNPARSABLE, 1]
    assert engine.asked[0][-1] == {"role": "assistant", "content": "Final Judgment\nWinner: Response"}


class Rater(Program):
    """Rates an answer by the digits in it, `?` where there is none."""

    def answer(self, system, user):
        found = re.search(r"\d+", boxes(user["content"])["response"])
        return f"Fine.\nRating: {found[0] if found else '?'}/10"


def best_of_four(name: str, *answers: str) -> Item:
    return Item(name, "rewardbench2", "Focus", "do it", answers, (1, 0, 0, 0))


def test_a_rating_judge_scores_lists():
    items = [best_of_four("0", "an 8", "a 3", "a 2", "a 1"), best_of_four("1", "a 5", "a 5 too", "a 2", "mute")]
    items.append(Item("tied:4", "rewardbench2", "Ties", "which", ("7", "6", "2"), (1, 1, 0)))
    judge, told = Rating(Rater()), []
    judge.watch(told.append)
    found = list(running.in_order(judge, questions(items, 0, judge.form)))
    by_slot = [[v.scores[v.question.slots.index(k)] for k in range(len(v.scores))] for v in found]
    assert by_slot[0] == [8, 3, 2, 1] and by_slot[2] == [7, 6, 2]
    assert by_slot[1][:3] == [5, 5, 2] and by_slot[1][3] != by_slot[1][3]  # NaN
    assert [v.choice for v in found] == [found[0].question.gold, UNPARSABLE, found[2].question.slots.index(0)]
    assert judge.counts == {"rating: none readable": 1} and sum(told) == len(items)
    # Each answer is asked about by itself: the others are not in the prompt.
    assert len(judge.asker.engine.asked) == 11
    assert not any("3" in prompt[1]["content"] and "8" in prompt[1]["content"] for prompt in judge.asker.engine.asked)
    lost = Rating(Rater(broken="a 3"))
    assert [v.choice for v in running.in_order(lost, questions(items[:1], 0, lost.form))] == [FAILED]
    assert lost.counts == {"request failed: the prompt fills the context": 1}
    loose = Rating(Rater(), parser="official")
    assert [v.scores for v in running.in_order(loose, questions(items[:1], 0, loose.form))] == [(10,) * 4]


def test_a_rating_judge_is_scored_on_rewardbench_2(configured, tmp_path):
    texts = ["an 8", "a 3", "a 2", "a 1"]
    rows = [{"id": k, "subset": s, "prompt": f"do {s}{k}", "chosen": texts[:1], "rejected": texts[1:]}
            for s in ("Factuality", "Focus") for k in range(3)]  # fmt: skip
    rows += [{"id": f"{kind}:0", "subset": "Ties", "prompt": kind, "chosen": right, "rejected": ["1"]}
             for kind, right in (("ref", ["9"]), ("tied", ["9", "9 or so"]))]  # fmt: skip
    words = [
        "judge=rating",
        "benchmark=rewardbench2",
        "benchmark.official=false",
        f"benchmark.path={tmp_path}/pairs.jsonl",
    ]
    path = running.run(configured(Rater(), *words, rows=rows))
    line = next(x for x in (path / "table.md").read_text().splitlines() if x.startswith("| rating"))
    assert "| 1.010 (" in line and "| 1.003 [" in line  # the perfect Ties, and the mean with two subsets of 1


def test_settings_are_checked():
    for make in (
        lambda: Direct(Program(), max_tokens=0),
        lambda: ByRubric(Program(), writer="two_step"),
        lambda: Rating(Program(), parser="loose"),
        lambda: Rating(Program(), max_tokens=0),
    ):
        with pytest.raises(ConfigError):
            make()


# ---------------------------------------------------------------- whole runs


@pytest.fixture
def configured(tmp_path, monkeypatch):
    """configured(engine, words) -> cfg of `assay judge` on pairs of a file, over `engine` behind a cache on disk."""
    from cli.compose import compose

    file = tmp_path / "pairs.jsonl"

    def make(engine, *words, rows=None):
        rows = (
            rows
            if rows is not None
            else [{"id": k, "prompt": f"do {k}", "chosen": f"good {k}", "rejected": f"bad one {k}"} for k in range(12)]
        )
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        cached = CachedEngine(engine, tmp_path / "cache")
        monkeypatch.setattr(running, "build_engine", lambda cfg, task: cached)
        cfg = compose(
            "judge", ["benchmark=pairs", f"benchmark.path={file}", f"results_dir={tmp_path / 'results'}", *words]
        )
        cfg.experiment, cfg.arm, cfg.seed = "try", "one", 0
        return cfg

    return make


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_interrupted_run_goes_on_and_pays_no_call_twice(configured, tmp_path):
    whole = running.run(configured(Program(), "judge.step=judge"))
    expected = hashlib.sha256((whole / "verdicts.parquet").read_bytes()).hexdigest()
    calls = Counter(json.dumps(m) for m in Program().asked)
    for folder in ("cache", "results"):
        (tmp_path / folder).rename(tmp_path / f"{folder}-whole")
    paid: Counter = Counter()
    for after in (7, 20, 3):
        engine = Program(after=after)
        with pytest.raises(KeyboardInterrupt):
            running.run(configured(engine, "judge.step=judge"))
        paid += Counter(json.dumps(m) for m in engine.asked)
        assert not list((tmp_path / "results").rglob("verdicts.parquet"))
    engine = Program()
    again = running.run(configured(engine, "judge.step=judge"))
    paid += Counter(json.dumps(m) for m in engine.asked)
    assert set(paid.values()) == {1} and len(paid) == 12 * 2 + 24 + 24 and not calls
    assert hashlib.sha256((again / "verdicts.parquet").read_bytes()).hexdigest() == expected


def test_bench_writes_a_table(configured):
    path = running.run(configured(Program(), "judge=direct"))
    table = (path / "table.md").read_text()
    assert "| direct " in table and "always_first (trivial)" in table
    assert (path / "figures").is_dir()
    engine = Program()
    assert running.run(configured(engine, "judge=direct")) == path and not engine.asked


@pytest.mark.parametrize("place", ["pairs.jsonl", "folder"])
def test_changed_data_is_another_run(configured, tmp_path, place):
    folder = tmp_path / "folder"
    folder.mkdir()

    def job(*words, **rows):
        cfg = configured(Program(), "judge=longer", f"benchmark.path={tmp_path / place}", *words, **rows)
        shutil.copy(tmp_path / "pairs.jsonl", folder)
        return running.run(cfg)

    path = job()
    known = json.loads((path / "run.json").read_text())["data"]["pairs.jsonl"]
    assert known["bytes"] > 0 and len(known["sha256"]) == 64
    assert job() == path  # written anew, the same bytes
    rows = [{"id": 1, "prompt": "p", "chosen": "a", "rejected": "bb"}]
    with pytest.raises(AssayError, match=r"has changed since.*pairs\.jsonl"):
        job(rows=rows)
    assert job("overwrite=true", rows=rows) == path


def test_failed_requests_leave_the_run_unfinished(configured):
    """A file with 12 pairs; the endpoint refuses what is said about the pairs 1, 10 and 11, in both orders."""
    import pandas as pd

    with pytest.raises(RunError, match=r"6 requests failed.*HTTP 400") as refusal:
        running.run(configured(Program(broken="do 1", why="HTTP 400"), "judge=direct"))
    path = Path(refusal.value.where)
    assert json.loads((path / "run.json").read_text())["status"] == "failed" and not (path / "summary.json").exists()
    frame = pd.read_parquet(path / "eval.parquet")
    assert (frame["finish"] == "error").sum() == 3 and (path / "table.md").is_file()
    engine = Program()
    assert running.run(configured(engine, "judge=direct")) == path and len(engine.asked) == 6
    assert set(pd.read_parquet(path / "eval.parquet")["finish"]) == {"stop"}


def test_prompts_that_no_model_call_can_answer_do_not_keep_a_run_from_finishing(configured):
    path = running.run(configured(Program(broken="do 1"), "judge=direct"))
    metrics = json.loads((path / "summary.json").read_text())["metrics"]
    assert metrics["count/request failed: the prompt fills the context"] == 6 and metrics["eval/unparsable"] == 0


def test_a_filter_with_failed_requests_is_not_finished(configured):
    with pytest.raises(RunError, match=r"requests failed.*HTTP 400"):
        running.run(configured(Program(broken="do 1", why="HTTP 400"), "judge.step=filter"))


def test_the_filter_keeps_rubrics_that_recover_the_label(configured):
    rows = [{"id": k, "prompt": f"do {k}", "chosen": f"good {k}", "rejected": f"bad one {k}"} for k in range(8)]
    rows += [{"id": f"x{k}", "prompt": f"do {k}", "chosen": f"bad {k}", "rejected": f"good one {k}"} for k in range(4)]
    rows += [{"id": "mute", "prompt": "do", "chosen": "mute", "rejected": "bad"}]
    path = running.run(configured(Program(), "judge.step=filter", rows=rows))
    rubrics = lines(path / "rubrics.jsonl")
    assert [r["kept"] for r in rubrics[:12]] == [True] * 8 + [False] * 4
    assert rubrics[12]["rejected"] == "no profile (not JSON)"
    metrics = json.loads((path / "summary.json").read_text())["metrics"]
    assert metrics["kept"] == 8 and metrics["kept_share"] == pytest.approx(8 / 12)
    assert metrics["accuracy_with_rubric"] == pytest.approx(8 / 12) and metrics["profiles_rejected"] == 1
    assert metrics["accuracy_without_rubric"] == 0  # the longer answer, on the 12 pairs with a rubric
    assert metrics["verdicts_without_rubric"] == metrics["verdicts_with_rubric"] == 24
    generator, judge = lines(path / "generator_sft.jsonl"), lines(path / "judge_sft.jsonl")
    assert len(generator) == len(judge) == 8
    first = [boxes(row["messages"][1]["content"])["response_a"].startswith("good") for row in generator]
    assert 0 < sum(first) < 8  # the chosen answer is A in some and B in others
    assert all(json.loads(row["messages"][2]["content"])["hard_rules"] for row in generator)
    assert all("Winner: Response" in row["messages"][2]["content"] for row in judge)
    engine = Program()
    earlier = configured(engine, "judge.step=synthesise", rows=rows)
    earlier.arm = "two"
    running.run(earlier)
    assert not engine.asked  # the earlier step had asked it all


def test_a_published_benchmark_makes_no_training_rows(configured, tmp_path):
    words = ["benchmark=rewardbench", "benchmark.official=false", f"benchmark.path={tmp_path}/pairs.jsonl"]
    row = {"id": 1, "subset": "mt-bench-hard", "prompt": "do 1", "chosen": "good 1", "rejected": "bad one 1"}
    with pytest.raises(ConfigError, match="never trained on"):
        running.run(configured(Program(), "judge.step=filter", *words, rows=[row]))
    path = running.run(configured(Program(), "judge.step=synthesise", *words, rows=[row]))
    assert len(lines(path / "rubrics.jsonl")) == 1


def test_a_filter_that_keeps_nothing_says_why(configured):
    with pytest.raises(RunError, match=r"kept no rubric.*12 pairs"):
        running.run(configured(Program(first=True), "judge.step=filter"))


def test_training_rows_can_be_trained_on(configured):
    from experiments.tasks.judge_rows import JudgeRows

    path = running.run(configured(Program(), "judge.step=filter"))
    for name in ("generator_sft", "judge_sft"):
        task = JudgeRows(path=str(path / f"{name}.jsonl"), eval_fraction=0.4)
        train, held = task.rows("train", 0), task.rows("eval", 0)
        assert len(train) + len(held) == 12
        assert all(task.score(row.demo, row) == 1 and task.score("?", row) == 0 for row in (*train, *held))


def test_what_is_refused(configured):
    for words, said in (
        (["judge=longer", "judge.step=filter"], "makes rubrics"),
        (["judge=one_step", "judge.step=profile"], "contrasted"),
        (["judge.step=bnch"], "judge.step"),
        (["judge.orders=one"], "judge.orders"),
        (["judge=longer", "judge.by.form=none"], "judge.by.form"),
        (["judge=direct", "judge.by.max_tokens=0"], "max_tokens"),
        (["judge=cdrrm_generator", "judge.by.generator=/nonexist"], "judge.by.generator"),
    ):
        with pytest.raises(AssayError, match=said):
            running.run(configured(Program(), *words))
    with pytest.raises(AssayError, match="twice"):
        running.run(configured(Program(), rows=[{"id": 1, "prompt": "p", "chosen": "a", "rejected": "b"}] * 2))
    with pytest.raises(AssayError, match="rejected"):
        running.run(configured(Program(), rows=[{"id": 1, "prompt": "p", "chosen": "a"}]))


def test_tie_labels_are_left_out(configured):
    row = {"prompt": "p", "response_a": "good", "response_b": "bad one"}
    rows = [row | {"id": 1, "winner": "A"}, row | {"id": 2, "winner": "tie"}, row | {"id": 3, "winner": "B"}]
    path = running.run(configured(Program(), "judge=direct", rows=rows))
    assert "1 with tie label" in (path / "table.md").read_text()
    assert json.loads((path / "summary.json").read_text())["metrics"]["verdicts"] == 4


# ---------------------------------------------------------------- reward models


def test_a_reward_model_scores_every_answer(tmp_path, monkeypatch):
    import torch
    from transformers import Qwen3Config, Qwen3ForSequenceClassification

    from experiments.judging.judges import RewardModel
    from experiments.tokenizers import tiny_tokenizer

    monkeypatch.setenv("ASSAY_CACHE", str(tmp_path / "cache"))
    tokenizer = tiny_tokenizer(chat=True)
    torch.manual_seed(0)
    model = Qwen3ForSequenceClassification(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_labels=1,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    for target in (model, tokenizer):
        target.save_pretrained(tmp_path / "rm")
    judge = RewardModel(str(tmp_path / "rm"), batch_size=3)
    asked = list(questions([pair(k, rejected="bad" * (k + 1)) for k in range(5)], 0, judge.form))
    found = list(judge.judge(asked))
    turns = [{"role": "user", "content": "do 2"}, {"role": "assistant", "content": asked[2].responses[0]}]
    ids = tokenizer.apply_chat_template(turns, tokenize=True, return_tensors="pt", return_dict=True)["input_ids"]
    assert found[2].scores[0] == pytest.approx(model.eval()(input_ids=ids).logits.item(), abs=1e-5)
    again = RewardModel(str(tmp_path / "rm"), batch_size=1)
    assert list(again.judge(asked)) == found and again.engine.cost()["cached"] == 10
    with pytest.raises(ConfigError, match="cannot be loaded"):
        RewardModel(str(tmp_path / "nowhere"))
