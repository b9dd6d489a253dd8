"""KL to the start model on a fixed probe set: comparable over methods, whatever their own KL terms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from experiments.engines.base import Engine, Request
from experiments.files import replace
from methods.base import Batch, Segment, Trajectory, assemble

CHUNK = 16  # rows per forward: the probe holds full logits


class Probe:
    """Completions of the start model with their log-probs; `kl()` = mean over tokens of log p_start - log p_now.

    Sampled from the start model at temperature 1, so it estimates KL(start || now) per token without bias.
    """

    def __init__(self, model: Any, engine: Engine, pad_id: int, path: Path) -> None:
        self.model, self.engine, self.pad_id, self.path = model, engine, pad_id, path
        self.batch: Batch | None = None
        self.start_logps_ST: Tensor | None = None

    def prepare(self, prompts: Sequence[list[int]], max_tokens: int, seed: int) -> None:
        """Loads the probe of an earlier sitting, or samples it: to be called before the first step."""
        if self.path.exists():
            saved = load_file(self.path)
            lengths = saved["lengths"].tolist()
            self._set([(row[:p], row[p : p + c]) for row, (p, c) in zip(saved["ids"].tolist(), lengths, strict=True)])
            self.start_logps_ST = saved["logps"]
            return
        requests = [Request(prompt_ids=ids, max_tokens=max_tokens, seed=seed + i) for i, ids in enumerate(prompts)]
        results = self.engine.generate(requests)
        pairs = [(p, r[0].ids) for p, r in zip(prompts, results, strict=True) if r[0].ids]
        self._set(pairs)
        self.start_logps_ST = self._logps()
        width = max(len(p) + len(c) for p, c in pairs)
        ids = torch.tensor([[*p, *c] + [0] * (width - len(p) - len(c)) for p, c in pairs])
        lengths = torch.tensor([[len(p), len(c)] for p, c in pairs])
        replace(self.path, save({"ids": ids, "lengths": lengths, "logps": self.start_logps_ST}))

    def _set(self, pairs) -> None:
        trajs = [Trajectory(str(i), i, 0, [Segment(p, c)]) for i, (p, c) in enumerate(pairs)]
        self.batch = assemble(trajs, self.pad_id)

    def _logps(self) -> Tensor:
        """(S, T) log-probs under the model as it is, on the CPU."""
        assert self.batch is not None
        b, device = self.batch, next(self.model.parameters()).device
        ids = torch.cat([b.prompt_ids_SP, b.completion_ids_ST], dim=1).to(device)
        mask = torch.cat([b.prompt_mask_SP, b.completion_mask_ST], dim=1).to(device)
        width, training = b.completion_ids_ST.size(1), self.model.training
        self.model.eval()
        parts = []
        with torch.no_grad():
            for k in range(0, len(ids), CHUNK):
                logits = self.model(input_ids=ids[k : k + CHUNK], attention_mask=mask[k : k + CHUNK]).logits
                logps = torch.log_softmax(logits[:, -width - 1 : -1].float(), dim=-1)
                parts.append(logps.gather(2, ids[k : k + CHUNK, -width:].unsqueeze(2)).squeeze(2).cpu())
        self.model.train(training)
        return torch.cat(parts).contiguous()

    def kl(self) -> float:
        assert self.batch is not None and self.start_logps_ST is not None
        mask = self.batch.completion_mask_ST
        return float(((self.start_logps_ST - self._logps()) * mask).sum() / mask.sum())
