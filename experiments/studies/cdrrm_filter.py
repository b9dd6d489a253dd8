"""What CDRRM's filter, pruning and coverage do where it is known which rules of a rubric are right."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from experiments.judging.pairs import TIE
from experiments.judging.teacher import Teacher, discrimination, recovered, verdict
from experiments.judging.world import Case, Rule, case
from experiments.seeds import derive
from experiments.tasks.constraint_world import training_styles
from methods.cdrrm.measures import filter_purity
from methods.cdrrm.redundancy import cover, mask_accuracy, prune
from methods.errors import ConfigError, check_range

if TYPE_CHECKING:
    import pandas as pd

PASSES = {"none": 0, "one": 1, "both": 2}
PER_CASE = 4  # pairs of answers to one instruction, whose rubrics are merged
FRESH = "fresh"  # answers that no rubric was written from


@dataclass
class CdrrmFilter:
    """Rubrics of a noisy teacher on training pairs of the constraint world, `PER_CASE` for each of `cases`.

    filter: in how many orders a judge must recover the label (it names a random slot in the share `slip`). labels:
    random ones reach the filter alone. generic: all eight rules in place of the contrast. No model takes part.
    Columns, one row per seed: score = purity, the share of kept rubrics with required rules only; before, kept = purity
    before the filter and the share that it keeps; predicted = purity in closed form, from what one pass lets through of
    good and of bad rubrics (it takes the passes as independent); longer = accuracy of the longer answer, that is
    without a rubric; fresh = accuracy of a kept rubric on answers that it was not written from. Of the kept rubrics of
    an instruction together: merged, covered = rules in their union, and after pruning and greedy cover; fresh_covered =
    accuracy of these on fresh answers; mask0 ... mask3 = accuracy of unions of four and more rules on their own pairs
    with so many rules masked: a steep curve means that each rule counts.
    """

    filter: str = "both"  # none | one | both
    labels: str = "true"  # true | random
    generic: bool = False
    corrupt: float = 0.25
    slip: float = 0.05
    cases: int = 300

    def __post_init__(self) -> None:
        for key, known in (("filter", tuple(PASSES)), ("labels", ("true", "random"))):
            if getattr(self, key) not in known:
                raise ConfigError(
                    "Unknown value", where=f"study.{key}", got=getattr(self, key), expected=", ".join(known)
                )
        check_range("study.cases", self.cases, 1)
        for key in ("corrupt", "slip"):
            check_range(f"study.{key}", getattr(self, key), 0.0, 1.0)

    def simulate(self, seed: int) -> pd.DataFrame:
        import pandas as pd

        singles: list[dict[str, float]] = []
        unions: list[dict[str, float]] = []
        for k in range(self.cases):
            found = case(seed, f"filter-{k}")
            kept = [self._pair(found, pair, singles) for pair in range(PER_CASE)]
            merged = list(dict.fromkeys(rule for rules in kept for rule in rules))
            if merged:
                unions.append(self._union(found, merged))
        columns = self._purity(pd.DataFrame(singles)) | pd.DataFrame(unions).mean().to_dict()
        return pd.DataFrame([{"item_id": "all", "tier": "all", "length": 0.0, **columns}])

    def _pair(self, found: Case, pair: int, table: list[dict[str, float]]) -> list[Rule]:
        """The rubric of one pair if the filter keeps it, else nothing."""
        right, wrong = found.answers(True, pair), found.answers(False, pair)
        rng = random.Random(derive(found.seed, "pair", pair))
        i, j = training_styles(right, wrong, rng.random() < 0.8, rng)
        gold = rng.randrange(2)
        a, b = (right[i], wrong[j]) if gold == 0 else (wrong[j], right[i])
        label = gold if self.labels == "true" else rng.randrange(2)
        rules = Teacher(corrupt=self.corrupt).rubric(found, a, b, random.Random(derive(found.seed, "teacher", pair)))
        rules = list(found.rules) if self.generic else rules
        if not rules:
            return []
        judge = random.Random(derive(found.seed, "filter", pair))
        once = recovered(rules, a, b, label, self.slip, 1, random.Random(derive(found.seed, "once", pair)))
        keep = recovered(rules, a, b, label, self.slip, PASSES[self.filter], judge)
        required = [found.rules[k] for k in found.required]
        table.append(
            {
                "good": float(all(rule in required for rule in rules)),
                "once": float(once),
                "keep": float(keep),
                "longer": 0.5 if len(right[i]) == len(wrong[j]) else float(len(right[i]) > len(wrong[j])),
                "fresh": credit(rules, found) if keep else float("nan"),
                "rules": float(len(rules)) if keep else float("nan"),
            }
        )
        return rules if keep else []

    def _purity(self, table: pd.DataFrame) -> dict[str, float]:
        good, kept, once = (table[name].to_numpy(bool) for name in ("good", "keep", "once"))
        often, seldom = (float(once[part].mean()) if part.any() else 0.0 for part in (good, ~good))
        predicted, _ = filter_purity(float(good.mean()), often, seldom, PASSES[self.filter])
        columns = {"score": float(good[kept].mean()), "before": float(good.mean()), "predicted": predicted}
        means = {name: float(np.nanmean(table[name].to_numpy(float))) for name in ("longer", "fresh", "rules")}
        return columns | means | {"kept": float(kept.mean())}

    def _union(self, found: Case, merged: list[Rule]) -> dict[str, float]:
        """The rules of all kept rubrics of one instruction, on the plain answers that they were written from."""
        pairs = [(found.answers(True, k)[0], found.answers(False, k)[0]) for k in range(PER_CASE)]
        D_JP = discrimination(merged, *zip(*pairs, strict=True))
        covered = [merged[k] for k in cover(D_JP, prune(D_JP, [rule.text for rule in merged]))]
        masks = {f"mask{k}": mask_accuracy(D_JP, k) if len(merged) >= 4 else np.nan for k in range(4)}
        return {
            "merged": float(len(merged)),
            "covered": float(len(covered)),
            "fresh_covered": credit(covered, found),
            **masks,
        }


def credit(rules: list[Rule], found: Case) -> float:
    """1, 0 or 1/2 (a tie, or no rule) on answers to the same instruction that nobody has seen."""
    said = verdict(rules, found.answers(True, FRESH)[0], found.answers(False, FRESH)[0])
    return 0.5 if said == TIE else float(said == 0)
