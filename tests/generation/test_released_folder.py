"""A released pipeline's folder is sampled without a run, with adapters in every form that people share."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from sora_train import evaluate, export
from sora_train.config.load import build, to_yaml
from sora_train.core.cli import InputError
from sora_train.models.video_model import starting_model
from sora_train.models.wan.adapter_files import read_adapters
from sora_train.models.wan.convert import load_wan, save_wan
from sora_train.models.wan.model import DiT
from sora_train.models.wan.released import transformer_shape
from sora_train.models.wan.settings import WanConfig
from sora_train.operations.inputs import note_inputs
from sora_train.training.state.checkpoint import Checkpoints
from tests.models.test_released import write_pipeline

Give = Callable[..., None]
SMALL = ("steps=1", "seconds=0.4", "height=32", "width=32", "format=frames")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_pipeline(tmp_path_factory.mktemp("wan"))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"flow_shift": 3.0}))
    return folder


def pixels(name: str) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(Path(name).glob("*.png")))


def adapters() -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of two layers of the tiny transformer (24 wide, MLP of 48), by the names of diffusers."""
    torch.manual_seed(3)
    return {
        "blocks.0.attn1.to_q": (torch.randn(2, 24), torch.randn(24, 2)),
        "blocks.0.ffn.net.0.proj": (torch.randn(2, 24), torch.randn(48, 2)),
    }


ORIGINAL = {"blocks.0.attn1.to_q": "blocks.0.self_attn.q", "blocks.0.ffn.net.0.proj": "blocks.0.ffn.0"}


def write_adapters(folder: Path) -> list[str]:
    """The same adapters in the forms of diffusers, ComfyUI and kohya (whose alpha is half the rank, its B twice)."""
    forms: dict[str, dict[str, Tensor]] = {"diffusers": {}, "comfy": {}, "kohya": {}}
    for name, (down, up) in adapters().items():
        forms["diffusers"] |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
        its = f"diffusion_model.{ORIGINAL[name]}"
        forms["comfy"] |= {f"{its}.lora_A.weight": down, f"{its}.lora_B.weight": up}
        flat = "lora_unet_" + ORIGINAL[name].replace(".", "_")
        forms["kohya"] |= {
            f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": 2 * up, f"{flat}.alpha": torch.tensor(1.0),
        }  # fmt: skip
    for form, tensors in forms.items():
        save_file(tensors, folder / f"{form}.safetensors")
    return [f"{form}.safetensors" for form in forms]


def test_a_released_folder_is_sampled_with_its_scheduler(sample: Give, pipeline: Path) -> None:
    sample(f"run_dir={pipeline}", "prompt=a block", *SMALL, "out=one")
    options = json.loads(Path("one.json").read_bytes())["options"]
    assert (options["shift"], options["guidance"], options["fps"]) == (3.0, 5.0, 16.0)
    sample("from=one.json", "out=again")
    assert pixels("one") == pixels("again")
    with pytest.raises(InputError, match="is no run, so it has no checkpoint"):
        sample(f"run_dir={pipeline}", "prompt=a", "checkpoint=1")


def test_a_transformer_in_wans_own_layout_is_sampled_with_the_other_parts_of_a_release(
    sample: Give, pipeline: Path, folder: Path
) -> None:
    shape = transformer_shape(pipeline / "transformer")
    small = {name: shape[name] for name in ("width", "depth", "heads", "ffn", "frequencies")}
    dit = DiT(shape["channels"] * 4, *list(small.values())[:4], shape["text_width"], frequencies=shape["frequencies"])
    load_wan(dit, pipeline / "transformer")
    its = WanConfig(**small, absolute_positions=False, pooled_text=False, rope_theta=10000.0)
    weights = {name: p.detach() for name, p in dit.named_parameters()}
    save_wan(weights, its, shape["text_width"], folder / "own", layout="original")
    sample(f"run_dir={pipeline}", "prompt=a block", *SMALL, "out=whole")
    sample("run_dir=own", f"base={pipeline}", "prompt=a block", *SMALL, "out=parts")
    assert pixels("whole") == pixels("parts")
    sample("from=parts.json", "out=again")
    assert pixels("again") == pixels("parts")
    for base in ((), ("base=own",)):
        with pytest.raises(InputError, match="own is in the layout of Wan's own repository, .* base=FOLDER"):
            sample("run_dir=own", *base, "prompt=a block", *SMALL, "out=none")
    with pytest.raises(InputError, match="is a file, in which no samples can be put"):
        sample("run_dir=own/diffusion_pytorch_model.safetensors", f"base={pipeline}", "prompt=a block")


def test_adapters_of_every_form_add_the_same_with_their_weights(sample: Give, pipeline: Path, folder: Path) -> None:
    forms = write_adapters(folder)
    sample(f"run_dir={pipeline}", "prompt=a block", *SMALL, "out=plain")
    for form in forms:
        sample(f"run_dir={pipeline}", "prompt=a block", *SMALL, f"lora={form}:0.5", f"out={form[:-12]}")
    sample(f"run_dir={pipeline}", "prompt=a block", *SMALL, f"lora=[{forms[0]}:0.25,{forms[1]}:0.25]", "out=two")
    assert pixels("plain") != pixels("diffusers")
    assert pixels("diffusers") == pixels("comfy") == pixels("kohya"), "one file in three forms"
    one, two = (
        np.stack([np.asarray(Image.open(p), int) for p in sorted(Path(n).glob("*.png"))]) for n in ("comfy", "two")
    )
    assert np.abs(one - two).max() <= 1, "the halves of an adapter add up, but for how a sum is rounded"


def test_two_experts_and_strange_adapters_are_refused(sample: Give, pipeline: Path, folder: Path) -> None:
    whole = folder / "two"
    whole.mkdir()
    (whole / "model_index.json").write_text(json.dumps({"transformer_2": ["diffusers", "WanTransformer3DModel"]}))
    with pytest.raises(InputError, match="has two transformers"):
        sample(f"run_dir={whole}", "prompt=a")
    (file,) = write_adapters(folder)[:1]
    tensors = load_file(file)
    name = next(iter(tensors))
    for wrong, message in (
        ({name: tensors[name]}, "half of an adapter"), ({"x.diff": tensors[name]}, "no low-rank adapter"),
    ):  # fmt: skip
        save_file(wrong, "wrong.safetensors")
        with pytest.raises(InputError, match=message):
            read_adapters("wrong.safetensors")
    other = {key.replace("blocks.0", "blocks.9"): value for key, value in tensors.items()}
    save_file(other, "other.safetensors")
    with pytest.raises(InputError, match=r"adapts blocks\.9\.\S+, which this model doesn't have"):
        sample(f"run_dir={pipeline}", "prompt=a", *SMALL, "lora=other.safetensors")
    Path("text.safetensors").write_text("no")
    with pytest.raises(InputError, match="can't be read as safetensors"):
        sample(f"run_dir={pipeline}", "prompt=a", *SMALL, "lora=text.safetensors")


def test_the_base_of_adapters_may_be_moved_and_not_be_replaced(
    sample: Give, pipeline: Path, folder: Path, compose_tree: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, moved, run = folder / "base", folder / "moved", folder / "lora"
    shutil.copytree(pipeline, base)
    keys = [f"{key}={base}" for key in ("model.init_from", "vae.path", "text_encoder.path")]
    more = ("flow.prediction=velocity", "model.lora.rank=2", "optim.matrices=adamw", "data.max_pixels=1024")
    config = build(compose_tree("experiment=demo", *keys, *more, f"run_dir={run}"))
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(config))
    note_inputs(config, "none")
    torch.manual_seed(5)
    trained = {name: torch.randn_like(p) for name, p in starting_model(config).named_parameters() if p.requires_grad}
    pieces = {f"ema/model/{name}": (0, p.reshape(-1)) for name, p in trained.items()}
    checkpoints = Checkpoints(run / "checkpoints", keep=2)
    checkpoints.save(1, pieces, {"step": 1, "shapes": {f"model/{name}": tuple(p.shape) for name, p in trained.items()}})
    assert checkpoints.wait()
    sample(f"run_dir={run}", "prompt=a block", *SMALL, "out=there")
    base.rename(moved)
    sample(f"run_dir={run}", "prompt=a block", *SMALL, f"base={moved}", "out=again")
    assert pixels("there") == pixels("again")
    with pytest.raises(InputError, match="no .* at .*base"):
        sample(f"run_dir={run}", "prompt=a block", *SMALL, "out=gone")

    (file,) = (moved / "transformer").glob("*.safetensors")
    save_file({name: tensor + 0.1 for name, tensor in load_file(file).items()}, file)
    said = r"model.init_from=.*moved holds other weights than those that the checkpoints .*base=FOLDER"
    for its in ([f"base={moved}"], [f"base={moved}", f"vae={pipeline}"]):  # another VAE was asked for, no other base
        with pytest.raises(InputError, match=said):
            sample(f"run_dir={run}", "prompt=a block", *SMALL, *its, "out=swapped")
    for command, its in ((export, ["out=out", "format=adapter"]), (evaluate, ["prompts=p.txt", "metrics=flicker"])):
        monkeypatch.setattr(sys, "argv", ["command", f"run_dir={run}", f"base={moved}", *its])
        with pytest.raises(InputError, match=said):
            command.main()
