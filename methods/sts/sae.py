"""Sparse autoencoders of one layer's residual stream: encoders, decoder, folding of scales, quality.

Shapes: T tokens, d width of the residual stream, s latents. The matrices are W_enc (d, s) and W_dec (s, d).

    x     = z - b_dec, or z where `centred` is false
    pre   = x W_enc + b_enc
    h     = relu:     max(pre, 0)
            topk:     the k largest entries of pre, then max(., 0); the others 0
            jumprelu: max(pre, 0) where pre > threshold, else 0
            gated:    1[x W_enc + b_gate > 0] max(x (W_enc exp(r_mag)) + b_mag, 0)
    z_hat = h W_dec + b_dec

TopK is section 3.1 of the sheet's paper, arXiv 2603.02908, in the layout of arXiv 2406.04093; JumpReLU is
arXiv 2407.14435, Gated arXiv 2404.16014. Features are never negative.

Differs from the paper: it writes one b for both biases, although their sizes differ; here they are two, and b_dec is
taken off the input first, which a change of b_enc can undo.

Degenerate: a token with fewer than k positive pre-activations has fewer than k features; NaN or infinity in the input
is refused, naming layer and dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from methods.errors import ConfigError, DataError

ARCHITECTURES = ("relu", "topk", "jumprelu", "gated")
NORMALISATIONS = ("none", "layer_norm", "constant_norm_rescale")
# The tensors of each architecture, with "d" and "s" for their sizes.
SHAPES = {
    "relu": {"W_enc": "ds", "b_enc": "s", "W_dec": "sd", "b_dec": "d"},
    "topk": {"W_enc": "ds", "b_enc": "s", "W_dec": "sd", "b_dec": "d"},
    "jumprelu": {"W_enc": "ds", "b_enc": "s", "W_dec": "sd", "b_dec": "d", "threshold": "s"},
    "gated": {"W_enc": "ds", "b_gate": "s", "b_mag": "s", "r_mag": "s", "W_dec": "sd", "b_dec": "d"},
}
_EPS = 1e-5  # of layer_norm, SAELens's


class SAE(nn.Module):
    """A sparse autoencoder of the residual stream after decoder layer `layer` (counted from 0; None = unknown).

    `tensors`: those of `SHAPES[architecture]`. `k`: of topk. `centred`: b_dec is taken off the input.
    `normalisation`: what is done to each vector at run time, `none` for an SAE whose scale is folded in.
    `source` names it in messages. Raises ConfigError for tensors that do not fit together.
    """

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    threshold: Tensor  # of jumprelu
    b_gate: Tensor  # of gated
    b_mag: Tensor
    r_mag: Tensor

    def __init__(
        self,
        architecture: str,
        tensors: dict[str, Tensor],
        *,
        k: int | None = None,
        layer: int | None = None,
        centred: bool = True,
        normalisation: str = "none",
        source: str = "the SAE",
    ) -> None:
        super().__init__()
        _check(architecture, tensors, k, normalisation, source)
        self.architecture, self.k, self.layer = architecture, k, layer
        self.centred, self.normalisation, self.source = centred, normalisation, source
        for name in SHAPES[architecture]:
            self.register_parameter(name, nn.Parameter(tensors[name].detach().clone(), requires_grad=False))

    @property
    def width(self) -> int:
        """d, the size of the residual stream that it reads."""
        return self.W_dec.shape[1]

    @property
    def latents(self) -> int:
        """s, the number of features."""
        return self.W_dec.shape[0]

    def encode(self, z_Td: Tensor) -> Tensor:
        """(T, s) features of residual-stream vectors, in the SAE's dtype; leading dimensions may be any.

        ConfigError for a wrong width, DataError for NaN or infinity.
        """
        return self._features(self._normalise(self.check(z_Td))[0])

    def decode(self, h_Ts: Tensor) -> Tensor:
        """(T, d): h W_dec + b_dec, in the scale in which the SAE encodes (see `reconstruct`)."""
        return h_Ts @ self.W_dec + self.b_dec

    def reconstruct(self, z_Td: Tensor) -> tuple[Tensor, Tensor]:
        """Features (T, s) and reconstruction (T, d) in the scale of z, a normalisation at run time undone."""
        x_Td, scale_T1, shift_T1 = self._normalise(self.check(z_Td))
        h_Ts = self._features(x_Td)
        return h_Ts, self.decode(h_Ts) * scale_T1 + shift_T1

    def ablate(self, z_Td: Tensor, latents: Sequence[int]) -> Tensor:
        """(T, d): z with the given latents set to 0 and the reconstruction error kept: z - h[:, D] W_dec[D]."""
        x_Td, scale_T1, _ = self._normalise(self.check(z_Td))
        chosen = torch.as_tensor(list(latents), dtype=torch.long, device=self.W_dec.device)
        removed_Td = self._features(x_Td)[..., chosen] @ self.W_dec[chosen] * scale_T1
        return z_Td - removed_Td.to(z_Td.dtype)

    def pre_activations(self, x_Td: Tensor) -> Tensor:
        """(T, s): x W_enc + b_enc, for relu, topk and jumprelu."""
        return torch.nn.functional.linear(x_Td - self.b_dec if self.centred else x_Td, self.W_enc.T, self.b_enc)

    def check(self, z_Td: Tensor) -> Tensor:
        """z in the SAE's dtype. ConfigError for a width that is not the SAE's, DataError for NaN or infinity."""
        if z_Td.shape[-1] != self.width:
            raise ConfigError(
                "The SAE does not fit the model: its width is not the size of the residual stream",
                where=self.source,
                got=f"vectors of size {z_Td.shape[-1]}, an SAE of width {self.width}",
                expected="an SAE that was trained on this model",
            )
        refuse_not_finite(z_Td, self.layer)
        return z_Td.to(self.W_dec.dtype)

    def _features(self, x_Td: Tensor) -> Tensor:
        if self.architecture == "gated":
            raw_Ts = (x_Td - self.b_dec if self.centred else x_Td) @ self.W_enc
            open_Ts = raw_Ts + self.b_gate > 0
            return torch.where(open_Ts, torch.relu(raw_Ts * self.r_mag.exp() + self.b_mag), 0.0)
        pre_Ts = self.pre_activations(x_Td)
        if self.architecture == "relu":
            return pre_Ts.relu_()
        if self.architecture == "jumprelu":
            return torch.where(pre_Ts > self.threshold, torch.relu(pre_Ts), 0.0)
        assert self.k is not None
        top_Tk = pre_Ts.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(pre_Ts).scatter_(-1, top_Tk.indices, top_Tk.values.relu())

    def _normalise(self, z_Td: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """z in the scale of the SAE, with (scale, shift) that bring it back."""
        if self.normalisation == "none":
            return z_Td, 1.0, 0.0
        if self.normalisation == "layer_norm":
            mean_T1 = z_Td.mean(-1, keepdim=True)
            std_T1 = (z_Td - mean_T1).std(-1, keepdim=True)
            return (z_Td - mean_T1) / (std_T1 + _EPS), std_T1, mean_T1
        norm_T1 = (z_Td.norm(dim=-1, keepdim=True) / self.width**0.5).clamp(min=1e-12)  # a zero vector stays one
        return z_Td / norm_T1, norm_T1, 0.0

    @torch.no_grad()
    def fold_scale(self, c: float) -> SAE:
        """Fold a scale in: an SAE trained on c z becomes one of z itself, features unchanged. In place.

        W_enc <- c W_enc, b_dec <- b_dec / c, W_dec <- W_dec / c.
        """
        self.W_enc.mul_(c)
        self.b_dec.div_(c)
        self.W_dec.div_(c)
        return self

    @torch.no_grad()
    def fold_decoder_norms(self) -> SAE:
        """Give every decoder row norm 1, its feature multiplied by the norm; the reconstruction stays. In place.

        ConfigError for topk with rows of different norms: there the k largest features would be others.
        """
        norm_s = self.W_dec.norm(dim=1)
        if self.architecture == "topk" and bool((norm_s.max() - norm_s.min()) > 1e-4 * norm_s.max()):
            raise ConfigError(
                "Decoder norms of a topk SAE cannot be folded: another scale of a latent changes which are largest",
                where=self.source,
                got=f"norms from {float(norm_s.min()):.3g} to {float(norm_s.max()):.3g}",
                expected="rows of one norm",
            )
        return self._scale_latents(norm_s)

    @torch.no_grad()
    def rank_by_decoder_norm(self) -> SAE:
        """Fold SAELens's `rescale_acts_by_decoder_norm`: pre is multiplied by the rows' norms before the top k."""
        return self._scale_latents(self.W_dec.norm(dim=1))

    def _scale_latents(self, norm_s: Tensor) -> SAE:
        norm_s = torch.where(norm_s > 0, norm_s, 1.0)
        self.W_dec.div_(norm_s[:, None])
        self.W_enc.mul_(norm_s)
        for name in ("b_enc", "threshold", "b_gate", "b_mag"):
            if name in SHAPES[self.architecture]:
                getattr(self, name).mul_(norm_s)
        return self


def refuse_not_finite(z_Td: Tensor, layer: int | None) -> None:
    """DataError, naming layer and dtype, if residual vectors hold NaN or infinity."""
    if not bool(torch.isfinite(z_Td).all()):
        raise DataError(
            "The residual stream holds NaN or infinity",
            where=f"layer {'unknown' if layer is None else layer}, {str(z_Td.dtype).removeprefix('torch.')}",
            got=f"{int((~torch.isfinite(z_Td)).any(-1).sum())} of {z_Td[..., 0].numel()} token vectors",
            expected="finite numbers",
            fix="run the model in float32 (bfloat16 and float16 can overflow), and look for damaged weights",
        )


class Quality:
    """Running sums of how well an SAE describes vectors; float64, nothing per token is kept.

    FVU = sum |z - z_hat|^2 / sum |z - mean z|^2; L0 = features above 0 per token; dead = share of latents that never
    fired. Degenerate: NaN without tokens, FVU NaN where all vectors are equal.
    """

    def __init__(self, sae: SAE) -> None:
        device = sae.W_dec.device
        self.tokens, self.error, self.squares, self.active = 0, 0.0, 0.0, 0
        self.sum_d = torch.zeros(sae.width, dtype=torch.float64, device=device)
        self.fired_s = torch.zeros(sae.latents, dtype=torch.bool, device=device)

    def add(self, z_Td: Tensor, h_Ts: Tensor, z_hat_Td: Tensor) -> None:
        """Count (T, d) vectors, their features and reconstructions."""
        z_Td = z_Td.double()
        on_Ts = h_Ts > 0
        self.tokens += len(z_Td)
        self.error += float((z_Td - z_hat_Td).square().sum())
        self.squares += float(z_Td.square().sum())
        self.active += int(on_Ts.sum())
        self.sum_d += z_Td.sum(0)
        self.fired_s |= on_Ts.any(0)

    def metrics(self) -> dict[str, float]:
        """`fvu`, `l0`, `dead` and the number of `tokens`."""
        if not self.tokens:
            return {"fvu": float("nan"), "l0": float("nan"), "dead": float("nan"), "tokens": 0}
        variance = self.squares - float(self.sum_d.square().sum()) / self.tokens
        return {
            "fvu": self.error / variance if variance > 1e-12 * self.squares else float("nan"),
            "l0": self.active / self.tokens,
            "dead": 1.0 - float(self.fired_s.double().mean()),
            "tokens": self.tokens,
        }


def _check(architecture: str, tensors: dict[str, Tensor], k: int | None, normalisation: str, source: str) -> None:
    def refuse(what: str, got: object, expected: str) -> None:
        raise ConfigError(what, where=source, got=got, expected=expected)

    if architecture not in ARCHITECTURES:
        refuse("This kind of SAE cannot be read", architecture, " | ".join(ARCHITECTURES))
    if normalisation not in NORMALISATIONS:
        refuse("This normalisation of activations cannot be read", normalisation, " | ".join(NORMALISATIONS))
    shapes = SHAPES[architecture]
    if missing := [name for name in shapes if name not in tensors]:
        refuse(f"An SAE of kind {architecture} lacks tensors", f"no {', '.join(missing)}", ", ".join(shapes))
    decoder = tensors["W_dec"]
    if decoder.dim() != 2 or 0 in decoder.shape:
        refuse("The decoder of an SAE is a matrix", f"W_dec of shape {tuple(decoder.shape)}", "(latents, width)")
    size = {"s": decoder.shape[0], "d": decoder.shape[1]}
    for name, axes in shapes.items():
        expected = tuple(size[axis] for axis in axes)
        if tuple(tensors[name].shape) != expected:
            got = f"{name} of shape {tuple(tensors[name].shape)} beside W_dec of shape {tuple(decoder.shape)}"
            refuse("The tensors of an SAE do not fit together", got, f"{name} of shape {expected}")
        if not tensors[name].is_floating_point():
            refuse("The tensors of an SAE are numbers with a point", f"{name} of {tensors[name].dtype}", "floats")
        if not bool(torch.isfinite(tensors[name]).all()):
            refuse("An SAE holds NaN or infinity", name, "finite numbers")
    if architecture == "topk" and not (isinstance(k, int) and 0 < k <= size["s"]):
        refuse("A topk SAE keeps k features per token", f"k={k}", f"a whole number from 1 to {size['s']}")
