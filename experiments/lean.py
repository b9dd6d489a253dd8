"""One forward of a small decoder in few operations: at 0.1 M weights the framework takes longer than the arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

FAMILIES = ("LlamaForCausalLM", "Qwen3ForCausalLM")
MOST_WEIGHTS = 5_000_000  # copies of the weights are made, and beyond this the arithmetic dominates


def fits(model: Any) -> bool:
    """Whether `Lean` computes what `model` does: a small Llama or Qwen3 in float32 as it comes, without adapters."""
    if type(model).__name__ not in FAMILIES or model.dtype != torch.float32 or model.config.hidden_act != "silu":
        return False
    parts = [model.lm_head]
    for layer in model.model.layers:
        a, m = layer.self_attn, layer.mlp
        parts += [a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj]
    plain = all(type(part) is torch.nn.Linear and part.bias is None for part in parts)
    return plain and sum(p.numel() for p in model.parameters()) <= MOST_WEIGHTS


class Lean:
    """`model` as it is now, without gradients: (N, V) scores after the last of L ids per row.

    Query, key and value are one product, gate and up another; the norms are torch's own. Scores agree with the model's
    up to rounding. `layers` keep keys and values (see `experiments.decoder`).
    """

    def __init__(self, model: Any) -> None:
        self.base, self.head = model.model, model.lm_head.weight
        self.blocks = []
        for layer in self.base.layers:
            a, m = layer.self_attn, layer.mlp
            qkv = torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight])
            self.blocks.append((layer, qkv, torch.cat([m.gate_proj.weight, m.up_proj.weight])))

    def __call__(self, ids_NL: Tensor, position_NL: Tensor, mask_N1LW: Tensor, layers: list) -> Tensor:
        h = self.base.embed_tokens.weight[ids_NL]
        cos, sin = self.base.rotary_emb(h, position_NL)
        turn = cos.unsqueeze(2), sin.unsqueeze(2)
        for (layer, qkv, gate_up), cache in zip(self.blocks, layers, strict=True):
            a = layer.self_attn
            x = (_norm(h, layer.input_layernorm) @ qkv.T).unflatten(-1, (-1, a.head_dim))
            kv = x.size(2) // (a.num_key_value_groups + 2)
            q, k, v = x.split((kv * a.num_key_value_groups, kv, kv), dim=2)
            if hasattr(a, "q_norm"):
                q, k = _norm(q, a.q_norm), _norm(k, a.k_norm)
            q, k = _rotated(q, *turn), _rotated(k, *turn)
            keys, values = cache.update(k.transpose(1, 2), v.transpose(1, 2))
            out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, mask_N1LW, enable_gqa=True)
            h = h + out.transpose(1, 2).flatten(2) @ a.o_proj.weight.T
            gate, up = (_norm(h, layer.post_attention_layernorm) @ gate_up.T).chunk(2, dim=-1)
            h = h + (F.silu(gate) * up) @ layer.mlp.down_proj.weight.T
        return _norm(h[:, -1], self.base.norm) @ self.head.T


def _norm(x: Tensor, norm: Any) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
