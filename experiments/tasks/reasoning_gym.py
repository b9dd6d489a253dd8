"""Any procedural data set of the package reasoning-gym, by name, with its own scorer."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any

from experiments.seeds import derive
from experiments.tasks.base import Row, Task, first_line, tier_order
from methods.errors import ConfigError, nearest


@dataclass
class ReasoningGym(Task):
    """`name` is the data set (`chain_sum`, `countdown`, ...), `config` its own settings.

    The splits are drawn from different seeds; a data set with few different questions can repeat some of them.
    The tier of a row is the value of `tier_key` in its metadata (`num_terms=3`); by default the first key of the
    metadata's `difficulty` that has a single value, else the tier is `all`. `suffix` is put after each question.
    Raises ConfigError for an unknown name or setting.
    """

    name: str = "chain_sum"
    config: dict[str, Any] | None = None
    train_rows: int = 2000
    eval_rows: int = 200
    tier_key: str | None = None
    suffix: str = "Write only the final answer, inside <answer></answer>."

    def __post_init__(self) -> None:
        super().__post_init__()
        self._dataset(1, 0)

    def _dataset(self, size: int, seed: int):
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

        if self.name not in DATASETS:
            raise ConfigError(
                f"reasoning-gym has no data set '{self.name}'",
                where="task.name",
                expected=f"one of its {len(DATASETS)} names",
                fix=nearest(self.name, DATASETS) or "see its gallery",
            )
        config = self.config or {}
        known = {f.name for f in fields(DATASETS[self.name][1])} - {"seed", "size"}
        for key in config:
            if key not in known:
                raise ConfigError(
                    f"The data set '{self.name}' has no setting '{key}'",
                    where=f"task.config.{key}",
                    expected=", ".join(sorted(known)),
                    fix=nearest(key, known) or "use one of these",
                )
        try:
            return reasoning_gym.create_dataset(self.name, size=size, seed=seed, **config)
        except (AssertionError, ValueError, TypeError) as error:
            raise ConfigError(
                f"The data set '{self.name}' refuses its settings", where="task.config", got=first_line(error)
            ) from error

    def rows(self, split: str, seed: int) -> list[Row]:
        size = self.train_rows if split == "train" else self.eval_rows
        dataset = self._dataset(size, derive(seed, "reasoning_gym", self.name, split) % 2**31)
        rows = []
        for index in range(size):
            entry = dataset[index]
            prompt = entry["question"] + (f"\n\n{self.suffix}" if self.suffix else "")
            rows.append(
                Row(
                    id=f"{split}-{index:06d}",
                    prompt=prompt,
                    answer=entry["answer"],
                    tier=self._tier(entry),
                    meta={"entry": entry},
                )
            )
        self.tiers = tier_order(row.tier for row in rows)
        return rows

    def _tier(self, entry: dict) -> str:
        metadata = entry.get("metadata", {})
        keys = [self.tier_key] if self.tier_key else list(metadata.get("difficulty") or {})
        for key in keys:
            value = metadata.get(key, (metadata.get("difficulty") or {}).get(key))
            if isinstance(value, (int, float, str)):
                return f"{key}={value}"
        if self.tier_key:
            raise ConfigError(
                f"The metadata of '{self.name}' have no single value '{self.tier_key}'",
                where="task.tier_key",
                expected=", ".join(k for k, v in metadata.items() if isinstance(v, (int, float, str))),
            )
        return "all"

    def score(self, text: str, row: Row) -> float:
        """The data set's own score, clipped to [0, 1]; 0 where its scorer cannot read the completion."""
        said = extract(text, row.answer)
        try:
            value = self._scorer().score_answer(said, row.meta["entry"])
        except Exception:  # these scorers parse free text with code of 100 authors; an unreadable answer is wrong
            return 0.0
        return min(1.0, max(0.0, float(value)))

    def _scorer(self):
        if not hasattr(self, "_scoring"):
            self._scoring = self._dataset(1, 0)
        return self._scoring


def extract(text: str, answer: str | None) -> str:
    """The last `<answer>...</answer>` if there is one; else as many last lines as the gold answer has (a one-line
    answer: the last line that is not empty)."""
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    if tagged:
        return tagged[-1].strip()
    lines = text.strip().splitlines()
    return "\n".join(lines[-len(str(answer).strip().splitlines() or [""]) :]).strip()
