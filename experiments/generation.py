"""How completions are sampled in training: TRL's options for vLLM, and the correction for its other probabilities.

vLLM computes the same model with other kernels, so a token's probability there is not quite the trainer's. With
`d = log pi_trainer - log pi_vLLM` per token the policy loss of a token or row is multiplied by

    token_truncate:     min(exp(d_t), C)           sequence_truncate:  min(exp(sum_t d_t), C)
    token_mask:         exp(d_t), 0 above C        sequence_mask:      exp(sum_t d_t), 0 above C

as TRL does it. Here the factor is on the advantage, which is the same: it is not negative, and every objective's
policy loss is linear in the advantage at a given sign. The KL to the start model stays as it is.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from methods.errors import ConfigError, check_range

if TYPE_CHECKING:
    from torch import Tensor

    from methods.base import Batch
    from methods.stack import Stack

CORRECTIONS = ("sequence_mask", "sequence_truncate", "token_mask", "token_truncate", "none")
RATIO = "sampling_ratio"
"""The factor's name among a batch's extras."""


def uses_vllm(generation: Any) -> bool:
    return generation is not None and generation.name != "transformers"


def arguments(generation: Any, task: Any) -> dict[str, Any]:
    """What `cfg.generation` is called in GRPOConfig; {} for `transformers`. ConfigError for a task with tools."""
    if not uses_vllm(generation):
        return {}
    if task.tools is not None:
        raise ConfigError(
            "the episodes of a task with tools are written by model.generate",
            where=f"generation={generation.name}",
            got=f"task {task.name}",
            fix="choose generation=transformers",
        )
    shared = {"use_vllm": True, "vllm_importance_sampling_correction": generation.correction != "none"}
    if generation.correction != "none":
        shared["vllm_importance_sampling_mode"] = generation.correction
        shared["vllm_importance_sampling_clip_max"] = generation.clip_max
    if generation.name == "vllm_server":
        return shared | {
            "vllm_mode": "server",
            "vllm_server_base_url": generation.url,
            "vllm_server_timeout": generation.timeout,
            "vllm_group_port": generation.group_port,
        }
    return shared | {
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": generation.gpu_memory_utilization,
        "vllm_max_model_length": generation.max_model_len,
        "vllm_tensor_parallel_size": generation.tensor_parallel_size,
        "vllm_enable_sleep_mode": generation.sleep,
    }


def check(generation: Any, stack: Stack) -> None:
    """ConfigError for a combination that vLLM cannot serve, and where it is not installed."""
    if not uses_vllm(generation):
        return
    if generation.correction not in CORRECTIONS:
        raise ConfigError("unknown importance-sampling correction", where="generation.correction",
                          got=generation.correction, expected=", ".join(CORRECTIONS))  # fmt: skip
    check_range("generation.clip_max", generation.clip_max, 0.0, above=True)  # at 0 nothing would be learned
    if stack.objective.ratio_level == "sequence" and generation.correction.startswith("token"):
        raise ConfigError(
            f"{stack.objective.name} has one ratio per row, and this correction one per token",
            where="generation.correction",
            got=generation.correction,
            fix="choose sequence_mask or sequence_truncate",
        )
    if generation.name == "vllm_server":
        _check_groups(stack)
    if find_spec("vllm") is None:
        raise ConfigError(
            "vLLM is not installed here",
            where=f"generation={generation.name}",
            expected="vllm, 0.22 to 0.31, in this environment; the trainer talks to a server through it too",
            fix="pip install 'assay[vllm]' on a GPU machine, or choose generation=transformers",
        )


def _check_groups(stack: Stack) -> None:
    """TRL sends a server each group's first prompt only."""
    for hook in ("rollout", "prepare_rows"):
        owner = stack.owner(hook)
        if owner is not None:
            raise ConfigError(
                f"{owner.name} may give the rollouts of a group different prompts, of which a vLLM server is sent one",
                where="generation=vllm_server",
                got=f"method {owner.name}, which has the hook `{hook}`",
                fix="choose generation=vllm_colocate or transformers",
            )


# ---------------------------------------------------------------- the correction


def needs(args: Any) -> frozenset[str]:
    """What the layer must compute for the correction; `args` are the trainer's."""
    return frozenset({"old_logps"}) if args.use_vllm and args.vllm_importance_sampling_correction else frozenset()


def attach(trainer: Any, batch: Batch) -> None:
    """Puts the factor of each row (S,) or token (S, T) into `batch.extras` and logs it under TRL's names.

    A row without the sampler's log-probs (a demonstration) and a token whose log-prob vLLM could not give have
    factor 1.
    """
    import torch

    if not needs(trainer.args) or batch.old_logps_ST is None:
        return
    mask_ST = batch.model_mask_ST.bool()
    gap_ST = batch.old_logps_ST - _sampled(batch)
    known_ST = mask_ST & ~gap_ST.isnan()
    gap_ST = torch.where(known_ST, gap_ST, 0.0)
    mode, most = trainer.args.vllm_importance_sampling_mode, trainer.args.vllm_importance_sampling_clip_max
    by_row = mode.startswith("sequence")
    raw = torch.exp(gap_ST.sum(1) if by_row else gap_ST)
    factor = raw.clamp(max=most) if mode.endswith("truncate") else raw.masked_fill(raw > most, 0.0)
    batch.extras[RATIO] = factor
    shown, cut = (factor, raw > most) if by_row else (factor[mask_ST], (raw > most)[mask_ST])
    gaps = gap_ST.abs()[known_ST]
    for name, values in (("sampling_logp_difference", gaps), ("importance_sampling_ratio", shown)):
        values = values if values.numel() else torch.zeros(1)
        for what in ("min", "mean", "max"):
            trainer.meter[f"sampling/{name}/{what}"].append(getattr(values, what)())
    trainer.meter["sampling/importance_sampling_ratio/cut"].append(cut.float().mean())


def _sampled(batch: Batch) -> Tensor:
    """(S, T) log-probs that the sampler reported, NaN where it did not."""
    import torch

    out_ST = torch.full(batch.completion_ids_ST.shape, math.nan)
    for row, segment in enumerate(s for t in batch.trajs for s in t.segments):
        if segment.logprobs is not None:
            values = [math.nan if x is None else x for x in segment.logprobs]
            out_ST[row, : len(values)] = torch.tensor(values)
    return out_ST.to(batch.completion_ids_ST.device)


def weighted(inputs: dict[str, Tensor]) -> Tensor:
    """The advantages of a micro-batch of TRL's dict, times the factor where there is one."""
    adv_BT, factor = inputs["advantages"], inputs.get(f"extra/{RATIO}")
    if factor is None:
        return adv_BT
    return adv_BT * (factor if factor.dim() == 2 else factor.unsqueeze(1))
