"""A released VAE and text encoder in a run of ours, and the run's model in a pipeline of diffusers."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from omegaconf import DictConfig
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel, UMT5ForConditionalGeneration

from sora_train import export
from sora_train.config.cost import geometry
from sora_train.config.load import build, load, to_yaml
from sora_train.config.released import expands_timesteps
from sora_train.config.schema import Config, TileConfig
from sora_train.core.batch import Clip, Pack
from sora_train.core.cli import InputError
from sora_train.encoding.captions import tokenizer
from sora_train.encoding.vae import FrozenVae
from sora_train.generation.sampler import Sampler, request_for
from sora_train.methods.diffusion.learner import start
from sora_train.models.video_model import starting_model, whole_weights
from sora_train.models.video_vae.released import ReleasedVae
from sora_train.models.video_vae.tiling import in_time

CPU = torch.device("cpu")
WORDS = ["<pad>", "</s>", "<unk>", "a", "block", "of", "light", "number"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("wan"))


def write_pipeline(folder: Path) -> Path:
    """A folder like a released Wan pipeline, everything in it tiny and random."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 1.0, 2.0, 1.5],
    )  # fmt: skip
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    text = UMT5EncoderModel(
        UMT5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
    )
    wan = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=48, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip
    for name, part in (("vae", vae), ("text_encoder", text), ("transformer", wan)):
        part.save_pretrained(folder / name)
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder / "tokenizer")
    (folder / "model_index.json").write_text("{}")
    return folder


@pytest.fixture
def config(compose_tree: Callable[..., DictConfig], pipeline: Path) -> Config:
    keys = ("model.init_from", "vae.path", "text_encoder.path")
    more = ("flow.prediction=velocity", "flow.guidance=2", "flow.sampling_steps=1")
    text = ("text_encoder.pad_to=512", "text_encoder.max_tokens=512")
    return build(compose_tree("experiment=demo", *(f"{key}={pipeline}" for key in keys), *text, *more))


def test_the_shapes_of_released_models_replace_those_of_the_configuration(config: Config) -> None:
    assert (config.model.width, config.model.depth, config.model.heads, config.model.ffn) == (24, 1, 2, 48)
    assert (config.model.patch, config.model.rope_theta, config.model.absolute_positions) == (2, 10000.0, False)
    assert (config.vae.channels, config.vae.temporal_stride, config.vae.spatial_stride) == (4, 4, 8)
    assert config.text_encoder.width == 16
    assert geometry(config).grid(5, 32, 48) == (2, 2, 3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("vae.channels=6",), "4 latent channels, the VAE 6"),
        (("vae.channels=4", "text_encoder.width=128"), "text 16 wide, the text encoder gives 128"),
        (("model.init_from=null", "text_encoder.pad_to=512"), "text_encoder.pad_to is for a released encoder"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    compose_tree: Callable[..., DictConfig], pipeline: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build(compose_tree("experiment=demo", f"model.init_from={pipeline}", *overrides), need_vae=False)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.init_from=nowhere", "no transformer at model.init_from=nowhere"),
        ("text_encoder.path=nowhere", "no text encoder at text_encoder.path=nowhere"),
    ],
)
def test_a_run_needs_the_folders_it_names(
    compose_tree: Callable[..., DictConfig], pipeline: Path, override: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build(compose_tree("experiment=demo", f"vae.path={pipeline}", override))


def test_the_vae_gives_diffusers_latents_normalised(config: Config, pipeline: Path) -> None:
    vae, theirs = FrozenVae.load(config.vae, CPU), AutoencoderKLWan.from_pretrained(pipeline / "vae")
    video = torch.randint(0, 256, (1, 3, 5, 16, 16), dtype=torch.uint8)
    latents = vae.encode(video)
    with torch.no_grad():
        mean = theirs.encode(video / 127.5 - 1).latent_dist.mean
        decoded = theirs.decode(mean).sample
    shift, scale = (torch.tensor(getattr(theirs.config, n)).view(4, 1, 1, 1) for n in ("latents_mean", "latents_std"))
    torch.testing.assert_close(latents, (mean - shift) / scale, rtol=1e-4, atol=1e-5)
    frames = vae.decode(latents[0])
    assert frames.shape == (5, 16, 16, 3)
    expected = ((decoded[0].permute(1, 2, 3, 0) + 1) * 127.5).clamp(0, 255).round().numpy()
    assert np.abs(frames.astype(int) - expected).max() <= 1
    assert not any(p.requires_grad for p in vae.vae.parameters())


def test_captions_become_diffusers_prompt_embeddings(config: Config, pipeline: Path) -> None:
    """Padded with zeros to 512 tokens, whatever else is in the batch."""
    parts = (AutoencoderKLWan, WanTransformer3DModel)
    vae, wan = (c.from_pretrained(pipeline / name) for c, name in zip(parts, ("vae", "transformer"), strict=True))
    encoder = UMT5EncoderModel.from_pretrained(pipeline / "text_encoder")
    theirs = WanPipeline(
        PreTrainedTokenizerFast.from_pretrained(pipeline / "tokenizer"), encoder, vae, scheduler=None, transformer=wan
    )
    captions = ["a block of light &amp; number", "", "light  a"]
    text_LE, lengths = tokenizer(config, CPU)(captions)
    assert lengths == (512, 512, 512)
    with torch.no_grad():
        embedded, _ = theirs.encode_prompt(captions, max_sequence_length=512, do_classifier_free_guidance=False)
    torch.testing.assert_close(text_LE.unflatten(0, (3, 512)), embedded, rtol=1e-5, atol=1e-5)
    assert text_LE[:7].any(1).all() and not text_LE[7:512].any()
    assert not text_LE.requires_grad


def test_a_run_starts_from_released_weights_and_trains_the_transformer_alone(
    config: Config, pipeline: Path, make_clip: Callable[..., Clip]
) -> None:
    learner = start(config, CPU)
    network = learner.networks["video"].module
    wan = WanTransformer3DModel.from_pretrained(pipeline / "transformer")
    assert torch.equal(network.dit.blocks[0].self_attention.q.weight, wan.blocks[0].attn1.to_q.weight)
    pack = Pack([make_clip((5, 32, 32), 1, "image_to_video"), make_clip((1, 16, 32), 2, "image")])
    learner.loss(network, pack).sum.backward()
    assert [name for name, _ in network.named_parameters() if not name.startswith("dit.")] == []
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (20, 3.0)])
def test_an_export_runs_in_a_wan_pipeline_and_gives_what_our_sampler_gives(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, shift: float
) -> None:
    """With the schedule that is written into it: the same steps, of the same lengths."""
    flow = replace(config.flow, sampling_steps=steps, shift=shift, shift_tokens=0)
    config = replace(config, flow=flow)
    torch.manual_seed(1)
    network = start(config, CPU).networks["video"].module.requires_grad_(False)
    for p in network.parameters():
        p.add_(0.05 * torch.randn_like(p))
    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(config))
    monkeypatch.setattr(export, "trained_weights", lambda _: network.state_dict())
    monkeypatch.setattr(sys, "argv", ["export", f"run_dir={run}", f"out={out}", "format=diffusers"])
    assert export.main() == 0
    pipe = WanPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    request = request_for(config, "a block", (5, 32, 32), 3)
    noise = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    theirs = pipe(
        "a block", height=32, width=32, num_frames=5, num_inference_steps=steps, guidance_scale=2.0,
        max_sequence_length=512, latents=noise.unsqueeze(0), output_type="latent",
    ).frames[0]  # fmt: skip
    sampler = Sampler(config, network, FrozenVae.load(config.vae, CPU), CPU)
    denormalised: list[torch.Tensor] = []
    monkeypatch.setattr(sampler.vae, "decode", lambda x: denormalised.append(x) or np.zeros(1))
    sampler.videos([request])
    assert (denormalised[0] - theirs).abs().max() < 1e-5 * theirs.abs().max()
    video = pipe("a block", height=32, width=32, num_frames=5, num_inference_steps=1, output_type="np").frames[0]
    assert video.shape == (5, 32, 32, 3) and np.isfinite(video).all()


@pytest.mark.parametrize("steps", [1, 20])
def test_a_ti2v_export_makes_of_an_image_what_our_sampler_makes(
    compose_tree: Callable[..., DictConfig],
    pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
) -> None:
    """In the pipeline that takes images, where each token of the given frame has timestep 0."""
    base, run, out = tmp_path / "base", tmp_path / "run", tmp_path / "out"
    shutil.copytree(pipeline, base)
    (base / "model_index.json").write_text(json.dumps({"expand_timesteps": True}))
    keys = [f"{key}={base}" for key in ("model.init_from", "vae.path", "text_encoder.path")]
    more = ("flow.prediction=velocity", "flow.guidance=2", f"flow.sampling_steps={steps}", "flow.shift=3")
    text = ("text_encoder.pad_to=512", "text_encoder.max_tokens=512")
    config = build(compose_tree("experiment=demo", *keys, *more, *text))
    torch.manual_seed(1)
    network = start(config, CPU).networks["video"].module.requires_grad_(False)
    for p in network.parameters():
        p.add_(0.05 * torch.randn_like(p))
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(config))
    monkeypatch.setattr(export, "trained_weights", lambda _: network.state_dict())
    monkeypatch.setattr(sys, "argv", ["export", f"run_dir={run}", f"out={out}", "format=diffusers"])
    assert export.main() == 0
    monkeypatch.setattr("diffusers.pipelines.wan.pipeline_wan_i2v.prompt_clean", str)  # else it wants ftfy
    pipe = WanImageToVideoPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.config.expand_timesteps
    image = np.random.default_rng(2).integers(0, 256, (32, 32, 3), np.uint8)
    noise = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    theirs = pipe(
        Image.fromarray(image), "a block", height=32, width=32, num_frames=5, num_inference_steps=steps,
        guidance_scale=2.0, max_sequence_length=512, latents=noise.unsqueeze(0), output_type="latent",
    ).frames[0]  # fmt: skip
    sampler = Sampler(config, network, FrozenVae.load(config.vae, CPU), CPU)
    given = sampler.vae.encode(torch.from_numpy(image).permute(2, 0, 1)[None, :, None])[0]
    request = replace(request_for(config, "a block", (5, 32, 32), 3), given=((0, given),))
    denormalised: list[torch.Tensor] = []
    monkeypatch.setattr(sampler.vae, "decode", lambda x: denormalised.append(x) or np.zeros(1))
    sampler.videos([request])
    assert (denormalised[0] - theirs).abs().max() < 1e-5 * theirs.abs().max()


ADAPTED = "q,k,v,out,mlp.0,mlp.2,text_in.0,text_in.2,time_in.0,time_in.2,time_modulation.1,out.project"


def test_adapters_on_released_weights_are_read_by_diffusers(
    compose_tree: Callable[..., DictConfig], pipeline: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Every layer that can be adapted: diffusers' transformer with our file gives what it gives with merged weights."""
    keys = [f"{key}={pipeline}" for key in ("model.init_from", "vae.path", "text_encoder.path")]
    lora = ("model.lora.rank=2", "model.lora.alpha=6", f"model.lora.targets=[{ADAPTED}]")
    config = build(compose_tree("experiment=demo", *keys, "flow.prediction=velocity", *lora))
    network = starting_model(config)
    torch.manual_seed(1)
    start = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}
    trained = {name: p + 0.2 * torch.randn_like(p) for name, p in start.items()}
    assert len(trained) == 2 * (8 + 2 + 2 + 2 + 1 + 1)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    monkeypatch.setattr(export, "trained_weights", lambda _: trained)
    for form in ("adapter", "diffusers"):
        arguments = ["export", f"run_dir={tmp_path}", f"out={tmp_path / form}", f"format={form}"]
        monkeypatch.setattr(sys, "argv", arguments)
        assert export.main() == 0
    plain, adapted = (WanTransformer3DModel.from_pretrained(pipeline / "transformer") for _ in range(2))
    adapted.load_lora_adapter(tmp_path / "adapter", use_safetensors=True)
    merged = WanTransformer3DModel.from_pretrained(tmp_path / "diffusers" / "transformer")
    inputs = (torch.randn(1, 4, 2, 4, 6), torch.tensor([300.0]), torch.randn(1, 5, 16))
    with torch.no_grad():
        base, expected, given = (wan(*inputs, return_dict=False)[0] for wan in (plain, merged, adapted))
    assert (expected - base).abs().max() > 0.1
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)
    pipe = WanPipeline.from_pretrained(tmp_path / "diffusers", transformer=plain)
    pipe.load_lora_weights(tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(pipe.transformer(*inputs, return_dict=False)[0], expected, rtol=1e-5, atol=1e-5)


def test_training_starts_from_adapters_in_either_layout(
    compose_tree: Callable[..., DictConfig], pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [f"{key}={pipeline}" for key in ("model.init_from", "vae.path", "text_encoder.path")]

    def configured(*more: str) -> Config:
        lora = (f"model.lora.targets=[{ADAPTED}]", "optim.matrices=adamw", *more)
        return build(compose_tree("experiment=demo", *keys, "flow.prediction=velocity", *lora))

    first = configured("model.lora.rank=2", "model.lora.alpha=6")
    torch.manual_seed(1)
    names = [name for name, p in starting_model(first).named_parameters() if p.requires_grad]
    trained = {
        name: p + 0.2 * torch.randn_like(p) for name, p in starting_model(first).state_dict().items() if name in names
    }
    (tmp_path / "config.yaml").write_text(to_yaml(first))
    monkeypatch.setattr(export, "trained_weights", lambda _: trained)
    expected = whole_weights(first, trained)
    for layout in ("diffusers", "original"):
        out = tmp_path / layout
        arguments = ["export", f"run_dir={tmp_path}", f"out={out}", "format=adapter", f"layout={layout}"]
        monkeypatch.setattr(sys, "argv", arguments)
        assert export.main() == 0
        second = configured("model.lora.rank=3", "model.lora.alpha=12", f"model.lora.init_from={out}")
        started = starting_model(second)
        own = {name: p.detach() for name, p in started.named_parameters() if p.requires_grad}
        merged = whole_weights(second, own)
        for name, values in expected.items():
            torch.testing.assert_close(merged[name], values, rtol=1e-5, atol=1e-6)
    layers = {key.rpartition(".lora_")[0] for key in load_file(tmp_path / "original/pytorch_lora_weights.safetensors")}
    assert {
        "diffusion_model.blocks.0.self_attn.q",
        "diffusion_model.blocks.0.ffn.2",
        "diffusion_model.head.head",
    } <= layers
    file = tmp_path / "original"
    for more, message in (
        (("model.lora.rank=1",), "has rank 2; set model.lora.rank=2 or higher"),
        (("model.lora.rank=2", "model.lora.targets=[q]"), "which model.lora.targets leaves out"),
        (("model.lora.rank=0",), "needs model.lora.rank"),
        (("model.lora.rank=2", "model.lora.init_from=nowhere.safetensors"), "there is no such file"),
    ):
        with pytest.raises(InputError, match=message):
            starting_model(configured(f"model.lora.init_from={file}", *more))


def test_an_export_copies_the_encoder_alone_and_splits_and_casts_weights(
    compose_tree: Callable[..., DictConfig], pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text encoder as a checkpoint of encoder and decoder with its tokenizer beside the weights."""
    text = tmp_path / "umt5"
    whole = UMT5ForConditionalGeneration(
        UMT5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
    )
    whole.save_pretrained(text)
    PreTrainedTokenizerFast.from_pretrained(pipeline / "tokenizer").save_pretrained(text)
    keys = (f"model.init_from={pipeline}", f"vae.path={pipeline}", f"text_encoder.path={text}")
    config = build(compose_tree("experiment=demo", *keys, "flow.prediction=velocity"))
    run, out, plain = tmp_path / "run", tmp_path / "out", tmp_path / "plain"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(config))
    monkeypatch.setattr(export, "trained_weights", lambda _: starting_model(config).state_dict())
    for given in ([f"out={out}", "format=diffusers", "dtype=bf16", "shard_gib=1e-5"], [f"out={plain}"]):
        monkeypatch.setattr(sys, "argv", ["export", f"run_dir={run}", *given])
        assert export.main() == 0
    assert sorted(path.suffix for path in (out / "tokenizer").iterdir()) == [".json"] * len(
        list((out / "tokenizer").iterdir())
    )
    pipe = WanPipeline.from_pretrained(out)
    assert type(pipe.text_encoder) is UMT5EncoderModel and not pipe.config.expand_timesteps
    files = list((out / "transformer").glob("*.safetensors"))
    assert len(files) > 1 and {t.dtype for file in files for t in load_file(file).values()} == {torch.bfloat16}
    assert sorted(path.name for path in plain.iterdir()) == ["config.yaml", "model.safetensors", "vae"]
    assert sorted(path.name for path in (plain / "vae").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert load(plain).vae.class_name == "AutoencoderKLWan"


def test_a_base_of_two_transformers_is_refused_and_given_frames_are_known(
    compose_tree: Callable[..., DictConfig], pipeline: Path, tmp_path: Path
) -> None:
    for name, index in (("a14b", {"transformer_2": ["diffusers", "X"]}), ("ti2v", {"expand_timesteps": True})):
        shutil.copytree(pipeline, tmp_path / name)
        (tmp_path / name / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="has two transformers, one for each half of the noise"):
        build(compose_tree("experiment=demo", f"model.init_from={tmp_path}/a14b"), need_vae=False)
    assert expands_timesteps(tmp_path / "ti2v") and not expands_timesteps(pipeline)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
@pytest.mark.parametrize("fault", ["pointer", "cut"])
def test_weights_that_are_not_whole_are_one_line(
    compose_tree: Callable[..., DictConfig], pipeline: Path, tmp_path: Path, part: str, fault: str
) -> None:
    folder = tmp_path / "wan"
    shutil.copytree(pipeline, folder)
    (file,) = (folder / part).glob("*.safetensors")
    data = file.read_bytes()
    file.write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid x\n" if fault == "pointer" else data[: len(data) // 2]
    )
    keys = [f"{key}={folder}" for key in ("model.init_from", "vae.path", "text_encoder.path")]
    config = build(compose_tree("experiment=demo", *keys, "flow.prediction=velocity"))
    with pytest.raises(InputError, match="pointer of Git LFS" if fault == "pointer" else "fetch it again") as error:
        start(config, CPU)
        tokenizer(config, CPU)(["a block"])
    assert "\n" not in str(error.value) and str(file) in str(error.value)


def test_adapters_beside_a_text_encoder_that_nobody_trained_are_refused(
    compose_tree: Callable[..., DictConfig], pipeline: Path
) -> None:
    keys = (f"model.init_from={pipeline}", "vae.channels=4", "text_encoder.width=16", "model.lora.rank=2")
    with pytest.raises(InputError, match="would stay at random"):
        build(compose_tree("experiment=demo", *keys), need_vae=False)


WAN_2_2 = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "decoder_base_dim": 8}


@pytest.mark.parametrize("more", [{}, WAN_2_2], ids=["2.1", "2.2"])
def test_a_released_vae_in_pieces_gives_what_diffusers_gives_for_the_whole(
    more: dict[str, object], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    theirs = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4, **more,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path)
    ours, video = ReleasedVae(tmp_path), torch.rand(1, 3, 21, 32, 48) * 2 - 1
    with torch.no_grad():
        posterior = theirs.encode(video).latent_dist
        expected = theirs.decode(posterior.mean).sample
        for size in (1, 2, 5):
            parts = list(ours.encode_pieces(in_time(video, 1 + 4 * size, 4 * size)))
            assert len(parts) == -(-5 // size)
            for n, whole in enumerate((posterior.mean, posterior.logvar)):
                torch.testing.assert_close(torch.cat([part[n] for part in parts], 2), whole, rtol=1e-5, atol=1e-6)
            pixels = list(ours.decode_pieces(in_time(posterior.mean, size, size)))
            torch.testing.assert_close(torch.cat(pixels, 2), expected, rtol=1e-5, atol=1e-6)


def test_a_large_video_goes_through_a_released_vae_in_bounded_memory(config: Config) -> None:
    """Tiles of 32 pixels with 16 around them: no convolution sees more, and the result is nearer to that of the whole
    than without. Not equal: in the middle of Wan's VAE every position of a frame attends to all others.
    """
    whole = FrozenVae.load(config.vae, CPU)
    parts, bare = (FrozenVae.load(replace(config.vae, tile=TileConfig(4, 32, around)), CPU) for around in (16, 0))
    video = torch.randint(0, 256, (1, 3, 1, 8, 12), dtype=torch.uint8)
    video = torch.nn.functional.interpolate(video[0].float().transpose(0, 1), (64, 96), mode="bilinear")
    video = video.transpose(0, 1).unsqueeze(0).expand(1, 3, 9, 64, 96).to(torch.uint8)
    seen: list[int] = []
    for part in (parts.vae.vae.encoder, parts.vae.vae.decoder):
        for layer in part.modules():
            if isinstance(layer, torch.nn.Conv3d):
                layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0][0, 0].numel()))
    latents = whole.encode(video)
    tiled = parts.encode(video)
    assert max(seen) <= 6 * 64 * 64, "four frames and two remembered, of a tile and what is around it"
    near, far = ((x - latents).abs().mean() / latents.std() for x in (tiled, bare.encode(video)))
    assert near < 0.15 and near < 0.6 * far
    frames, expected = parts.decode(latents[0]), whole.decode(latents[0]).astype(int)
    near, far = (np.abs(x - expected).mean() for x in (frames, bare.decode(latents[0])))
    assert frames.shape == (9, 64, 96, 3) and near < 3.0 and near < far, "of 255"
    assert max(seen) <= 6 * 64 * 64
