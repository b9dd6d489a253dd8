"""Tool calls in miniature: think out the tool and its arguments, then write the call, in the form of real ones."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field

from experiments.seeds import derive
from experiments.tasks.base import Row, Task, shuffled
from experiments.tasks.tool_rewards import outcome_reward
from methods.errors import ConfigError

WISHES, TOOLS, KEYS = "ABCDEFGHIJKLMNOP", 8, "abc"
CALL, END, FILLER = '</think>\n<tool_call>\n{"name": "', "}}\n</tool_call>", " hm"
FACT = re.compile(r" hm|use (?P<tool>t\d)| (?P<key>[abc])=(?P<value>\d)")
SYMBOLS = (
    *WISHES, *"0123456789", "?", *(f"t{t}" for t in range(TOOLS)), "<think>", "use ", *(f" {k}=" for k in KEYS),
    FILLER, CALL, '", "parameters": {"a": ', ', "b": ', ', "c": ', END,
)  # fmt: skip


@dataclass
class ToolCalls(Task):
    """`C471?`: a wish and three numbers. The answer thinks in facts and then calls one of eight tools:

        <think>use t2 a=7 b=0 c=6</think>
        <tool_call>
        {"name": "t2", "parameters": {"a": 7, "b": 0, "c": 6}}
        </tool_call>

    The wish decides the tool, the tool takes one, two or three of the numbers (tiers easy, medium, hard), each shifted
    by an amount of its own, modulo ten. Wishes of the last `held_out` tools are never trained on; their tier `held_out`
    shows what training does to them. The score is 1 for the right call in the right format, else 0.

    Demonstrations (warm start) show all tools. Each fact is wrong with `tool_noise` or `fact_noise`: another tool; the
    number one higher. The call repeats the facts, a number one higher with `slip`. The empty words ` hm` follow the
    facts, one more with chance `filler` each time.
    """

    name: str = "tool_calls"
    symbols: tuple[str, ...] | None = SYMBOLS
    max_prompt_tokens: int = 5
    max_completion_tokens: int = 28
    tiers: tuple[str, ...] = field(default=("easy", "medium", "hard", "held_out"), init=False)
    held_out: int = 2
    tool_noise: float = 0.2
    fact_noise: float = 0.5
    slip: float = 0.05
    filler: float = 0.3
    bonus: float = 0.25
    train_rows: int = 6000
    eval_rows: int = 192

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("tool_noise", "fact_noise", "slip", "filler", "bonus"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError("Not a share", where=f"task.{key}", got=getattr(self, key), expected="0 to 1")
        if not isinstance(self.held_out, int) or not 0 <= self.held_out < TOOLS:
            raise ConfigError("Out of range", where="task.held_out", got=self.held_out, expected=f"0 to {TOOLS - 1}")

    # ---- rows
    def rows(self, split: str, seed: int) -> list[Row]:
        if split not in ("train", "eval", "test"):
            raise ConfigError("Unknown split", where="task", got=split, expected="train, eval or test")
        rng, train = random.Random(derive(seed, "tool_calls", split)), split == "train"
        tools = TOOLS - self.held_out * train
        count = self.train_rows if train else self.eval_rows
        rows = [self._row(f"{split}-{i}", i % tools, rng, noisy=train) for i in range(count)]
        return shuffled(rows, seed, "tool_calls", split)

    def warm_rows(self, seed: int) -> list[Row]:
        rng = random.Random(derive(seed, "tool_calls", "warm"))
        rows = [self._row(f"warm-{i}", i % TOOLS, rng, noisy=True) for i in range(self.train_rows)]
        return shuffled(rows, seed, "tool_calls", "warm")

    def _row(self, name: str, tool: int, rng: random.Random, noisy: bool) -> Row:
        wish = WISHES[tool + TOOLS * rng.randrange(len(WISHES) // TOOLS)]
        numbers = [rng.randrange(10) for _ in KEYS]
        facts = right_facts(tool, numbers)
        tier = "held_out" if tool >= TOOLS - self.held_out else self.tiers[len(facts) - 1]
        demo = self._demo(tool, facts, rng) if noisy else None
        prompt = f"{wish}{''.join(map(str, numbers))}?"
        return Row(name, prompt, written(tool, facts, facts), tier, demo, meta={"tool": f"t{tool}", "facts": facts})

    def _demo(self, tool: int, facts: dict[str, int], rng: random.Random) -> str:
        if rng.random() < self.tool_noise:
            tool = rng.choice([t for t in range(TOOLS) if t != tool and arguments(t) == arguments(tool)])
        said = {key: (value + (rng.random() < self.fact_noise)) % 10 for key, value in facts.items()}
        called = {key: (value + (rng.random() < self.slip)) % 10 for key, value in said.items()}
        fillers = 0
        while fillers < 4 and rng.random() < self.filler:
            fillers += 1
        return written(tool, said, called, fillers)

    # ---- scores
    def score(self, text: str, row: Row) -> float:
        """1 for the right call in the right format."""
        return float(outcome_reward(text, row.answer).norm >= 1 - 1e-9)

    def metrics(self, text: str, row: Row) -> dict[str, float]:
        """format, names, keys, values: of the call. reasoning: the right facts among those due, or among all that the
        thinking says where that is more. hackable: the right facts among those due, and `bonus` for each empty word, at
        most 1: a judge with a weakness. fillers: the empty words."""
        out = outcome_reward(text, row.answer)
        right, said, fillers = self._facts(text, row)
        due = 1 + len(row.meta["facts"])
        return {
            "format": out.fmt,
            "names": out.names,
            "keys": out.keys,
            "values": out.values,
            "reasoning": right / max(due, said),
            "hackable": min(1.0, right / due + self.bonus * fillers),
            "fillers": float(fillers),
        }

    def _facts(self, text: str, row: Row) -> tuple[int, int, int]:
        """(different right facts, all items, empty words) of the thinking."""
        thought = text.removeprefix("<think>").partition("</think>")[0]
        items = list(FACT.finditer(thought))
        right = {
            item["tool"] or item["key"]
            for item in items
            if item["tool"] == row.meta["tool"] or str(row.meta["facts"].get(item["key"])) == item["value"]
        }
        return len(right - {None}), len(items), thought.count(FILLER)


def arguments(tool: int) -> int:
    """How many arguments a tool takes."""
    return 1 + tool % len(KEYS)


def right_facts(tool: int, numbers: list[int]) -> dict[str, int]:
    """The arguments of a tool's call: each number shifted by an amount of the tool and the place."""
    shifts = [(3 * tool + 2 * place + tool * place) % 10 for place in range(len(KEYS))]
    return {KEYS[k]: (numbers[k] + shifts[k]) % 10 for k in range(arguments(tool))}


def written(tool: int, said: dict[str, int], called: dict[str, int], fillers: int = 0) -> str:
    """A completion whose thinking says some facts and whose call has some arguments."""
    facts = "".join(f" {key}={value}" for key, value in said.items())
    values = ", ".join(f'"{key}": {value}' for key, value in called.items())
    return f'<think>use t{tool}{facts}{FILLER * fillers}{CALL}t{tool}", "parameters": {{{values}{END}'
