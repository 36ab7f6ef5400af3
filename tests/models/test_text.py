"""Captions to ids: fixed values, because a trained network depends on them."""

from __future__ import annotations

import torch

from sora_train.models.text import TextEncoder, tokenize, tokenize_captions


def test_ids_are_fixed() -> None:
    assert tokenize("A red square, 12 км 猫", 8192, 128) == [0, 1084, 4825, 6136, 2683, 3776, 5314, 2512, 296]


def test_an_empty_caption_is_the_start_token() -> None:
    assert tokenize("", 8192, 128) == tokenize(" \n_", 8192, 128) == [0]


def test_words_digits_signs_and_characters_are_tokens_of_their_own() -> None:
    assert len(tokenize("don't", 8192, 128)) == 1 + 3
    assert len(tokenize("2024", 8192, 128)) == 1 + 4
    assert len(tokenize("東京の猫", 8192, 128)) == 1 + 4
    assert len(tokenize("Größe naïve", 8192, 128)) == 1 + 2
    assert tokenize("Red  SQUARE", 8192, 128) == tokenize("red square", 8192, 128)


def test_ids_stay_in_their_range_and_zero_is_the_start_alone() -> None:
    ids = tokenize(" ".join(map(chr, range(33, 2000))), 64, 10_000)
    assert ids[0] == 0 and min(ids[1:]) >= 1 and max(ids) == 63


def test_long_captions_are_cut() -> None:
    assert len(tokenize("word " * 500, 8192, 128)) == 128


def test_captions_are_packed_end_to_end() -> None:
    ids_L, lengths = tokenize_captions(["a red square", "", "x"], 8192, 128)
    assert lengths == (4, 1, 2)
    assert ids_L.dtype == torch.long
    assert ids_L.tolist() == [*tokenize("a red square", 8192, 128), 0, *tokenize("x", 8192, 128)]


def test_captions_in_one_pack_know_nothing_of_each_other_and_order_matters() -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(16, 2, 2, 64, 32)
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(0.2 * torch.randn_like(p))
    ids_L, lengths = tokenize_captions(["red above blue", "", "blue above red"], 64, 32)
    together = encoder(ids_L, lengths)
    apart = [encoder(*tokenize_captions([text], 64, 32)) for text in ("red above blue", "", "blue above red")]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together[1], together[-1], atol=1e-2), "`red` first and `red` last"
    assert encoder(torch.zeros(0, dtype=torch.long), ()).shape == (0, 16)
