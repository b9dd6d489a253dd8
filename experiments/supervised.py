"""objective=sft: a supervised run with the same record, resume and report as a reinforcement-learning run."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from experiments import batching
from experiments.records import RunWriter
from experiments.seeds import derive


def settings(cfg: DictConfig):
    """SFTSettings from the trainer's words: a step trains on prompts_per_step demonstrations."""
    from experiments.run import device_arguments
    from experiments.sft import SFTSettings

    t = cfg.trainer
    return SFTSettings(
        steps=t.max_steps,
        batch_size=t.prompts_per_step,
        rows_per_device=t.rows_per_device,
        learning_rate=t.learning_rate,
        schedule=t.lr_schedule,
        warmup_steps=t.warmup_steps,
        max_length=cfg.objective.max_length,
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        logging_steps=t.log_every or 1,
        save_steps=t.save_every or t.max_steps,
        **device_arguments(cfg.scale),
    )


def train(cfg: DictConfig, writer: RunWriter, task: Any, loaded: Any, rows: list, stop) -> None:
    """Fine-tunes on `Row.demo` (or chat messages) and records the run; resumable at every saved step."""
    from experiments import run as running
    from experiments.progress import Progress
    from experiments.recorder import Recorder
    from experiments.sft import train_sft

    sft = settings(cfg)
    measure = _Measure(cfg, task, loaded, writer.path)
    with Progress(writer.path, f"one step = {sft.batch_size} demonstrations") as progress:
        recorder = Recorder(
            writer,
            state=dict,
            evaluate=measure,
            boundary=sft.logging_steps,
            eval_every=cfg.eval.every,
            keep=cfg.trainer.keep_checkpoints,
            stop=stop,
            progress=progress,
        )
        resume = running.resume_from(writer, recorder, lambda state: None)
        measure.prepare()
        seed = derive(cfg.seed, "train")
        folder = writer.path / "checkpoints"
        result = train_sft(
            loaded, rows, sft, output_dir=folder, seed=seed, callbacks=[recorder], progress=False, resume=resume
        )
    if stop.received is not None and result["steps"] < cfg.trainer.max_steps:
        raise KeyboardInterrupt(stop.received)
    cost = {k: result[k] for k in ("trained_tokens", "forwarded_tokens")} | {"generated_tokens": 0, "judge_calls": 0}
    running.finish(writer, loaded, loaded.model, recorder, {}, cost)


class _Measure:
    """Evaluation points of a supervised run: the engine over the live model, no hooks."""

    def __init__(self, cfg: DictConfig, task: Any, loaded: Any, folder) -> None:
        from experiments.engines.transformers import TransformersEngine
        from experiments.probe import Probe

        self.cfg, self.task, self.loaded = cfg, task, loaded
        e = cfg.eval
        self.engine = TransformersEngine(loaded.model, loaded.tokenizer, chat=loaded.chat, batch_size=e.batch_size)
        self.rows = task.rows(e.split, e.seed)[: e["items"]]
        pad = loaded.tokenizer.pad_token_id
        self.probe = Probe(loaded.model, self.engine, pad, folder / "probe.safetensors") if e.kl_probe else None

    @property
    def budget(self) -> int:
        return self.cfg.trainer.max_completion_tokens or self.task.max_completion_tokens

    def prepare(self) -> None:
        if self.probe is not None and self.rows:
            prompts = [self._ids(row.prompt) for row in self.rows[: self.cfg.eval.kl_probe]]
            self.probe.prepare(prompts, self.budget, derive(self.cfg.seed, "probe"))

    def _ids(self, prompt: Any) -> list[int]:
        tokenizer = self.loaded.tokenizer
        if not self.loaded.chat:
            return tokenizer(prompt)["input_ids"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]

    def __call__(self, step: int):
        from experiments.evaluate import evaluate

        e = self.cfg.eval
        frame = evaluate(
            self.engine,
            self.task,
            self.rows,
            samples=e.samples,
            temperature=e.temperature,
            top_p=e.top_p,
            max_tokens=self.budget,
            seed=derive(self.cfg.seed, "eval", step),
            split=e.split,
        )
        extra = {"eval/score": float(frame["score"].mean())}
        if self.probe is not None:
            extra["kl/start"] = self.probe.kl()
        return frame, extra
