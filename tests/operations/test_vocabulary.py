"""The tokenizer of a run: trained once on its captions, then its own; that of another run goes with its weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from sora_train.config.load import build, load, to_yaml
from sora_train.config.schema import Config
from sora_train.core.cli import InputError
from sora_train.core.world import World
from sora_train.data.shards import Shards
from sora_train.encoding.captions import count_tokens, planned_tokenizer, tokenizer
from sora_train.models.video_model import build_video_model
from sora_train.operations.inputs import check_inputs, note_inputs
from sora_train.operations.vocabulary import with_tokenizer

CPU = torch.device("cpu")
Make = Callable[..., Config]


@pytest.fixture
def make(compose_tree: Callable[..., DictConfig], corpus: list[str], tmp_path: Path) -> Make:
    def configured(name: str, *overrides: str) -> Config:
        keys = ("experiment=demo", "text_encoder.tokenizer=bpe", "text_encoder.buckets=300", "data.validation=[]")
        config = build(compose_tree(*keys, *overrides), need_vae=False)
        sources = {"mine": replace(next(iter(config.data.sources.values())), shards=corpus)}
        (tmp_path / name).mkdir(exist_ok=True)
        return replace(config, run_dir=str(tmp_path / name), data=replace(config.data, sources=sources))

    return configured


def started(config: Config) -> Config:
    return with_tokenizer(config, Shards(config), World())


def test_it_is_trained_once_and_then_the_run_s_own(make: Make) -> None:
    config = make("run")
    first = started(config)
    file = Path(config.run_dir) / "tokenizer.json"
    assert first.text_encoder.tokenizer_path == str(file)
    assert "Ġblock" in json.loads(file.read_text())["model"]["vocab"], "each caption has that word"
    ids_L1, lengths = tokenizer(first)(["a block", ""])
    assert lengths == (3, 1) and ids_L1.shape == (4, 1) and count_tokens(first, ["a block"]) == [3]
    features = build_video_model(first).text
    assert features is not None and features(ids_L1, lengths).shape == (4, first.text_encoder.width)
    (Path(config.run_dir) / "config.yaml").write_text(to_yaml(config))
    before = file.read_text()
    file.write_text(before + "\n")  # as it stands, not trained again
    assert started(config) == first and file.read_text() == before + "\n"


def test_another_run_gets_the_same(make: Make) -> None:
    files = [started(make(name)).text_encoder.tokenizer_path for name in ("one", "two")]
    assert Path(str(files[0])).read_bytes() == Path(str(files[1])).read_bytes()


def test_a_run_with_checkpoints_needs_its_own(make: Make, tmp_path: Path) -> None:
    config = make("run", f"vae.path={_vae(tmp_path)}")
    file = Path(started(config).text_encoder.tokenizer_path or "")
    note_inputs(config, "")
    (Path(config.run_dir) / "checkpoints/step-00000002").mkdir(parents=True)
    check_inputs(config, config.run_dir, ", or else")
    text = file.read_text()
    file.write_text(text.replace("<start>", "<begin>"))
    with pytest.raises(InputError, match="text_encoder.tokenizer=.*put those back, or else"):
        check_inputs(config, config.run_dir, ", or else")
    file.unlink()
    for act in (started, lambda c: check_inputs(c, c.run_dir, "")):
        with pytest.raises(InputError, match=r"tokenizer.json is missing, the tokenizer that .* put it back"):
            act(config)


def test_weights_bring_their_tokenizer(make: Make, tmp_path: Path) -> None:
    first = started(make("first"))
    own = Path(first.text_encoder.tokenizer_path or "")
    own.write_text(own.read_text() + "\n")
    second = started(make("second", f"init_from={tmp_path / 'first'}"))
    assert Path(second.text_encoder.tokenizer_path or "").read_text() == own.read_text()
    with pytest.raises(InputError, match="was trained with text_encoder.tokenizer=bpe; set it so"):
        started(make("third", f"init_from={tmp_path / 'first'}", "text_encoder.tokenizer=hashed"))
    (tmp_path / "hashed").mkdir()
    with pytest.raises(InputError, match="was trained with text_encoder.tokenizer=hashed; set it so"):
        started(make("fourth", f"init_from={tmp_path / 'hashed'}"))
    own.write_text(own.read_text() + "\n")
    with pytest.raises(InputError, match="is another tokenizer than"):
        started(make("second", f"text_encoder.tokenizer_path={own}"))
    with pytest.raises(InputError, match="there is no tokenizer at"):
        started(make("fifth", "text_encoder.tokenizer_path=nowhere"))


def test_a_loaded_run_reads_the_file_in_its_folder(make: Make, tmp_path: Path) -> None:
    config = make("run", f"vae.path={_vae(tmp_path)}")
    started(config)
    (tmp_path / "run/config.yaml").write_text(to_yaml(config))
    (tmp_path / "run").rename(tmp_path / "moved")
    loaded = load(tmp_path / "moved")
    assert loaded.tokenizer_file == str(tmp_path / "moved/tokenizer.json")
    assert tokenizer(loaded)(["a block"])[1] == (3,)


def test_a_forecast_needs_no_file(make: Make) -> None:
    rows, lengths = planned_tokenizer(make("run"), CPU)(["a", "b"])
    assert rows.shape == (64, 1) and rows.dtype == torch.long and lengths == (32, 32)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("text_encoder.tokenizer=bpes", "did you mean 'bpe'"),
        ("text_encoder.buckets=200", "at least 257 with tokenizer=bpe"),
        ("text_encoder.tokenizer=hashed text_encoder.tokenizer_path=x", "is for text_encoder.tokenizer=bpe"),
    ],
)
def test_what_does_not_go_together_is_refused(make: Make, override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make("run", *override.split())


def _vae(folder: Path) -> Path:
    """A VAE's folder, as far as a configuration reads it."""
    from dataclasses import asdict

    from sora_train.config.schema import VAE_USE, VaeConfig

    shape = {key: value for key, value in asdict(VaeConfig()).items() if key not in VAE_USE}
    (folder / "vae").mkdir()
    (folder / "vae/config.json").write_text(json.dumps(shape))
    return folder / "vae"
