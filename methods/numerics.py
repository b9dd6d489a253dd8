"""Small tensor routines shared by methods and objectives."""

from __future__ import annotations

import torch
from torch import Tensor

STD_EPS = 1e-4  # TRL's group-std convention


def nanstd(x: Tensor, dim: int | None = None) -> Tensor:
    """Bessel-corrected standard deviation over the entries that are not NaN; 0 where only one is left, else NaN."""
    mean = torch.nanmean(x) if dim is None else torch.nanmean(x, dim=dim, keepdim=True)
    square = (x - mean) ** 2
    variance = torch.nanmean(square) if dim is None else torch.nanmean(square, dim=dim)
    count = (~torch.isnan(x)).sum() if dim is None else (~torch.isnan(x)).sum(dim=dim)
    correction = torch.where(count > 1, count / (count - 1), torch.zeros_like(variance))
    return torch.sqrt(variance * correction)


def group_stats(values_N: Tensor, group_N: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and Bessel-corrected std of each entry's group, ignoring NaN: (N,), (N,) -> (N,), (N,).

    A group with no valid entry gives NaN; one valid entry gives std 0. Groups may have any sizes and any order.
    """
    _, index, sizes = torch.unique_consecutive(group_N, return_inverse=True, return_counts=True)
    regular = sizes.numel() > 0 and bool((sizes == sizes[0]).all()) and torch.unique(group_N).numel() == sizes.numel()
    if regular:
        grouped = values_N.view(-1, int(sizes[0]))
        mean, std = torch.nanmean(grouped, dim=1), nanstd(grouped, dim=1)
        return mean[index], std[index]
    mean_N, std_N = torch.empty_like(values_N), torch.empty_like(values_N)
    for group in torch.unique(group_N):
        member = group_N == group
        mean_N[member], std_N[member] = torch.nanmean(values_N[member]), nanstd(values_N[member])
    return mean_N, std_N


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over mask == 1; 0 for an empty mask."""
    return (x * mask).sum() / mask.sum().clamp(min=1.0)


def discounted_returns(
    rewards_ST: Tensor, mask_ST: Tensor, gamma: float = 1.0, after_S: Tensor | None = None
) -> Tensor:
    """G_t = rho_t + gamma * G_{t+1} over the model tokens of each row; `after_S` follows a row's last token.

    Tokens outside the mask (tool text, padding) neither pay nor discount: the next model token follows directly.
    """
    returns = torch.zeros_like(rewards_ST)
    running = torch.zeros_like(rewards_ST[:, 0]) if after_S is None else after_S
    if gamma == 1.0:
        masked = rewards_ST * mask_ST
        return (masked.flip(1).cumsum(1).flip(1) + running.unsqueeze(1)) * mask_ST
    for t in range(rewards_ST.shape[1] - 1, -1, -1):
        on = mask_ST[:, t].to(rewards_ST.dtype)
        running = on * (rewards_ST[:, t] + gamma * running) + (1 - on) * running
        returns[:, t] = running * on
    return returns


def trajectory_returns(rewards_ST: Tensor, mask_ST: Tensor, traj_S: Tensor, gamma: float = 1.0) -> Tensor:
    """Discounted returns that run on from a row to the next row of the same trajectory (rows in trajectory order)."""
    if len(torch.unique(traj_S)) == len(traj_S):
        return discounted_returns(rewards_ST, mask_ST, gamma)
    returns_ST = torch.zeros_like(rewards_ST)
    after = torch.zeros_like(rewards_ST[:1, 0])
    for row in range(len(traj_S) - 1, -1, -1):
        if row + 1 < len(traj_S) and traj_S[row] != traj_S[row + 1]:
            after = torch.zeros_like(after)
        one = slice(row, row + 1)
        returns_ST[one] = discounted_returns(rewards_ST[one], mask_ST[one], gamma, after)
        if mask_ST[row].any():
            after = returns_ST[one, int(mask_ST[row].argmax())]
    return returns_ST


def next_values(values_ST: Tensor, mask_ST: Tensor, traj_S: Tensor) -> Tensor:
    """(S, T) value at the next model token of the same trajectory, 0 after its last (rows in trajectory order)."""
    rows, width = mask_ST.shape
    flat = mask_ST.bool().flatten()
    place = torch.arange(rows * width, device=flat.device)
    # Position of the first model token strictly after each one: a running minimum from the end.
    here = torch.where(flat, place, rows * width)
    after = torch.cat([here[1:], here.new_full((1,), rows * width)]).flip(0).cummin(0).values.flip(0)
    traj = torch.cat([traj_S.repeat_interleave(width), traj_S.new_full((1,), -1)])
    found = torch.cat([values_ST.flatten(), values_ST.new_zeros(1)])[after]
    return torch.where(flat & (traj[after] == traj[:-1]), found, 0.0).view(rows, width)


def generalised_advantages(
    rewards_ST: Tensor, values_ST: Tensor, mask_ST: Tensor, traj_S: Tensor, gamma: float = 1.0, lam: float = 1.0
) -> Tensor:
    """(S, T) generalised advantage estimates over model tokens (arXiv 1506.02438).

    delta_t = rho_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}. V is 0 after a trajectory's last model
    token; tool text neither pays nor discounts.
    """
    delta_ST = (rewards_ST + gamma * next_values(values_ST, mask_ST, traj_S) - values_ST) * mask_ST
    return trajectory_returns(delta_ST, mask_ST, traj_S, gamma * lam)
