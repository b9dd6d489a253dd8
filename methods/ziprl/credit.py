"""Hindsight response replay: credit moved between the turns of a trajectory by the quality of their compressions."""

from __future__ import annotations

import torch
from torch import Tensor


def corrections(quality_M: Tensor, traj_M: Tensor) -> Tensor:
    """(M,) Q^(i,j) - mean of trajectory i's qualities; 0 where a quality is missing (NaN).

    M counts the turns of all trajectories, `traj_M` names each turn's trajectory. The sum over a trajectory is 0; one
    quality gives no correction. A constant added to a trajectory's qualities changes nothing.
    """
    present_M = ~torch.isnan(quality_M)
    n = int(traj_M.max()) + 1 if len(traj_M) else 0
    zeros_N = torch.zeros(n, dtype=quality_M.dtype, device=quality_M.device)
    known_M = torch.where(present_M, quality_M, 0.0)
    count_N = zeros_N.index_add(0, traj_M, present_M.to(quality_M.dtype))
    mean_N = zeros_N.index_add(0, traj_M, known_M) / count_N.clamp(min=1.0)
    return torch.where(present_M, known_M - mean_N[traj_M], 0.0)


def on_tokens(value_M: Tensor, first_N: Tensor, traj_S: Tensor, turn_ST: Tensor) -> Tensor:
    """(S, T) each turn's value on its tokens, 0 where there is no turn (-1: prompt, tool text, padding).

    `first_N` is where the turns of each trajectory begin in `value_M`.
    """
    if not len(value_M):
        return torch.zeros(turn_ST.shape, dtype=value_M.dtype, device=turn_ST.device)
    place_ST = first_N[traj_S].unsqueeze(1) + turn_ST.clamp(min=0)
    return torch.where(turn_ST >= 0, value_M[place_ST], 0.0)


def row_weights(traj_S: Tensor, mask_ST: Tensor) -> Tensor:
    """(S,) 1 / T_i, T_i the rows of trajectory i with a token to train on; 0 for a row without one.

    A mean over rows with these weights is the mean over trajectories of the mean over their turns.
    """
    live_S = mask_ST.bool().any(dim=1).float()
    rows_N = torch.zeros(int(traj_S.max()) + 1, device=traj_S.device).index_add(0, traj_S, live_S)
    return live_S / rows_N.clamp(min=1.0)[traj_S]
