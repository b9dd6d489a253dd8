"""Images in prompts: what a vision-language model gets beside the token ids.

A chat prompt holds images as parts `{"type": "image", "image": PIL.Image}` of its messages; the processor's template
puts as many image tokens in their place as the model needs. Tool results are text: an image as a result is not carried.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from methods.batch import Batch
from methods.errors import ConfigError

FIELDS = ("pixel_values", "image_grid_thw", "mm_token_type_ids", "num_images")


def images_of(prompt: str | Sequence[dict]) -> list[Any]:
    """The images of a prompt, in order."""
    messages = [] if isinstance(prompt, str) else prompt
    parts = [part for m in messages if not isinstance(m["content"], str) for part in m["content"]]
    return [part["image"] for part in parts if part["type"] == "image"]


def batch_inputs(trainer: Any, batch: Batch, ids_BL: Tensor) -> dict[str, Any]:
    """What TRL's forward takes beside the ids of a batch whose prompts hold images."""
    # The rows of a buffer of earlier rollouts have ids alone: what keeps such a buffer is refused beside images.
    images = [images_of(getattr(batch.trajs[i].row, "prompt", "")) for i in batch.traj_S.tolist()]
    made = model_inputs(trainer.processing_class, trainer.accelerator.unwrap_model(trainer.model), ids_BL, images)
    return made | {"num_images": [len(row) for row in images]} if made else {}


def model_inputs(processor: Any, model: Any, ids_BL: Tensor, images: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Keyword arguments of the model for rows with these ids and images; nothing where no row has an image.

    `pixel_values` over all images in row order and, for models of the Qwen family, the grid of each image and which
    ids are image tokens. ConfigError for a text model.
    """
    flat = [image for row in images for image in row]
    if not flat:
        return {}
    if not hasattr(processor, "image_processor"):
        raise ConfigError(
            "The prompts hold images and the model reads text only",
            where="model",
            got=type(processor).__name__ if processor is not None else "no image processor",
            fix="choose a vision-language model, or a task without images",
        )
    made = processor.image_processor(images=flat, return_tensors="pt")
    out = {k: made[k].to(ids_BL.device) for k in ("pixel_values", "image_grid_thw") if k in made}
    out["pixel_values"] = out["pixel_values"].to(model.dtype)
    if "image_grid_thw" in out:
        out["mm_token_type_ids"] = (ids_BL == model.config.image_token_id).to(torch.int32)
    return out
