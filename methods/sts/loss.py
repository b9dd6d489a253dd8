"""The loss of a topk SAE and what keeps its decoder rows at norm 1 (arXiv 2406.04093; sheet section 10.1).

    loss = FVU + alpha aux
    FVU  = sum |x - x_hat|^2 / V,  V = sum |x - mean x|^2 over the batch
    aux  = min(n_dead / k_aux, 1) sum |e_hat - e|^2 / V
    e    = x - x_hat without gradient;  e_hat = W_dec of the k_aux largest dead pre-activations, ReLU'd, no bias

A latent is dead if it has not fired for a number of tokens. Differs from the libraries: SAELens sums squared errors
and has aux coefficient 1, sparsify adds b_dec to e_hat, dictionary_learning divides aux by the residual's variance.

Degenerate: no dead latent gives aux 0, fewer than k_aux takes those; equal vectors have no finite loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.sts.sae import SAE


@dataclass(frozen=True)
class Loss:
    """Scalars with gradients, and which latents fired in the batch."""

    fvu: Tensor
    aux: Tensor
    fired_s: Tensor


def topk_loss(sae: SAE, x_Td: Tensor, dead_s: Tensor, k_aux: int) -> Loss:
    """Both terms for a batch of vectors in the SAE's own scale."""
    pre_Ts = sae.pre_activations(x_Td)
    assert sae.k is not None
    h_Ts = _largest(pre_Ts, sae.k)
    error_Td = x_Td - sae.decode(h_Ts)
    variance = (x_Td - x_Td.mean(0)).square().sum()
    aux = variance.new_zeros(())
    if n_dead := int(dead_s.sum()):
        chosen = dead_s.nonzero().squeeze(1)
        guess_Td = _largest(pre_Ts[:, chosen], min(k_aux, n_dead)) @ sae.W_dec[chosen]
        aux = min(n_dead / k_aux, 1.0) * (guess_Td - error_Td.detach()).square().sum() / variance
    return Loss(error_Td.square().sum() / variance, aux, (h_Ts > 0).any(0))


def _largest(pre_Ts: Tensor, k: int) -> Tensor:
    top_Tk = pre_Ts.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre_Ts).scatter(-1, top_Tk.indices, top_Tk.values.relu())


@torch.no_grad()
def project_gradient(sae: SAE) -> None:
    """Remove from each decoder row's gradient its component along the row, which the new norm would undo."""
    gradient_sd = sae.W_dec.grad
    if gradient_sd is not None:
        row_sd = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12)
        gradient_sd -= (gradient_sd * row_sd).sum(1, keepdim=True) * row_sd


@torch.no_grad()
def unit_rows(sae: SAE) -> None:
    """Give every decoder row norm 1, the features as they are."""
    sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12)
