"""Tiny random vision-language models, their processors, and batches of them with several images a row, or none."""

from __future__ import annotations

import tiny
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

IMAGE, START, END = tiny.VOCABULARY, tiny.VOCABULARY + 1, tiny.VOCABULARY + 2
SIZES = {**tiny.SIZES, "vocab_size": tiny.VOCABULARY + 4}
SIDE, PATCH = 8, 4
_VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE,
    "patch_size": PATCH,
}  # fmt: skip


def _llava():
    text = LlamaConfig(**SIZES)
    return LlavaForConditionalGeneration(LlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION), text_config=text, image_token_index=IMAGE, image_seq_length=4,
        vision_feature_layer=-1,
    ))  # fmt: skip


def _qwen():
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": PATCH,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": SIZES["hidden_size"], "window_size": 16,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    text = {**SIZES, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, vision_start_token_id=START,
        vision_end_token_id=END, video_token_id=IMAGE + 3,
    ))  # fmt: skip


def _gemma():
    """Its image tokens attend both ways, by token_type_ids."""
    text = Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=16)
    return Gemma3ForConditionalGeneration(Gemma3Config(
        text_config=text, vision_config=SiglipVisionConfig(**_VISION, vision_use_head=False), mm_tokens_per_image=4,
        image_token_index=IMAGE, boi_token_index=START, eoi_token_index=END,
    ))  # fmt: skip


MODELS = {"llava": _llava, "qwen": _qwen, "gemma": _gemma}
TOKENS = 4  # of an image in a row, for each of them


def build(name: str, seed: int = 0):
    torch.manual_seed(seed)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2 and parameter.any():
                parameter.mul_(4.0)
            elif parameter.ndim == 2:  # Gemma's projector starts at nothing
                parameter.normal_(std=0.2)
    model.config._name_or_path = f"tiny-{name}"
    return model.eval()


def processor() -> LlavaProcessor:
    """LLaVA's, whose chat template is the texts one after another."""
    words = tiny.tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<image>", "<start>", "<end>"]})
    template = (
        "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}"
        "{% endif %}{% endfor %}{% endif %}{% endfor %}"
    )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_convert_rgb=True
    )
    return LlavaProcessor(
        image_processor=images, tokenizer=words, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template,
    )  # fmt: skip


def picture(number: int) -> Image.Image:
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(256, (SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def inputs(name: str, counts=(1, 0, 2, 1), response: int = 5, seed: int = 0) -> dict[str, object]:
    """A batch as GRPOTrainer makes it, with so many images in each row; left-padded prompts."""
    generator = torch.Generator().manual_seed(seed)
    images, rows = sum(counts), len(counts)
    prompts = []
    for count in counts:
        text = torch.randint(4, tiny.VOCABULARY, (3,), generator=generator).tolist()
        prompts.append([1, *([START, *[IMAGE] * TOKENS, END] * count), *text])
    width = max(map(len, prompts))
    prompt_ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
    prompt_mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    completion_ids = torch.randint(4, tiny.VOCABULARY, (rows, response), generator=generator)
    completion_mask = torch.ones_like(completion_ids)
    completion_mask[0, 3:] = 0
    shape = completion_ids.shape
    old, ref = (-3.4 + 0.2 * torch.randn(shape, generator=generator) for _ in range(2))
    found = {
        "prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "completion_ids": completion_ids * completion_mask,
        "completion_mask": completion_mask, "advantages": torch.linspace(-1.0, 1.5, rows),
        "num_items_in_batch": completion_mask.sum(), "old_per_token_logps": old, "ref_per_token_logps": ref,
        "num_images": list(counts),
    }  # fmt: skip
    types = torch.nn.functional.pad((prompt_ids == IMAGE).long(), (0, response))
    if name == "qwen":
        # Two sizes: 4 x 4 patches of which 2 x 2 make a token, and 2 x 8.
        grids = torch.tensor([[1, 4, 4], [1, 2, 8]])[torch.arange(images) % 2]
        patches = int(grids.prod(-1).sum())
        pixels = torch.randn(patches, 3 * 2 * PATCH * PATCH, generator=generator)
        return {**found, "pixel_values": pixels, "image_grid_thw": grids, "mm_token_type_ids": types}
    pixels = torch.randn(images, 3, SIDE, SIDE, generator=generator)
    return {**found, "pixel_values": pixels, **({"token_type_ids": types} if name == "gemma" else {})}
