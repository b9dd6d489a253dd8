"""A tiny random vision-language model through the trainer: images in prompts, calls on images and regions, TAPO."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image, ImageDraw
from transformers import PrinterCallback
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from trl import GRPOConfig

from experiments.rewards import RewardSpec
from experiments.run import PromptWrapper, device_arguments
from experiments.tasks.base import Row, Task
from experiments.tokenizers import tiny_tokenizer
from experiments.tools import Tools, ToolText
from experiments.trainer import AssayTrainer
from experiments.vision import images_of, model_inputs
from methods.base import Method
from methods.errors import ConfigError
from methods.objectives.policy_gradient import Grpo, GspoToken, Sapo
from methods.stack import Stack
from methods.tapo.method import Tapo

COLOURS = {"red": (220, 20, 20), "blue": (20, 20, 220)}
FORM = ToolText(call=r"<c>(?P<json>\{.*?\})</c>", opening="<c>", stop=("</c>",), result="<r>{}</r>")
BOXES = {"left": [0, 0, 16, 32], "most": [0, 0, 15, 32], "right": [16, 0, 32, 32]}


def written(tool, **arguments):
    return "<c>" + json.dumps({"name": tool, "arguments": arguments}) + "</c>"


# One token per call, so that a model of random weights makes some.
CALLS = [written("image_search", image="img0"), *(written("zoom", image="img0", bbox=b) for b in BOXES.values())]
SYMBOLS = ("<image>", "<|vision_start|>", "<|vision_end|>", "<r>", "</r>", "which?", "answer:", *COLOURS, *CALLS)


def drawn(left, right):
    """A real picture: two coloured halves with a circle."""
    picture = Image.new("RGB", (32, 32), COLOURS[left])
    pen = ImageDraw.Draw(picture)
    pen.rectangle((16, 0, 31, 31), fill=COLOURS[right])
    pen.ellipse((12, 12, 20, 20), fill=(240, 240, 240))
    return picture


class Pictures(Task):
    """Which colour is on the left? The tools look at the pixels."""

    tools = Tools(FORM, max_calls=2, max_turn_tokens=1, max_result_tokens=2)
    max_completion_tokens = 12

    def rows(self, split, seed):
        halves = [(a, b) for a in COLOURS for b in COLOURS]
        return [self._row(i, *halves[i % 4]) for i in range(16)]

    def _row(self, i, left, right):
        parts = [{"type": "image", "image": drawn(left, right)}, {"type": "text", "text": "which?"}]
        return Row(f"picture-{i}", [{"role": "user", "content": parts}], left)

    def environment(self, row):
        return Viewer(images_of(row.prompt)[0])

    def score(self, text, row):
        return float(text == row.answer)


class Viewer:
    def __init__(self, picture):
        self.picture = picture
        self.tools = {"zoom": self.zoom, "image_search": lambda image: "red blue"}

    def zoom(self, image, bbox):
        pixel = self.picture.crop(tuple(bbox)).resize((1, 1)).getpixel((0, 0))
        return "red" if pixel[0] > pixel[2] else "blue"


# ---------------------------------------------------------------- models of random weights, made here

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
TEMPLATE = (
    "{%- for m in messages %}{%- for p in m.content %}{{ 'IMAGE' if p.type == 'image' else p.text }}{%- endfor %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ 'answer:' }}{%- endif %}"
)


class ImagesOnly(Qwen3VLProcessor):
    """Qwen3-VL's own processor without its video half, which needs torchvision."""

    attributes = ("image_processor", "tokenizer")

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        ids = tokenizer.convert_tokens_to_ids
        self.image_token, self.video_token = "<image>", "<unk>"
        self.vision_start_token, self.vision_end_token = "<|vision_start|>", "<|vision_end|>"
        self.image_token_id, self.video_token_id = ids(self.image_token), ids(self.video_token)
        self.vision_start_token_id, self.vision_end_token_id = ids("<|vision_start|>"), ids("<|vision_end|>")
        super(Qwen3VLProcessor, self).__init__(image_processor, tokenizer, chat_template=chat_template)


def text_shape(tokenizer):
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "num_key_value_heads": 2, "initializer_range": 0.1}
    return SHAPE | ends | sizes


def qwen3_vl(tokenizer):
    """The paper's family, with 0.1 M weights: several patches per image, positions in three dimensions."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    size = {"shortest_edge": 256, "longest_edge": 4096}
    pictures = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, size=size)
    template = TEMPLATE.replace("IMAGE", "<|vision_start|><image><|vision_end|>")
    processor = ImagesOnly(pictures, tokenizer, chat_template=template)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    eyes = {"depth": 2, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2, "out_hidden_size": 32}
    eyes |= {"hidden_size": 32, "intermediate_size": 64, "deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    config = Qwen3VLConfig(
        text_config=text_shape(tokenizer) | {"head_dim": 16, "rope_parameters": rope},
        vision_config=eyes,
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=processor.vision_start_token_id,
        vision_end_token_id=processor.vision_end_token_id,
    )
    return Qwen3VLForConditionalGeneration, config, processor


def llava(tokenizer):
    """One row of pixels per image."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    pictures = CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False)
    keys = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    template = TEMPLATE.replace("IMAGE", "<image>")
    processor = LlavaProcessor(pictures, tokenizer, chat_template=template, image_token="<image>", **keys)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=32, patch_size=8, num_hidden_layers=2, **SHAPE),
        text_config=LlamaConfig(**text_shape(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration, config, processor


def trainer_of(build, folder, methods=(), objective=None, per_device=16, slices=1, steps=2, task=None, seed=0):
    tokenizer = tiny_tokenizer(SYMBOLS)
    kind, config, processor = build(tokenizer)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    model = kind(config)
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config._name_or_path = "made here"
    task = task or Pictures(name="pictures")
    args = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=per_device,
        steps_per_generation=slices,
        gradient_accumulation_steps=1,
        num_generations=8,
        max_steps=steps,
        learning_rate=1e-3,
        logging_steps=1,
        max_completion_length=task.max_completion_tokens,
        top_k=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **device_arguments(OmegaConf.create({"device": "cpu", "bf16": False, "gradient_checkpointing": False})),
    )
    trainer = AssayTrainer(
        stack=Stack(list(methods), objective or Grpo()),
        rows=task.rows("train", 0),
        rewards=[RewardSpec("task", lambda texts, rows: list(map(task.score, texts, rows)), 1.0, "outcome")],
        task=task,
        wrap_prompt=PromptWrapper(True),
        seed=7,
        args=args,
        model=model,
        processing_class=processor,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


# ---------------------------------------------------------------- training


class Watch(Method):
    """Keeps what the hooks saw."""

    name = "watch"
    needs = frozenset({"old_logps"})

    def __init__(self):
        self.before, self.after, self.calls, self.gaps = [], [], [], []

    def advantages(self, adv_ST, ctx):
        self.calls += [call for t in ctx.trajs for turn in t.turns for call in turn.calls]
        self.texts = [turn.result for t in ctx.trajs for turn in t.turns if turn.result]
        return adv_ST

    def token_advantages(self, adv_BT, lctx):
        self.gaps.append(((lctx.logps_BT - lctx.old_logps_BT) * lctx.mask_BT).abs().max().item())
        return adv_BT


@pytest.mark.parametrize(
    ("build", "objective"), [(qwen3_vl, Grpo), (qwen3_vl, GspoToken), (qwen3_vl, Sapo), (llava, Grpo)]
)
def test_two_steps_with_image_and_box_calls(build, objective, tmp_path):
    """Real pictures, calls on an image and on regions, and credit passed between them."""
    watch = Watch()
    trainer = trainer_of(build, tmp_path, [Tapo(), watch], objective(), per_device=64, seed=1)
    before = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2 and all(entry["grad_norm"] > 0 for entry in logs)
    assert any(entry["tapo/mean_transfer"] > 0 and entry["tapo/rho_action"] > 0 for entry in logs)
    assert {call["tool"] for call in watch.calls} == {"image_search", "zoom"}
    assert {"red", "blue"} <= set(watch.texts)  # the tools looked at the pixels
    after = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    assert not torch.equal(before, after) and torch.isfinite(after).all()


@pytest.mark.parametrize("build", [qwen3_vl, llava])
def test_images_stay_with_their_rows(build, tmp_path):
    """Old log-probs are taken in generation order, the loss sees shuffled parts: equal only with the right pictures."""
    watch = Watch()
    trainer = trainer_of(build, tmp_path, [watch], per_device=8, slices=4, steps=1)
    trainer.train()
    assert len(watch.gaps) == 1 and watch.gaps[0] < 1e-5
    batch = trainer.last_ctx.batch
    with torch.no_grad():
        logps, _ = trainer.score_tokens(batch)
        ids, mask = batch.sequences()
        images = [images_of(t.row.prompt) for t in batch.trajs]
        given = model_inputs(trainer.processing_class, trainer.model, ids, images)
        scores = trainer.model(input_ids=ids, attention_mask=mask, **given).logits.log_softmax(-1)
        plain = scores[:, :-1].gather(2, ids[:, 1:, None])[..., 0][:, -logps.size(1) :]
        assert ((logps - plain) * batch.model_mask_ST).abs().max() < 1e-5
        for t in batch.trajs:
            t.row.prompt[0]["content"][0]["image"] = drawn("blue", "blue")
        other, _ = trainer.score_tokens(batch)
    assert ((logps - other) * batch.model_mask_ST).abs().max() > 1e-3  # the picture matters


def test_one_answer_without_tools(tmp_path):
    task = Pictures(name="pictures")
    task.tools = None
    trainer = trainer_of(qwen3_vl, tmp_path, [Tapo()], task=task, per_device=16)
    trainer.train()
    assert trainer.state.global_step == 2


# ---------------------------------------------------------------- what is refused


class HalfOf(Method):
    name = "half"

    def select(self, batch, ctx):
        return batch.take(list(range(batch.rows // 2)))


def test_dropping_rollouts_with_images_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="take no images"):
        trainer_of(llava, tmp_path, [HalfOf()]).train()


def test_a_text_model_cannot_take_images(random_model):
    picture = drawn("red", "blue")
    with pytest.raises(ConfigError, match="reads text only"):
        model_inputs(None, random_model.model, torch.tensor([[1]]), [[picture]])
    assert model_inputs(None, random_model.model, torch.tensor([[1]]), [[]]) == {}
    assert images_of("plain") == [] and images_of([{"role": "user", "content": "plain"}]) == []


# ---------------------------------------------------------------- the command


@pytest.mark.slow
def test_assay_train_with_a_task_of_pictures(tmp_path):
    """A folder of weights with its processor, a task from outside the clone, two steps with TAPO, a full record."""
    tokenizer = tiny_tokenizer(SYMBOLS)
    kind, config, processor = llava(tokenizer)
    torch.manual_seed(1)
    model = kind(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    for part in (model, processor):
        part.save_pretrained(tmp_path / "llava")
    (tmp_path / "conf" / "task").mkdir(parents=True)
    (tmp_path / "pictures_task.py").write_text("from test_vision import Pictures\n")
    task = "# Pictures.\n_target_: pictures_task.Pictures\nname: pictures\nmax_completion_tokens: 12\n"
    (tmp_path / "conf" / "task" / "pictures.yaml").write_text(task)
    paths = [str(tmp_path), str(Path(__file__).parent), str(Path(__file__).resolve().parents[2])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    words = ["train", "--config-dir", str(tmp_path / "conf"), "task=pictures", "model=hf", "method=[tapo]", "scale=cpu"]
    words += [f"model.path={tmp_path / 'llava'}", "model.dtype=float32", "trainer.max_steps=2", "trainer.save_every=2"]
    words += ["trainer.prompts_per_step=4", "eval.every=0", "eval.items=4", f"results_dir={tmp_path / 'out'}"]
    line = [str(Path(sys.executable).with_name("assay")), *words]
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    run = Path(done.stdout.strip().splitlines()[-1])
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [1, 2] and all("tapo/rho_traj" in m for m in metrics)
    assert (run / "summary.json").exists() and (run / "model" / "processor_config.json").exists()
