"""AutoSearch: rewards that end a search where the policy could already answer (arXiv 2604.17337)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from methods.autosearch.probes import SelfAnswers, observed, self_answers
from methods.autosearch.rewards import VARIANTS, Searched, repeats, without_efficiency
from methods.base import Context, Method, Trajectory, Turn
from methods.errors import ConfigError, check_range


@dataclass
class AutoSearch(Method):
    """AutoSearch: the policy answers after every search, and rewards go to the searches up to the first right answer.

    With t_c = min { t : self-answer t is right } (Eq. 6), -1 if there is none, a turn t gets
        paper_sum  base_t + efficiency_t + quality_t: efficiency 0.5 (0.4 / t_c - 0.05) for t <= t_c, -0.05 beyond,
                   +0.0125 where t_c = -1; quality max(0, F1_t - best F1 before)
        code       the authors' program: as above, but every turn after a self-answer that was right too early, the
                   answer included, is overwritten with -0.05
    base: +-0.025 for a well-formed search that repeats no earlier query, 0.1 or -0.5 for the form of the answer, and
    the outcome. The reward of a turn sits on its last token; an objective with a group baseline sums a trajectory's.

    `search_form` and `answer_form` are regular expressions that a whole turn must match. `forced`: the opening of an
    answer that is put behind the history to get a self-answer (tiny models); empty: a prompt that shows the question
    and the history, as in the paper. The verifier's EM decides what is right (`task.metrics()["em"]` where there is
    one), its F1 what was gained. efficiency=false, an ablation, leaves base and quality and overwrites nothing (zeroing
    the constants alone would still erase outcomes).

    Differs from the paper: paper and code disagree; `code` is the variant whose every constant could be read. An
    efficiency step is not below 0 (t_c > 8). Every gold answer counts for a self-answer, not the first alone.
    Degenerate: without a search only the base reward; a failed probe is an empty answer; a trajectory cut after a
    search has its last turn judged as a badly formed answer.
    """

    variant: str = "code"
    search_form: str = r"<think>.*?</think>\s*<search>.*?</search>"
    answer_form: str = r"<think>.*?</think>\s*<answer>.*?</answer>"
    forced: str = ""
    probe_tokens: int = 256
    efficiency: bool = True
    last: dict[str, float] = field(default_factory=dict, init=False)

    name = "autosearch"
    signals = ("self_answers",)

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ConfigError(
                "unknown reward variant",
                where="method.autosearch.variant",
                got=self.variant,
                expected=" or ".join(VARIANTS),
            )
        check_range("method.autosearch.probe_tokens", self.probe_tokens, 1)
        for key in ("search_form", "answer_form"):
            try:
                re.compile(getattr(self, key) or "")
            except re.error as error:
                raise ConfigError(
                    "a form is no regular expression",
                    where=f"method.autosearch.{key}",
                    got=f"{getattr(self, key)}: {error}",
                ) from error

    def token_rewards(self, trajs: list[Trajectory], ctx: Context) -> Tensor | None:
        batch = ctx.batch
        assert batch is not None
        outcome_N = torch.nan_to_num(ctx.reward(ctx.reward_name("outcome"))).tolist()
        answers = self_answers(trajs, ctx, self.forced, self.probe_tokens, temperature=1.0)
        self._shuffle(answers, ctx)
        rewards_ST = torch.zeros_like(batch.adv_ST)
        row_of = {int(t): row for row, t in reversed(list(enumerate(batch.traj_S.tolist())))}
        reward_of = VARIANTS[self.variant] if self.efficiency else without_efficiency
        depths = []
        for i, (traj, probed) in enumerate(zip(trajs, answers, strict=True)):
            said = self.judge(traj, probed, outcome_N[i], ctx)
            depths.append(said.depth)
            for turn, reward in zip(turns_of(traj)[: len(said.valid)], reward_of(said), strict=True):
                if turn.end > turn.start:
                    rewards_ST[row_of[i] + turn.segment, turn.end - 1] += reward
        searches = [len(observed(t)) for t in trajs]
        self.last = {**search_metrics(searches, answers), "depth_known": sum(d > 0 for d in depths) / len(depths)}
        return rewards_ST

    def judge(self, traj: Trajectory, probed: SelfAnswers, outcome: float, ctx: Context) -> Searched:
        """What the rewards of one trajectory depend on; its turns as text, and which of them are well formed."""
        seen = observed(traj)
        turns = turns_of(traj)[: len(seen) + 1]
        cut = len(turns) == len(seen)  # ended after a search: its last turn is judged as the answer, a bad one
        texts = [turn_text(traj, k, ctx) for k in range(len(turns))]
        fresh = not_repeated(traj)
        valid = [matches(self.search_form, text) and fresh[k] for k, text in enumerate(texts[:-1])]
        valid.append(not cut and matches(self.answer_form, texts[-1]))
        return Searched(valid, probed.right, probed.f1, outcome)

    def _shuffle(self, answers: list[SelfAnswers], ctx: Context) -> None:
        """The control of the self-answers: their verdicts pass as one column, within trajectories."""
        within = torch.tensor([i for i, a in enumerate(answers) for _ in a.right], dtype=torch.long)
        verdicts = torch.tensor([[r, f] for a in answers for r, f in zip(a.right, a.f1, strict=True)]).reshape(-1, 2)
        changed = ctx.signal(self, "self_answers", verdicts, within).tolist()
        for i, row in zip(within.tolist(), changed, strict=True):
            answers[i].right.pop(0)
            answers[i].f1.pop(0)
            answers[i].right.append(row[0] > 0.5)
            answers[i].f1.append(row[1])

    def metrics(self) -> dict[str, float]:
        return dict(self.last)


@dataclass
class SearchDepth(Method):
    """Measures search depth in evaluation, for arms with and without AutoSearch: over_search, waste, sufficient_depth.

    Self-answers are greedy. over_search: the self-answer was right strictly before the last search (their mean is OSR).
    waste: share of searches after the first right self-answer. sufficient_depth: t_c, NaN if no self-answer is right.
    """

    forced: str = ""
    probe_tokens: int = 256

    name = "search_depth"

    def __post_init__(self) -> None:
        check_range("method.search_depth.probe_tokens", self.probe_tokens, 1)

    def eval_metrics(self, trajs: list[Trajectory], ctx: Context) -> dict[str, list[float]]:
        answers = self_answers(trajs, ctx, self.forced, self.probe_tokens, temperature=0.0)
        depth = [float(next((t for t, ok in enumerate(a.right, start=1) if ok), -1)) for a in answers]
        n = [len(a.right) for a in answers]
        over = [0 < d < k for d, k in zip(depth, n, strict=True)]
        return {
            "over_search": [float(o) for o in over],
            "waste_share": [(k - d) / k if o else 0.0 for o, d, k in zip(over, depth, n, strict=True)],
            "sufficient_depth": [d if d > 0 else float("nan") for d in depth],
        }


def search_metrics(searches: Sequence[int], answers: Sequence[SelfAnswers]) -> dict[str, float]:
    """Mean depth, and the share of trajectories that searched on after a right self-answer."""
    over = [any(a.right[:-1]) for a in answers]
    return {"depth": sum(searches) / len(searches), "over_search": sum(over) / len(over)}


def matches(form: str, text: str) -> bool:
    return re.fullmatch(form, text.strip(), re.DOTALL) is not None


def turns_of(traj: Trajectory) -> list[Turn]:
    """A trajectory's turns; a demonstration without a record of turns is one answer."""
    return traj.turns or [Turn(0, 0, len(traj.segments[0].completion_ids))]


def turn_text(traj: Trajectory, k: int, ctx: Context) -> str:
    turn = turns_of(traj)[k]
    ids = traj.segments[turn.segment].completion_ids[turn.start : turn.end]
    return ctx.tokenizer.decode(ids, skip_special_tokens=True)


def not_repeated(traj: Trajectory) -> list[bool]:
    """For each turn whether its query is no repeat of an earlier turn's; a turn without a query is fresh."""
    queries = {}
    for k, turn in enumerate(traj.turns):
        texts = [" ".join(map(str, call["args"].values())) for call in turn.calls if call]
        if texts:
            queries[k] = " ".join(texts)
    again = dict(zip(queries, repeats(list(queries.values())), strict=True))
    return [not again.get(k, False) for k in range(len(traj.turns))]
