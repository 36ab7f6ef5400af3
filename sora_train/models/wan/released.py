"""Shape of a released Wan transformer, in the layout of diffusers or of Wan's own repository. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sora_train.config.released import folder_of, read_config, second_transformer
from sora_train.core.cli import InputError
from sora_train.models.wan.original import is_original, original_shape

ROPE_THETA = 10000.0  # fixed in diffusers
_ALL = {"rope_theta": ROPE_THETA, "absolute_positions": False, "pooled_text": False, "activation": "gelu"}
_FIXED = {  # values of a released configuration that our DiT supports
    "qk_norm": "rms_norm_across_heads", "cross_attn_norm": True, "eps": 1e-6, "image_dim": None,
    "added_kv_proj_dim": None, "pos_embed_seq_len": None,
}  # fmt: skip


def transformer_shape(path: str | Path) -> dict[str, Any]:
    """Read the shape of a Wan transformer: keys of `WanConfig`, and `channels` and `text_width` in addition.

    Of a `WanTransformer3DModel` of diffusers, or of a checkpoint in the layout of Wan's own repository.

    Raises InputError for another class, and for Wan models with parts that our DiT doesn't have (Wan 2.1's
    image-to-video models have an image encoder with keys and values of its own).
    """
    if second_transformer(path):
        raise InputError(
            f"model.init_from={path} has two transformers, one for each half of the noise; only models of one are "
            "trained here (Wan 2.1 T2V, Wan 2.2 TI2V-5B)"
        )
    if is_original(path):
        return original_shape(path) | _ALL
    folder = folder_of(path, "transformer")
    c = read_config(folder, "transformer", "model.init_from")
    if c.get("_class_name") != "WanTransformer3DModel":
        raise InputError(
            f"{folder} holds a {c.get('_class_name')}; model.init_from reads WanTransformer3DModel (of diffusers) and "
            "WanModel (of Wan's own repository)"
        )
    wrong = {key: c[key] for key, value in _FIXED.items() if c.get(key, value) != value}
    time, height, width = c["patch_size"]
    if time != 1 or height != width:
        wrong["patch_size"] = c["patch_size"]
    if c["in_channels"] != c["out_channels"]:
        wrong["in_channels"] = c["in_channels"]
    if wrong:
        raise InputError(f"{folder} has {wrong}, which our transformer doesn't know; use a text-to-video or TI2V model")
    return {
        "width": c["num_attention_heads"] * c["attention_head_dim"], "depth": c["num_layers"],
        "heads": c["num_attention_heads"], "ffn": c["ffn_dim"], "patch": height, "frequencies": c["freq_dim"],
        "channels": c["in_channels"], "text_width": c["text_dim"], **_ALL,
    }  # fmt: skip
