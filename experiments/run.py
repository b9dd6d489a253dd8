"""One training run, from a composed configuration to a finished record."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments import batching, checkpoints, generation, launching, tracking
from experiments.files import os_errors
from experiments.recording import Bystander, already_done, make_room, note_failure, only_writer, open_record, run_folder
from experiments.records import RunWriter
from experiments.seeds import derive
from experiments.team import ALONE, Team
from experiments.tokenizers import plain_text
from methods.errors import AssayError, ConfigError, DataError, RunError, nearest, raised_at

INF = float("inf")
# key, least, most; what is None follows a default
BOUNDS = (
    ("trainer.max_steps", 1, INF),
    ("trainer.prompts_per_step", 1, INF),
    ("objective.max_length", 1, INF),
    ("trainer.learning_rate", 0.0, INF),
    ("trainer.warmup_steps", 0, INF),
    ("trainer.weight_decay", 0.0, INF),
    ("trainer.temperature", 1e-3, INF),
    ("trainer.top_p", 1e-3, 1.0),
    ("trainer.max_completion_tokens", 1, INF),
    ("trainer.save_every", 0, INF),
    ("eval.every", 0, INF),
    ("eval.items", 0, INF),
    ("eval.samples", 1, INF),
    ("eval.batch_size", 1, INF),
    ("eval.kl_probe", 0, INF),
    ("eval.temperature", 0.0, INF),
    ("eval.top_p", 1e-3, 1.0),
)
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


@dataclass
class PromptWrapper:
    """A row's prompt as the trainer tokenises it: messages for a chat model, plain text otherwise."""

    chat: bool

    def __call__(self, prompt: Any) -> Any:
        if self.chat:
            return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = plain_text(prompt)
        if text is not None:
            return text
        raise ConfigError(
            "the task gives chat messages and the model has no chat template",
            where="model",
            fix="choose a chat model, or model.chat=true for model=tiny",
        )


# ---------------------------------------------------------------- checking, before anything starts


def build_stack(cfg: DictConfig):
    """The stack of `cfg.method` over `cfg.objective`. ConfigError for a refused combination."""
    from experiments.engines.build import instantiate
    from methods.base import Method
    from methods.stack import Stack

    methods = [instantiate(node) for node in (cfg.method or {}).values()]
    for node, method in zip((cfg.method or {}).values(), methods, strict=True):
        if not isinstance(method, Method):
            target, expected = str(node._target_), "a subclass of methods.base.Method"
            raise ConfigError("_target_ is no method", where=target, got=type(method).__name__, expected=expected)
    return Stack(methods, instantiate(cfg.objective))


def is_supervised(cfg: DictConfig) -> bool:
    return cfg.objective.get("trainer", "grpo") in ("sft", "reward")


def check(cfg: DictConfig) -> None:
    """Everything that can be refused without loading a model; the command line calls it for every run of a sweep."""
    tracking.check(cfg.record.report_to)
    if is_supervised(cfg):
        if cfg.method:
            what = f"methods hook into RL; objective.trainer={cfg.objective.trainer} has none"
            raise ConfigError(what, where="method", got=list(cfg.method), fix="method=[]")
        check_bounds(cfg)
        batching.log_every(cfg, period=1)
        launching.processes(cfg.scale)
        return
    batches = batching.plan(cfg.trainer, launching.processes(cfg.scale))
    batching.log_every(cfg, batches.period)
    launching.check(cfg)
    check_bounds(cfg)
    stack = build_stack(cfg)
    generation.check(cfg.get("generation"), stack)
    if stack.owner("rollout") is None:
        check_episodes(cfg)
    if batches.group_size == 2 and any(m.name == "ha_dw" for m in stack.methods):
        print("note: with two rollouts per prompt HA-DW cannot tell difficulty apart; use 4 or more", file=sys.stderr)


def check_bounds(cfg: DictConfig) -> None:
    """ConfigError for a setting beyond its range, and for an unknown schedule."""
    for key, low, high in BOUNDS:
        value = OmegaConf.select(cfg, key)
        if value is not None and not low <= value <= high:
            bounds = f"at least {low:g}" if high == float("inf") else f"from {low:g} to {high:g}"
            raise ConfigError("a setting is out of range", where=key, got=value, expected=bounds)
    if cfg.trainer.lr_schedule not in SCHEDULES:
        raise ConfigError(
            "unknown learning-rate schedule",
            where="trainer.lr_schedule",
            got=cfg.trainer.lr_schedule,
            expected=", ".join(SCHEDULES),
            fix=nearest(str(cfg.trainer.lr_schedule), SCHEDULES),
        )


def check_episodes(cfg: DictConfig) -> None:
    """For a run in which no method runs episodes: ConfigError if the task's cannot run without one."""
    from hydra.utils import get_class

    wanted = getattr(get_class(cfg.task._target_), "episodes_by", "")
    if wanted:
        raise ConfigError(
            f"a method runs the episodes of {cfg.task.name}, and this stack has none that does",
            where="method",
            got=", ".join(cfg.method) or "an empty stack",
            fix=f"add method=[{wanted}]",
        )


# ---------------------------------------------------------------- the run


def run(cfg: DictConfig) -> Path:
    """Trains, evaluates and records one run; returns its folder.

    A finished run of the same configuration is returned as it is, an unfinished one goes on from its last
    checkpoint. RecordError if the folder holds another configuration; KeyboardInterrupt(signal) after a stop.
    """
    path = run_folder(cfg)
    if already_done(path, cfg):
        print(f"{path}: finished earlier, skipped", file=sys.stderr)
        return path
    check(cfg)
    launching.check_machine(cfg.scale)
    if launching.processes(cfg.scale) == launching.started():
        take_part(cfg)
        return path
    try:
        launching.start(cfg)
    except AssayError as error:
        note_failure(path, error)
        raise
    return path


def take_part(cfg: DictConfig) -> None:
    """The run in this process, which is one of several if a launcher started it; the first one keeps the record."""
    path = run_folder(cfg)
    if not launching.is_main():
        _recorded(Bystander(path), cfg)
        return
    with only_writer(path, patience=5.0 if launching.started() > 1 else 0.0):
        make_room(path, cfg)
        limits = {"max_samples": cfg.record.max_samples, "samples_per_step": cfg.record.samples_per_step}
        _recorded(open_record(path, cfg, "train", **limits), cfg)


def _recorded(writer: RunWriter, cfg: DictConfig) -> None:
    path = writer.path
    try:
        with os_errors(path):
            _train(cfg, writer)
    except KeyboardInterrupt:
        writer.fail("interrupted", "stopped by a signal")
        raise
    except AssayError as error:
        writer.fail("failed", str(error))
        raise
    except Exception as error:
        writer.fail("failed", f"{type(error).__name__}: {error}")
        raise RunError(
            f"{launching.UNEXPECTED} {type(error).__name__}",
            where=str(path),
            got=f"{' '.join(str(error).split())} ({raised_at(error)})",
            fix="--debug shows the traceback; the same line again goes on from the last checkpoint",
        ) from error


def _train(cfg: DictConfig, writer: RunWriter) -> None:
    from experiments.engines.build import instantiate
    from experiments.signals import StopSignals

    quiet()
    task = instantiate(cfg.task)
    loaded = instantiate(cfg.model).load(task, cfg.seed, results_dir=cfg.results_dir)
    threads_for(loaded)
    team = Team.meet(launching.processes(cfg.scale), use_cpu=device_arguments(cfg.scale)["use_cpu"])
    rows = task.rows("train", cfg.seed)
    with StopSignals() as stop:
        if is_supervised(cfg):
            from experiments.supervised import train

            train(cfg, writer, task, loaded, rows, stop, team)
        else:
            _train_rl(cfg, writer, task, loaded, rows, stop, team)


def quiet() -> None:
    """Keeps what libraries say to their own developers out of the user's log."""
    import warnings

    from transformers.utils import logging

    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.disable_progress_bar()


def threads_for(loaded) -> None:
    """One thread for models under 2 M weights on a CPU: more are slower, and two runs fit side by side."""
    import torch

    if loaded.parameters < 2_000_000 and not torch.cuda.is_available():
        torch.set_num_threads(1)


def _train_rl(cfg: DictConfig, writer: RunWriter, task, loaded, rows, stop, team: Team) -> None:
    from transformers import PrinterCallback

    from experiments import hooked, measure, rewards
    from experiments.engines.build import instantiate
    from experiments.progress import progress_of
    from experiments.recorder import Recorder

    batches = batching.plan(cfg.trainer, team.size)
    if len(rows) < batches.prompts_per_generation:
        raise DataError(
            "the task has too few training rows",
            where="task",
            got=f"{len(rows)} rows",
            expected=f"at least {batches.prompts_per_generation}, the prompts of one generation",
            fix="lower trainer.prompts_per_step or give more rows",
        )
    specs = rewards.build(cfg.reward, task)
    trainer = build_trainer(cfg, batches, task, loaded, rows, specs, writer.path / "checkpoints", team)
    if cfg.get("judge"):
        trainer.services.judge_engine = instantiate(cfg.judge)
    trainer.remove_callback(PrinterCallback)
    meter = measure.of_trainer(trainer, cfg, writer.path)
    with progress_of(writer.path, str(batches), shown=team.is_main) as progress:
        recorder = Recorder(
            writer,
            state=trainer.state_dict,
            evaluate=meter,
            boundary=batching.log_every(cfg, batches.period),
            eval_every=cfg.eval.every,
            keep=cfg.trainer.keep_checkpoints,
            stop=stop,
            progress=progress,
            team=team,
        )
        trainer.attach(recorder, writer.sample, cfg.record.samples_per_step)
        for callback in tracking.callbacks(cfg, writer.path) if team.is_main else ():
            trainer.add_callback(callback)
        trainer.stack.inherit(hooked.saved_states(cfg))
        resume = resume_from(writer, recorder, trainer.load_state_dict)
        trainer.begun_at = recorder.step
        meter.prepare()
        if recorder.step < cfg.trainer.max_steps:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        else:  # killed between the last checkpoint and the summary: nothing is left to train
            trainer._load_from_checkpoint(str(resume))
    if stop.received is not None and recorder.step < cfg.trainer.max_steps:
        raise KeyboardInterrupt(stop.received)
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = trainer.full_weights()
    if team.is_main:
        finish(writer, loaded, model, recorder, trainer.state_dict(), trainer.cost, weights)


def resume_from(writer: RunWriter, recorder, load_state) -> Path | None:
    """The checkpoint to go on from (state loaded, record cut back to it), or None for a start from the beginning."""
    folder = writer.path / "checkpoints"
    checkpoint = recorder.team.from_main(lambda: checkpoints.latest(folder))
    step = checkpoints.step_of(checkpoint) if checkpoint else 0
    if checkpoint:
        state = checkpoints.read_state(checkpoint)
        checkpoints.refuse_other_team(checkpoint, state, recorder.team.size)
        load_state(state["trainer"])
        recorder.load(step, state)
        if recorder.team.is_main:
            print(f"going on from step {step}", file=sys.stderr)
        writer.cut(step)
    else:
        writer.cut(-1)
    return checkpoint


def finish(writer: RunWriter, loaded, model, recorder, state: dict, cost: dict, weights: dict | None = None) -> None:
    """Exports the model with its methods' state, writes the summary, drops the checkpoints unless several are kept.

    weights: the full state dict of a model whose own is sharded.
    """
    from experiments.weights import export

    folder = export(model, loaded.processor or loaded.tokenizer, writer.path / "model", weights)
    checkpoints.write_state(folder, {"trainer": state, "seconds": recorder.total_seconds})
    last = {k: v for k, v in recorder.last_logs.items() if isinstance(v, (int, float))}
    writer.update(step=recorder.step)
    writer.finish(last, {**cost, "seconds": recorder.total_seconds, "warm_start_tokens": loaded.trained_tokens})
    if recorder.keep == 1:  # it served only to go on from
        shutil.rmtree(writer.path / "checkpoints", ignore_errors=True)


def build_trainer(
    cfg: DictConfig, batches: batching.BatchPlan, task, loaded, rows, reward_specs, folder: Path, team: Team = ALONE
):
    """The trainer of one run; `folder` takes its checkpoints."""
    from transformers import set_seed
    from trl.trainer.grpo_config import GRPOConfig

    from experiments.trainer import AssayTrainer

    t = cfg.trainer
    stack = build_stack(cfg)
    seed = derive(cfg.seed, "train") % 2**31
    set_seed(seed)
    args = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=batches.rows_per_device,
        gradient_accumulation_steps=batches.accumulation,
        steps_per_generation=batches.slices,
        num_generations=batches.group_size,
        num_iterations=batches.iterations,
        max_completion_length=t.max_completion_tokens or task.max_completion_tokens,
        max_steps=t.max_steps,
        learning_rate=0.0 if stack.objective.frozen else t.learning_rate,  # else weight decay would move it
        lr_scheduler_type=SCHEDULES[t.lr_schedule],
        warmup_steps=t.warmup_steps,
        weight_decay=t.weight_decay,
        adam_beta2=t.adam_beta2,
        max_grad_norm=t.max_grad_norm,
        temperature=t.temperature,
        top_p=t.top_p,
        beta=stack.objective.beta,
        scale_rewards=stack.objective.scale_rewards,
        loss_type="grpo",  # unused: the objective computes the loss; TRL warns about odd pairs of its own
        logging_steps=batching.log_every(cfg, batches.period),
        logging_nan_inf_filter=False,  # it would show a NaN as the mean of the losses before it
        save_strategy="steps",
        save_steps=t.save_every or t.max_steps,
        report_to="none",  # trackers are called behind the recorder
        run_name=tracking.run_name(cfg),
        project="assay",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=seed,
        ddp_find_unused_parameters=hasattr(loaded.model.config, "num_experts"),
        **generation.arguments(cfg.get("generation"), task),
        **device_arguments(cfg.scale),
    )
    return AssayTrainer(
        stack=stack,
        rows=rows,
        rewards=reward_specs,
        task=task,
        wrap_prompt=PromptWrapper(loaded.chat),
        seed=cfg.seed,
        args=args,
        team=team,
        model=loaded.model,
        processing_class=loaded.processor or loaded.tokenizer,
    )


def device_arguments(scale: DictConfig) -> dict[str, Any]:
    """use_cpu, bf16, gradient_checkpointing (and Liger) of TrainingArguments from the scale group."""
    import torch

    has_gpu = torch.cuda.is_available()
    if scale.device == "gpu" and not has_gpu:
        raise ConfigError("there is no GPU here", where="scale.device", got="gpu", fix="scale=cpu or scale=auto")
    gpu = has_gpu if scale.device == "auto" else scale.device == "gpu"
    bf16 = gpu if scale.bf16 == "auto" else bool(scale.bf16)
    made = {"use_cpu": not gpu, "bf16": bf16, "gradient_checkpointing": scale.gradient_checkpointing}
    return made | ({"use_liger_kernel": True} if scale.get("liger") else {})
