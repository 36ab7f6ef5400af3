"""A local folder of a vision-language model, a tiny one with random weights, answers through the same interface."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.curation.caption_folder import LocalModel
from sora_train.core.cli import InputError
from tests.data_tools.curation import films

pytestmark = pytest.mark.campaign  # a quarter of a minute, for transformers alone
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def write_model(folder: Path) -> None:
    """A LLaVA of some thousand weights, saved as `transformers` does."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    words = ["<unk>", "</s>", "<image>", "a", "red", "ball", "rolls", "describe", "the", "clip"]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="</s>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=2, image_seq_length=4)
    LlavaForConditionalGeneration(config).eval().save_pretrained(folder)
    pictures = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        pictures, fast, patch_size=14, vision_feature_select_strategy="default", chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip


def jpeg(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG")
    return buffer.getvalue()


def test_a_folder_answers_with_words_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match=r"neither a server's address nor a folder with a config\.json"):
        LocalModel(str(tmp_path))
    write_model(tmp_path)
    model = LocalModel(str(tmp_path))
    pictures = [jpeg(frame) for frame in films.shot(1, 3)]
    first = model.ask("describe the clip", pictures, 0.0, 6)
    assert first == model.ask("describe the clip", pictures, 0.0, 6)
    assert set(first.text.split()) <= {"a", "red", "ball", "rolls", "describe", "the", "clip", "<unk>"}
    assert "describe the clip" not in first.text or len(first.text.split()) > 3  # the prompt isn't handed back
    assert isinstance(first.cut_off, bool) and model.ask("describe", pictures[:1], 0.8, 3).text is not None
    model.close()
