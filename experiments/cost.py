"""What a run needs before it is started: memory of a device, tokens and seconds of a step. docs/scale.md explains it.

    python -m experiments.cost                                   # the papers' recipes on eight H100
    python -m experiments.cost ha_dw_paper --machine a100 --processes 4 --scale zero3 --written 1500

A model of the first order: data-sheet figures times two shares that are reached in practice. It says whether a setting
fits and which part of a step is long; it does not replace a measured step. `python -m experiments.bench_cost` holds it
against real steps on this machine.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

from methods.errors import AssayError, ConfigError, nearest

GB = 1e9


@dataclass(frozen=True)
class Shape:
    """A decoder with gated feed-forward and grouped-query attention. Biases and q/k norms, below .1 %, are left out."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocab: int
    tied: bool = True

    @classmethod
    def of(cls, config: Any) -> Shape:
        """From a transformers configuration."""
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        sizes = (config.num_hidden_layers, config.hidden_size, heads, config.num_key_value_heads, head_dim)
        return cls(*sizes, config.intermediate_size, config.vocab_size, config.tie_word_embeddings)

    @property
    def layer_weights(self) -> int:
        """N_l = 2 d h_q d_h + 2 d h_kv d_h + 3 d d_ff + 2 d: four attention projections, three of the gate, norms."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.feed_forward + 2 * self.hidden

    @property
    def weights(self) -> int:
        """N, tied embeddings once."""
        return self.layers * self.layer_weights + self.hidden + self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def multiplied(self) -> int:
        """Weights that a token is multiplied with: looking up its embedding costs nothing, the head does."""
        return self.layers * self.layer_weights + self.vocab * self.hidden

    def cache(self, width: int = 2) -> int:
        """Bytes that a token keeps in the key-value cache: 2 L h_kv d_h numbers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * width

    def forward(self, tokens: float, context: float) -> float:
        """FLOPs of `tokens` that see `context` earlier ones each: 2 N + 4 L h_q d_h context (arXiv 2001.08361, 2.1)."""
        return tokens * (2 * self.multiplied + 4 * self.layers * self.heads * self.head_dim * context)


SHAPES = {  # the models' own config.json on the hub
    "Qwen3-0.6B": Shape(28, 1024, 16, 8, 128, 3072, 151936),
    "Qwen3-1.7B": Shape(28, 2048, 16, 8, 128, 6144, 151936),
    "Qwen3-4B": Shape(36, 2560, 32, 8, 128, 9728, 151936),
    "Qwen3-VL-4B": Shape(36, 2560, 32, 8, 128, 9728, 151936),  # without the vision tower
    "Qwen3-8B": Shape(36, 4096, 32, 8, 128, 12288, 151936, tied=False),
    "Qwen2.5-1.5B": Shape(28, 1536, 12, 2, 128, 8960, 151936),
    "Qwen2.5-3B": Shape(36, 2048, 16, 2, 128, 11008, 151936),
    "Qwen2.5-Math-7B": Shape(28, 3584, 28, 4, 128, 18944, 152064, tied=False),
    "DeepSeek-R1-Distill-Qwen-1.5B": Shape(28, 1536, 12, 2, 128, 8960, 151936, tied=False),
    "Llama-3.2-3B": Shape(28, 3072, 24, 8, 128, 8192, 128256),
}


@dataclass(frozen=True)
class Machine:
    """One device. `computes`, `reads`: the shares of `flops` and `bandwidth` that training and decoding reach;
    `overhead`: seconds that a decoding step costs beside the device's own work."""

    flops: float
    bandwidth: float
    memory: float
    computes: float = 0.4
    reads: float = 0.6
    overhead: float = 0.005


MACHINES = {  # NVIDIA's data sheets, SXM: dense bf16 FLOP/s, bytes/s, bytes
    "a100": Machine(312e12, 2.039e12, 80 * GB),
    "h100": Machine(989e12, 3.35e12, 80 * GB),
    "h200": Machine(989e12, 4.8e12, 141 * GB),
}


@dataclass(frozen=True)
class Job:
    """What one generation and the steps on it ask for; `width` is the bytes of a weight, lengths are means."""

    rows: int
    prompt: float
    written: float
    rows_per_device: int
    updates: int = 1
    iterations: int = 1
    processes: int = 1
    sharding: str = "none"  # none | zero2 | zero3 | fsdp2
    checkpointing: bool = True
    old_logps: bool = False
    reference: bool = False
    critic: bool = False
    trained: float = 1.0  # share of the weights; LoRA trains about a hundredth
    width: int = 2

    @property
    def length(self) -> float:
        return self.prompt + self.written


def memory(shape: Shape, job: Job) -> dict[str, float]:
    """Bytes on one device by what they are for.

    States per weight: width (weights) + width (gradients) + 2 width (Adam's moments) for torch's AdamW on weights of
    that width; 2 + 2 + 12 for DeepSpeed's bf16 (arXiv 1910.02054, 3.1), 4 + 4 + 8 for accelerate's FSDP2, which keeps
    float32. ZeRO 2 divides gradients and optimiser by the processes, ZeRO 3 and FSDP2 the weights too (figure 1
    there); while rollouts are drawn these hold all weights once more. Activations: 17 d numbers per token and layer
    (34 bytes in 16 bits, without the attention matrix: arXiv 2205.05198, equation 2), with checkpointing d numbers per
    layer and one layer's 17 d. The fused head keeps no logits.
    """
    n, parts = shape.weights, job.processes if job.sharding != "none" else 1
    states = {
        "none": (job.width, job.width, 2 * job.width),
        "zero2": (2, 2, 12),
        "zero3": (2, 2, 12),
        "fsdp2": (4, 4, 8),
    }
    weights, gradients, optimiser = states[job.sharding]
    whole = job.sharding in ("zero3", "fsdp2")
    layers = 1 if job.checkpointing else shape.layers
    kept = 17 * layers + (shape.layers if job.checkpointing else 0)
    tokens = job.rows_per_device * job.length
    return {
        "weights": n * weights / (parts if whole else 1),
        "gradients": n * gradients * job.trained / parts,
        "optimiser": n * optimiser * job.trained / parts,
        "reference": n * job.width / (parts if whole else 1) if job.reference else 0.0,
        "critic": 16.0 * n if job.critic else 0.0,
        "activations": tokens * shape.hidden * kept * job.width,
        "whole weights": 2.0 * n if whole else 0.0,
        "cache": job.rows / job.processes * job.length * shape.cache(job.width),
    }


def phases(parts: dict[str, float]) -> tuple[float, float]:
    """Bytes while training, and while generating without the cache."""
    lasting = sum(v for k, v in parts.items() if k not in ("activations", "whole weights", "cache"))
    return lasting + parts["activations"], lasting + parts["whole weights"]


def generation_seconds(shape: Shape, job: Job, machine: Machine) -> float:
    """Seconds of one generation.

    Prompts: FLOPs / (flops x computes). Each decoding step reads the weights and the cache of its rows once (arXiv
    2211.05102, 2.1): the larger of bytes / (bandwidth x reads) and FLOPs / (flops x computes), plus the overhead. Rows
    that the cache has no room for wait for the next wave.
    """
    rows = job.rows / job.processes
    room = machine.memory - phases(memory(shape, job))[1]
    fit = max(min(rows, room // (job.length * shape.cache(job.width))), 1.0)
    waves = math.ceil(rows / fit)
    live, context = rows / waves, job.prompt + job.written / 2
    read = shape.multiplied * job.width + live * context * shape.cache(job.width)
    step = max(
        read / (machine.bandwidth * machine.reads), shape.forward(live, context) / (machine.flops * machine.computes)
    )
    prompts = shape.forward(rows * job.prompt, job.prompt / 2) / (machine.flops * machine.computes)
    return prompts + waves * job.written * (step + machine.overhead)


def training_seconds(shape: Shape, job: Job, machine: Machine) -> float:
    """Seconds of all updates on one generation: a backward is two forwards, checkpointing adds one (arXiv 2205.05198);
    old and reference log-probs are a forward each, the critic costs what the policy does and a forward more."""
    passes = job.iterations * (4 if job.checkpointing else 3)
    passes += job.old_logps + job.reference + (passes + 1 if job.critic else 0)
    tokens = job.rows / job.processes * job.length
    return passes * shape.forward(tokens, job.length / 2) / (machine.flops * machine.computes)


# ---------------------------------------------------------------- recipes


def shape_of(name: str) -> Shape:
    """The shape of a hub id. ConfigError for a model that is not in the table."""
    known = [k for k in SHAPES if k.lower() in name.lower()]
    if not known:
        raise ConfigError("no shape is known of this model", where="model", got=name, expected=", ".join(SHAPES))
    return SHAPES[max(known, key=len)]


def job_of(cfg: Any, written: float | None, prompt: float, processes: int, sharding: str) -> Job:
    """The job of a training configuration; without `written` every completion fills its limit."""
    from hydra.utils import instantiate

    t, objective = cfg.trainer, instantiate(cfg.objective)
    rows = t.prompts_per_step * t.rollouts_per_prompt * t.updates_per_generation
    limit = t.max_completion_tokens or 1024
    return Job(
        rows=rows,
        prompt=prompt,
        written=min(written or limit, limit),
        rows_per_device=t.rows_per_device or rows // processes,
        updates=t.updates_per_generation,
        iterations=t.iterations,
        processes=processes,
        sharding="none" if objective.name == "ppo" else sharding,  # its critic is not sharded
        checkpointing=bool(cfg.scale.gradient_checkpointing),
        old_logps=t.updates_per_generation * t.iterations > 1,
        reference=bool(objective.beta),
        critic=objective.name == "ppo",
        trained=0.01 if cfg.model.get("lora") else 1.0,
        width=4 if cfg.model.get("dtype", "float32") == "float32" else 2,
    )


def line(name: str, shape: Shape, job: Job, machine: Machine) -> str:
    """One row of the table: per device and per optimiser step."""
    parts, steps = memory(shape, job), job.updates * job.iterations
    make, learn = (f(shape, job, machine) / steps for f in (generation_seconds, training_seconds))
    training, generating = phases(parts)
    room = 0.9 * machine.memory
    verdict = (
        "too large" if training > room else "fits" if generating + parts["cache"] < room else "cache in waves: vLLM"
    )
    tokens, device = job.rows * job.length / steps / 1e6, max(training, generating) / GB
    columns = f"{shape.weights / 1e9:5.2f} {tokens:7.2f} {device:8.1f} {parts['cache'] / GB:9.0f}"
    return f"{name:<22} {columns} {make:9.1f} {learn:8.1f}  {verdict}"


HEAD = (
    f"{'recipe':<22} {'B':>5} {'Mtok':>7} {'device':>8} {'cache':>9} {'generate':>9} {'train':>8}\n"
    f"{'':<22} {'':>5} {'/step':>7} {'GB':>8} {'GB':>9} {'s/step':>9} {'s/step':>8}"
)


def recipe(name: str) -> Any:
    """The configuration of the first arm of a training experiment; None for another subcommand. ConfigError if there
    is no such experiment."""
    import yaml
    from hydra import compose, initialize_config_dir

    from experiments.bench import CONF

    files = {file.stem: file for file in (CONF / "experiment").glob("*.yaml")}
    if name not in files:
        fix = nearest(name, files) or "assay ls experiments"
        raise ConfigError(f"there is no experiment '{name}'", where=str(CONF / "experiment"), fix=fix)
    spec = yaml.safe_load(files[name].read_text())
    if spec["command"] != "train":
        return None
    with initialize_config_dir(str(CONF), version_base=None):
        return compose("train", [*spec.get("common", []), *next(iter(spec["arms"].values()))])


def table(names: list[str], machine: str, processes: int, sharding: str, written: float | None, prompt: float) -> str:
    """One line per recipe; without names, all of the papers'."""
    from experiments.bench import CONF

    lines = [HEAD]
    for name in names or sorted(file.stem for file in (CONF / "experiment").glob("*_paper.yaml")):
        cfg = recipe(name)
        if cfg is None or cfg.objective.get("trainer") == "sft":
            lines.append(f"{name:<22} is no reinforcement learning")
            continue
        job = job_of(cfg, written, prompt, processes, sharding)
        lines.append(line(name, shape_of(str(cfg.model.get("path", cfg.model.name))), job, MACHINES[machine]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.cost", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("recipes", nargs="*", help="experiments of conf/experiment; default: the papers'")
    parser.add_argument("--machine", choices=MACHINES, default="h100")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--scale", choices=("none", "zero2", "zero3", "fsdp2"), default="fsdp2")
    parser.add_argument("--written", type=float, help="mean tokens of a completion; default: its limit")
    parser.add_argument("--prompt", type=float, default=512, help="mean tokens of a prompt")
    args = parser.parse_args()
    try:
        if args.processes < 1 or args.prompt < 1 or (args.written is not None and args.written < 1):
            raise ConfigError("processes and tokens are counted", expected="1 or more")
        print(f"{args.processes} x {args.machine}, scale {args.scale}, prompts of {args.prompt:g} tokens")
        print(table(args.recipes, args.machine, args.processes, args.scale, args.written, args.prompt))
    except AssayError as error:
        parser.exit(error.exit_code, f"assay: error: {error}\n")


if __name__ == "__main__":
    main()
