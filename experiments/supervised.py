"""objective=sft and reward_model: supervised runs with the record, resume and report of any other run."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from experiments.records import RunWriter
from experiments.seeds import derive
from experiments.team import Team


def settings(cfg: DictConfig):
    """SFTSettings from the trainer's words: a step trains on prompts_per_step demonstrations or pairs."""
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


def train(cfg: DictConfig, writer: RunWriter, task: Any, loaded: Any, rows: list, stop, team: Team) -> None:
    """Fine-tunes on the rows' demonstrations or pairs and records the run; resumable at every saved step."""
    from experiments import run as running
    from experiments import tracking
    from experiments.progress import progress_of
    from experiments.recorder import Recorder
    from experiments.weights import load_weights

    stage, what = (_reward, "pairs") if cfg.objective.trainer == "reward" else (_sft, "demonstrations")
    sft, (loaded, fit, measure) = settings(cfg), stage(cfg, task, loaded, rows, writer.path, team)
    with progress_of(writer.path, f"one step = {sft.batch_size} {what}", shown=team.is_main) as progress:
        recorder = Recorder(
            writer,
            state=dict,
            evaluate=measure,
            boundary=sft.logging_steps,
            eval_every=cfg.eval.every,
            keep=cfg.trainer.keep_checkpoints,
            stop=stop,
            progress=progress,
            team=team,
        )
        resume = running.resume_from(writer, recorder, lambda state: None)
        measure.prepare()
        seed = derive(cfg.seed, "train")
        folder = writer.path / "checkpoints"
        if recorder.step < cfg.trainer.max_steps:
            callbacks = [recorder, *(tracking.callbacks(cfg, writer.path) if team.is_main else ())]
            more = {"resume": resume, "run_name": tracking.run_name(cfg)}
            fit(sft, output_dir=folder, seed=seed, callbacks=callbacks, **more)
        else:  # killed between the last checkpoint and the summary: nothing is left to train
            load_weights(loaded.model, str(resume))
    if stop.received is not None and recorder.step < cfg.trainer.max_steps:
        raise KeyboardInterrupt(stop.received)
    kinds = ("trained_tokens", "forwarded_tokens", "generated_tokens", "judge_calls")
    cost = {k: recorder.last_logs.get(f"cost/{k}", 0) for k in kinds}
    if team.is_main:
        running.finish(writer, loaded, loaded.model, recorder, {}, cost)


def _sft(cfg: DictConfig, task: Any, loaded: Any, rows: list, folder, team: Team) -> tuple[Any, Any, Any]:
    """(model, how to train it, how to measure it) of objective=sft."""
    from functools import partial

    from experiments.sft import train_sft

    shown = demonstrated(rows, cfg.objective.train_mistakes)
    return loaded, partial(train_sft, loaded, shown, progress=False), _measure(cfg, task, loaded, folder, team)


def _reward(cfg: DictConfig, task: Any, loaded: Any, rows: list, folder, team: Team) -> tuple[Any, Any, Any]:
    """(model, how to train it, how to measure it) of objective=reward_model."""
    from functools import partial

    from experiments.reward_model import Measure, classifier, train_reward_model

    scored = classifier(loaded, derive(cfg.seed, "head"))
    return scored, partial(train_reward_model, scored, rows), Measure(cfg, task, scored)


def demonstrated(rows: list, train_mistakes: bool = True) -> list:
    """One row per demonstration; rows without one are left out, unless no row has any (then encoding says so).

    A row with a whole dialogue in `meta["messages"]` may name messages with planted mistakes in `meta["mistakes"]`;
    with `train_mistakes` false these are context only.
    """
    from dataclasses import replace

    from methods.demonstrations import demonstrations

    found = []
    for row in rows:
        if "messages" in row.meta:
            found.append(row if train_mistakes else _without_mistakes(row))
        elif "segments" in row.meta:
            found.append(row)
        else:
            found += [replace(row, demo=text) for text in demonstrations(row)]
    return found or rows


def _without_mistakes(row: Any) -> Any:
    from dataclasses import replace

    planted = set(row.meta.get("mistakes", ()))
    messages = [m | {"train": False} if i in planted else m for i, m in enumerate(row.meta["messages"])]
    return replace(row, meta=row.meta | {"messages": messages})


def _measure(cfg: DictConfig, task: Any, loaded: Any, folder, team: Team):
    """The measure of a run on demonstrations: an empty stack over the live model."""
    from types import SimpleNamespace

    from experiments.engines.transformers import TransformersEngine
    from experiments.measure import Measure
    from experiments.services import Services
    from experiments.tokenizers import prompt_ids
    from methods.base import Context
    from methods.objectives.base import Objective
    from methods.stack import Stack

    engine = TransformersEngine(loaded.model, loaded.tokenizer, chat=loaded.chat)
    services = Services(engine, task, cfg.seed, SimpleNamespace(), loaded.tokenizer)
    services.team = team
    return Measure(
        cfg,
        task,
        model=loaded.model,
        engine=engine,
        encode=lambda prompt: prompt_ids(prompt, loaded),
        pad_id=loaded.tokenizer.pad_token_id,
        max_tokens=cfg.trainer.max_completion_tokens or task.max_completion_tokens,
        stack=Stack([], Objective()),
        context=lambda: Context("eval", 0, 0, 1, services=services),
        folder=folder,
        team=team,
    )
