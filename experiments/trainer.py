"""TRL's GRPOTrainer driven by an objective and a stack of methods; only this and `trl_tools` touch TRL's private names.

One generation: `prepare_rows -> rollout -> rewards` (repeated by dynamic sampling) `-> assemble -> token_rewards ->
base_advantages -> advantages -> select -> fill`, then TRL shuffles and slices. One micro-batch: forward,
`token_advantages -> clip_range -> loss -> extra_loss`. TRL keeps the loop, the generation back-ends, the fused
log-prob forward, the reference model, checkpoints and the data order. On several processes every one of them sees the
whole generation in its hooks and trains on its own rows (`experiments.team`).

Not carried over from TRL and therefore not offered: images in tool results, entropy bonus and entropy masks,
off-policy masks, MoE auxiliary loss.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from experiments import batching, collect, generation, resample, rollout, trl_tools, vision
from experiments.optim import add_modules
from experiments.recorder import AfterStep
from experiments.seeds import derive
from experiments.services import TrainingServices
from experiments.team import ALONE, Team, all_weights
from experiments.tokenizers import chat_ids, plain_ids, prefilled
from experiments.trl_check import require_trl
from methods.base import Batch, ConfigError, Context, LossContext, Trajectory, assemble
from methods.stack import Stack


def _unused_reward(*_, **__) -> list[float | None]:
    raise AssertionError("rewards are computed by the stack")


class AssayTrainer(GRPOTrainer):
    """GRPOTrainer whose generation, scoring and loss go through a Stack.

    rows: training rows; rewards: ordered RewardSpecs; task: for ctx.score and ctx.env; wrap_prompt: prompt for TRL;
    team: the processes of the run.
    kw: GRPOTrainer's own; `tools` and `environment_factory` run TRL's tool loop (see `experiments.trl_tools`).
    """

    args: Any  # TRL and transformers type these too widely to be used
    accelerator: Any
    processing_class: Any
    _tokenizer: Any
    num_generations: int
    max_completion_length: int

    team: Team

    def __init__(
        self, *, stack: Stack, rows, rewards, task, wrap_prompt, seed: int, args: GRPOConfig, team=ALONE, **kw
    ):
        require_trl()
        self.stack, self.rows, self.reward_specs, self.task = stack, rows, rewards, task
        self.wrap_prompt, self.team = wrap_prompt, team
        self.meter = collect.Meter()
        self.cost = collect.Cost()
        self._write_sample: Callable[[dict], Any] | None = None
        self.last_ctx: Context | None = None
        self.begun_at = 0  # the step that this sitting goes on from
        self.stream_position = 0  # prompts that dynamic sampling has drawn beside the data order
        dataset = Dataset.from_dict({"prompt": [""] * len(rows), "index": list(range(len(rows)))})
        super().__init__(args=args, train_dataset=dataset, reward_funcs=[_unused_reward], **kw)
        self.objective_modules = torch.nn.ModuleDict(
            stack.objective.modules(self.accelerator.unwrap_model(self.model))
        ).to(self.accelerator.device)
        self._hidden: Tensor | None = None
        self.services = TrainingServices(self, task, seed)
        if "hidden" in stack.needs:
            self.accelerator.unwrap_model(self.model).get_decoder().register_forward_hook(self._catch_hidden)

    def attach(self, recorder, write_sample, samples_per_step: int = 8) -> None:
        """Hangs the record on this trainer: the callback, and where samples go."""
        self._write_sample, self._samples_per_step = write_sample, samples_per_step
        self.add_callback(AfterStep(self))
        self.add_callback(recorder)

    # ---- one generation ----
    @property
    def period(self) -> int:
        """Optimiser steps that one generation serves; state is exact only at its multiples."""
        return max(1, self.args.steps_per_generation * self.num_iterations // self.args.gradient_accumulation_steps)

    def _get_train_sampler(self, dataset=None):
        return batching.caught_up(super()._get_train_sampler(dataset), self.begun_at // self.period)

    def new_context(self, mode: str) -> Context:
        step = self.state.global_step
        ctx = Context(
            mode=mode,
            step=step,
            round=step // self.period,
            group_size=self.num_generations,
            services=self.services,
            temperature=self.args.temperature,
            top_p=self.args.top_p,
        )
        for r in self.reward_specs:
            ctx.add_reward(r.name, r.role, r.weight)
        ctx.signal_fn = self.stack.signal
        return ctx

    def _generate_and_score_completions(self, inputs):
        started = time.perf_counter()
        ctx = self.new_context("train")
        with self.whole():
            output = self._generation([self.rows[k] for k in self.team.joined([i["index"] for i in inputs])], ctx)
        self.last_ctx = ctx
        self.meter["time/generation"].append(time.perf_counter() - started)
        return output

    def whole(self):
        """Inside, every process has all weights, so that processes may differ in how often they forward them."""
        return all_weights(self.model_wrapped, self)

    def full_weights(self) -> dict[str, Tensor] | None:
        """The model's whole state dict on the first process where weights are sharded; None where they are not."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return self.accelerator.get_state_dict(self.model_wrapped) if sharded else None

    def _generation(self, rows, ctx: Context) -> dict[str, Tensor]:
        self.draw(rows, ctx)
        if self.stack.objective.dynamic_sampling:
            resample.replace_dead_groups(self, ctx)
        else:
            ctx.rewards_all = {name: ctx.reward(name) for name in ctx.reward_names}
        batch = assemble(ctx.trajs, self._tokenizer.pad_token_id, self.accelerator.device)
        ctx.batch = batch
        self._forward_needs(batch)
        self.stack.token_rewards(ctx.trajs, ctx)
        batch.adv_ST = self.stack.advantages(ctx)
        selected = self.stack.select(batch, ctx)
        if self.team.size > 1:
            self.team.agree("the rollouts that they train on", collect.fingerprint(selected))
        self._log_generation(ctx, selected)
        return self._to_inputs(batch, selected)

    def draw(self, rows, ctx: Context, first_group: int = 0) -> None:
        """prepare_rows, rollout and rewards of one draw; fills ctx.rows and ctx.trajs. Rollouts are divided."""
        ctx.rows = self.stack.prepare_rows(rows, ctx)
        mine = self.team.part(len(rows), self.num_generations)
        ctx.first_group = self._first_group = first_group + mine.start // self.num_generations
        trajs = []
        if rows[mine]:
            with self.services.apart():
                trajs = self.stack.rollout(ctx.rows[mine], ctx, self.default_rollout)
        collect.score(trajs, self.reward_specs, step=ctx.step)
        ctx.trajs = self.team.trajectories(trajs, ctx.rows)
        collect.refuse_unscored(ctx.trajs, self.reward_specs, step=ctx.step)
        self.stack.rewards(ctx.trajs, ctx)

    def _tokenize_prompts(self, prompts):
        """TRL's own, but a chat that ends in the assistant's words (a prefill) goes on with them."""
        if not any(map(prefilled, prompts)):
            return super()._tokenize_prompts(prompts)
        return [chat_ids(p, self._tokenizer) for p in prompts], None, {}

    def tokenize(self, prompts) -> list[list[int]]:
        """Prompt ids as in training: chat template for a chat model, plain text otherwise."""
        prompts = [self.wrap_prompt(p) for p in prompts]
        if self.processing_class is self._tokenizer and all(isinstance(p, str) for p in prompts):
            return plain_ids(prompts, self._tokenizer)
        return self._tokenize_prompts(prompts)[0]

    def default_rollout(self, rows, slots: Sequence[int] | None = None) -> list[Trajectory]:
        """One generation per row; row i fills slot `slots[i]` (default i), slot j is sample j % G of group j // G."""
        slots, G = slots or range(len(rows)), self.num_generations
        if self.task.tools is not None:
            return self._tool_rollout(rows, slots)
        if self.tools:
            return trl_tools.rollout(self, rows, slots, self._first_group)
        with self.services.counted("generation"):
            prompt_ids, images, fields = self._tokenize_prompts([self.wrap_prompt(row.prompt) for row in rows])
            completion_ids, logprobs = self._generate_single_turn(prompt_ids, images, fields, G)
        self.cost["generated_tokens"] += sum(map(len, completion_ids))
        texts = self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        logprobs = logprobs or [None] * len(rows)
        drawn = zip(rows, slots, prompt_ids, completion_ids, logprobs, texts, strict=True)
        return [collect.trajectory(*one, ends=ends, group_size=G, first_group=self._first_group) for one in drawn]

    def _tool_rollout(self, rows, slots: Sequence[int]) -> list[Trajectory]:
        """Episodes of a task with tools; each samples from a stream of its own, by its slot."""
        how = {"temperature": self.args.temperature, "top_p": self.args.top_p}
        stream, G = self.services.stream("rollout"), self.num_generations
        with self.services.counted("generation"):
            done = rollout.episodes(
                self.task,
                rows,
                prompts := self.tokenize([row.prompt for row in rows]),
                self.services.engine,
                self._tokenizer,
                [derive(stream, slot) for slot in slots],
                self.max_completion_length,
                **how,
            )
        self.cost["generated_tokens"] += sum(sum(episode.mask) for episode in done)
        return [
            episode.trajectory(row, prompt, self._first_group + slot // G, slot % G)
            for episode, row, prompt, slot in zip(done, rows, prompts, slots, strict=True)
        ]

    # ---- forwards ----
    def _forward_needs(self, batch: Batch) -> None:
        """Old log-probs, entropies and reference log-probs: each computed once for the whole stack, where needed."""
        needs = self.stack.needs | generation.needs(self.args)
        misaligned = self.args.gradient_accumulation_steps % (self.args.steps_per_generation * self.num_iterations) != 0
        with torch.no_grad():
            if misaligned or needs & {"old_logps", "entropies"}:
                old_logps, batch.entropies_ST = self.score_tokens(batch, entropies="entropies" in needs)
                if misaligned or "old_logps" in needs:  # else the loss takes its own, and every ratio is exactly 1
                    batch.old_logps_ST = old_logps
            generation.attach(self, batch)
            if self.beta != 0.0:
                batch.ref_logps_ST = self.reference_logps(batch)

    def score_tokens(self, batch: Batch, entropies: bool = False, model=None) -> tuple[Tensor, Tensor | None]:
        """(S, T) log-probs, and entropies if asked, of the completions under the policy (or `model`)."""

        def work(part: slice) -> Tensor:
            some = batch.rows_at(part)
            ids, mask = some.sequences()
            self.cost["forwarded_tokens"] += int(mask.sum())
            logps, entropies_ST, _ = self._get_per_token_logps_and_entropies(
                self.model if model is None else model,
                ids,
                mask,
                some.completion_ids_ST.size(1),
                batch_size=self.args.per_device_train_batch_size,
                compute_entropy=entropies,
                **vision.batch_inputs(self, some, ids),
            )
            return torch.stack([logps, entropies_ST], 1) if entropies else logps.unsqueeze(1)

        with self.services.counted("forward"):
            found = self.services.divided_rows(batch.rows, work)
        return found[:, 0], found[:, 1] if entropies else None

    def reference_logps(self, batch: Batch) -> Tensor:
        if self.ref_model is not None:
            return self.score_tokens(batch, model=self.ref_model)[0]
        model: Any = self.accelerator.unwrap_model(self.model)
        with model.disable_adapter():
            return self.score_tokens(batch)[0]

    def hidden_states(self, batch: Batch) -> Tensor:
        """(S, T, D) states from which each completion token was predicted."""
        decoder = self.accelerator.unwrap_model(self.model).get_decoder()
        limit, width = self.args.per_device_train_batch_size, batch.completion_ids_ST.size(1)

        def work(part: slice) -> Tensor:
            ids, mask = batch.rows_at(part).sequences()
            self.cost["forwarded_tokens"] += int(mask.sum())
            parts = [
                decoder(input_ids=ids[k : k + limit], attention_mask=mask[k : k + limit])[0][:, -width - 1 : -1]
                for k in range(0, len(ids), limit)
            ]
            return torch.cat(parts)

        return self.services.divided_rows(batch.rows, work)

    def _catch_hidden(self, module, args, output) -> None:
        self._hidden = output[0]

    # ---- from trajectories to TRL's dict ----
    def _to_inputs(self, generated: Batch, selected: Batch) -> dict[str, Tensor]:
        slices, rows = self.args.steps_per_generation, self.args.generation_batch_size
        untouched = selected is generated and selected.row_weight_S is None and selected.rows == rows
        if not untouched:
            selected = collect.fill(selected.trim(), slices, self.team.size)
        tokens = selected.model_mask_ST.sum()
        selected = self.team.rows_of(selected)
        self.cost["trained_tokens"] += int(selected.model_mask_ST.sum()) * self.num_iterations
        images = vision.batch_inputs(self, selected, selected.sequences()[0])
        if images and not untouched:
            raise ConfigError("methods that drop, add or weigh rollouts take no images", where="method")
        return collect.as_inputs(selected, tokens, weighted=not untouched) | images

    # ---- one micro-batch ----
    def _compute_loss(self, model, inputs):
        rows, limit = inputs["completion_ids"].size(0), self.args.per_device_train_batch_size
        chunks = -(-rows // limit)
        if chunks <= 1:
            return self._chunk_loss(model, inputs)
        if self.is_deepspeed_enabled:
            raise ConfigError(
                "DeepSpeed takes one backward per micro-batch, and this stack has more rows than rows_per_device",
                where="scale",
                got=f"{rows} rows",
                fix="choose scale=ddp or scale=fsdp2",
            )
        total: Any = 0.0
        for k in range(chunks):
            part = collect.row_slice(inputs, k * limit, (k + 1) * limit)
            loss = self._chunk_loss(model, part, part["completion_ids"].size(0) / rows)
            if k < chunks - 1:
                with self.accelerator.no_sync(model):
                    self.accelerator.backward(loss)
                total = total + loss.detach()
            else:
                total = loss + total
        return total

    def _chunk_loss(self, model, inputs, share: float = 1.0):
        lctx = self._loss_context(model, inputs)
        lctx.share = share
        loss = self.stack.loss(lctx)
        self.meter["entropy"].append(
            (lctx.entropies_BT.detach() * lctx.mask_BT).sum() / lctx.mask_BT.sum().clamp(min=1)
        )
        return loss

    def _loss_context(self, model, inputs) -> LossContext:
        completion_ids, completion_mask = inputs["completion_ids"], inputs["completion_mask"]
        ids = torch.cat([inputs["prompt_ids"], completion_ids], dim=1)
        attention = torch.cat([inputs["prompt_mask"], completion_mask], dim=1)
        width = completion_ids.size(1)
        logps, entropies, _ = self._get_per_token_logps_and_entropies(
            model, ids, attention, width, compute_entropy=True, **{k: inputs[k] for k in vision.FIELDS if k in inputs}
        )
        old = inputs.get("old_per_token_logps")
        # `num_items_in_batch` spans the generation: rescaled to one accumulation window, as TRL does.
        denominator = inputs["num_items_in_batch"].clamp(min=1.0) / self.team.size
        accumulation = self.current_gradient_accumulation_steps
        updates = self.args.steps_per_generation / accumulation * self.team.size
        return LossContext(
            logps_BT=logps,
            entropies_BT=entropies,
            mask_BT=inputs["tool_mask"],
            adv_BT=generation.weighted(inputs),
            old_logps_BT=logps.detach() if old is None else old,
            ref_logps_BT=inputs.get("ref_per_token_logps"),
            denominator_tokens=denominator * accumulation / self.args.steps_per_generation,
            accumulation=accumulation,
            updates=updates,
            max_completion_tokens=self.max_completion_length,
            extras={k.removeprefix("extra/"): v for k, v in inputs.items() if k.startswith("extra/")},
            row_weight_B=inputs.get("row_weight"),
            ids_BL=ids,
            attention_BL=attention,
            hidden_BTD=None if self._hidden is None else self._hidden[:, -width - 1 : -1],
            log=lambda name, value: self.meter[name].append(value),
        )

    def create_optimizer(self, *args, **kw):
        optimizer = super().create_optimizer(*args, **kw)
        if self.objective_modules and not getattr(self, "_modules_added", False):
            rate = self.stack.objective.modules_learning_rate or self.args.learning_rate
            add_modules(optimizer, self.objective_modules, rate, self.args.max_grad_norm, self.team.size)
            self._modules_added = True
        return optimizer

    # ---- logs ----
    def _log_generation(self, ctx: Context, selected: Batch) -> None:
        """The advantages logged, and shown in samples, are those trained on; rewards are those of every draw."""
        for name, value in collect.summary(ctx, selected).items():
            self.meter[name].append(value)
        if self._write_sample is not None and self.team.is_main:
            for sample in collect.samples(ctx, selected, self._tokenizer, self._samples_per_step):
                self._write_sample(sample)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.last_ctx is not None:
            logs |= self.last_ctx.logs
        logs |= self.team.mean(self.meter.drain()) | self.team.mean(self.stack.metrics())
        self.cost.settle(self.team)
        logs |= {f"cost/{k}": v for k, v in self.cost.items()}
        logs |= {f"time/hook/{k}": v for k, v in self.stack.take_seconds().items()}
        logs |= self.services.take_seconds()
        Trainer.log(self, logs, start_time)
        self._metrics["train"].clear()

    # ---- state ----
    def _save_checkpoint(self, model, trial):
        # TRL's own version writes a model card with hub look-ups on every save.
        Trainer._save_checkpoint(self, model, trial)

    def state_dict(self) -> dict[str, Any]:
        """Everything beside the policy and optimiser that the next generation depends on."""
        return {
            "stack": self.stack.state_dict(),
            "modules": dict(self.objective_modules.state_dict()),
            "cost": dict(self.cost),
            "stream_position": self.stream_position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stack.load_state_dict(state["stack"])
        self.objective_modules.load_state_dict(state["modules"])
        self.cost.load(state["cost"])
        self.stream_position = state["stream_position"]
