"""Captions to rows of the table of words: fixed values, because a trained network depends on them."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import torch
from omegaconf import DictConfig

from sora_train.demo_world import scenes as shapes_world
from sora_train.models.text.encoder import TextEncoder, tokenize, tokenize_captions


def test_rows_are_fixed() -> None:
    assert tokenize("A red square, 12 км 猫", 2048, 128) == [
        (0, 0), (1617, 102), (1290, 681), (1188, 1853), (1205, 1350), (1384, 317), (1514, 337), (229, 1671), (267, 138)
    ]  # fmt: skip


def test_an_empty_caption_is_the_start_token() -> None:
    assert tokenize("", 2048, 128) == tokenize(" \n_", 2048, 128) == [(0, 0)]


def test_no_two_words_of_the_demo_share_both_rows(compose_tree: Callable[..., DictConfig]) -> None:
    """With one row a word `triangle` was a comma, and the shape was never learned."""
    config = compose_tree("experiment=demo").text_encoder
    rng = np.random.default_rng(0)
    scenes = [shapes_world.make_scene(rng, split) for split in 400 * shapes_world.SPLITS]
    captions = " ".join(text for scene in scenes for text in shapes_world.captions(scene, rng).values())
    words = sorted(set(re.findall(r"\w+|,|:", captions)))
    rows = {word: tokenize(word, config.buckets, 2)[1] for word in words}
    assert len(words) > 60 and len(set(rows.values())) == len(words)


def test_words_digits_signs_and_characters_are_tokens_of_their_own() -> None:
    assert len(tokenize("don't", 2048, 128)) == 1 + 3
    assert len(tokenize("2024", 2048, 128)) == 1 + 4
    assert len(tokenize("東京の猫", 2048, 128)) == 1 + 4
    assert len(tokenize("Größe naïve", 2048, 128)) == 1 + 2
    assert tokenize("Red  SQUARE", 2048, 128) == tokenize("red square", 2048, 128)


def test_rows_stay_in_their_range_and_zero_is_the_start_alone() -> None:
    start, *rows = tokenize(" ".join(map(chr, range(33, 2000))), 64, 10_000)
    assert start == (0, 0) and min(map(min, rows)) == 1 and max(map(max, rows)) == 63


def test_long_captions_are_cut() -> None:
    assert len(tokenize("word " * 500, 2048, 128)) == 128


def test_captions_are_packed_end_to_end() -> None:
    ids_L2, lengths = tokenize_captions(["a red square", "", "x"], 2048, 128)
    assert lengths == (4, 1, 2)
    assert ids_L2.dtype == torch.long
    rows = [*tokenize("a red square", 2048, 128), (0, 0), *tokenize("x", 2048, 128)]
    assert ids_L2.tolist() == [list(pair) for pair in rows]


def test_captions_in_one_pack_know_nothing_of_each_other_and_order_matters() -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(16, 2, 2, 64)
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(0.2 * torch.randn_like(p))
    ids_L2, lengths = tokenize_captions(["red above blue", "", "blue above red"], 64, 32)
    together = encoder(ids_L2, lengths)
    apart = [encoder(*tokenize_captions([text], 64, 32)) for text in ("red above blue", "", "blue above red")]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together[1], together[-1], atol=1e-2), "`red` first and `red` last"
    assert encoder(torch.zeros(0, 2, dtype=torch.long), ()).shape == (0, 16)
