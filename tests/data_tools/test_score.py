"""Models in local folders score samples into a side table that filters; what is scored isn't scored again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from data_tools import score
from data_tools.model_scores import scorer_of
from sora_train.core.cli import InputError
from sora_train.core.media import read_mp4
from sora_train.data.index.index import load_index
from sora_train.data.index.side_tables import SideTables
from sora_train.data.order.filters import Filter
from sora_train.data.read.store import Store
from tests.conftest import sample

Give = Callable[..., int]


class Brightness(torch.nn.Module):
    """Scores: the mean of all values, and of the first channel."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return torch.stack((pictures.mean(dim=[1, 2, 3]), pictures[:, 0].mean(dim=[1, 2])), dim=1)


def torchscript(folder: Path, **settings: object) -> str:
    folder.mkdir()
    torch.jit.script(Brightness()).save(str(folder / "model.pt"))
    plain = {"columns": ["all", "Red part"], "size": [32], "mean": [0, 0, 0], "std": [1, 1, 1]}
    (folder / "scores.json").write_text(json.dumps(plain | settings))
    return str(folder)


def onnx_mean(folder: Path) -> str:
    """The mean of all values as an ONNX model."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    folder.mkdir()
    kind = onnx.TensorProto.FLOAT
    node = onnx.helper.make_node("ReduceMean", ["pictures", "axes"], ["scores"], keepdims=0)
    graph = onnx.helper.make_graph(
        [node], "mean",
        [onnx.helper.make_tensor_value_info("pictures", kind, ["n", 3, 32, 32])],
        [onnx.helper.make_tensor_value_info("scores", kind, ["n"])],
        [onnx.helper.make_tensor("axes", onnx.TensorProto.INT64, [3], [1, 2, 3])],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, str(folder / "model.onnx"))
    (folder / "scores.json").write_text(json.dumps({"columns": ["x"], "size": [32], "mean": [0] * 3, "std": [1] * 3}))
    return str(folder)


@pytest.fixture
def give(monkeypatch: pytest.MonkeyPatch, own_corpus: list[str], tmp_path: Path) -> Give:
    def give(*arguments: str, shards: int = 2) -> int:
        named = f"shards=[{','.join(own_corpus[:shards])}]"
        monkeypatch.setattr("sys.argv", ["score", named, f"out={tmp_path}/scores.parquet", *arguments])
        return score.main()

    return give


def test_a_table_filters_and_is_filled_up(
    give: Give, own_corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = f"models={{light: {torchscript(tmp_path / 'light')}}}"
    assert give(models, shards=1) == 0
    assert "8 samples scored, 8 in all, 0 without values; columns light_all, light_red_part" in capsys.readouterr().out
    assert give(models) == 0
    assert "8 samples scored, 16 in all" in capsys.readouterr().out
    table = {row["key"]: row for row in pq.read_table(tmp_path / "scores.parquet").to_pylist()}
    frames = read_mp4(sample(1)["mp4"])[0]  # type: ignore[arg-type]
    assert table["00001"]["light_all"] == pytest.approx(frames.mean() / 255, abs=0.02)
    assert table["00001"]["light_red_part"] == pytest.approx(frames[..., 0].mean() / 255, abs=0.02)
    index = SideTables([str(tmp_path / "scores.parquet")], Store()).join(load_index(own_corpus[:2]))
    middle = float(np.median([row["light_all"] for row in table.values()]))
    kept = Filter(f"light_all > {middle}")(lambda name: index.columns[name], len(index))
    assert 4 <= kept.sum() <= 8
    assert give(models, "frames=1") == 0
    assert "16 samples scored" in capsys.readouterr().out, "another number of frames"


def test_onnx_and_torchscript_agree_and_frames_are_summed_up(tmp_path: Path) -> None:
    frames = np.stack([np.full((40, 60, 3), level, np.uint8) for level in (0, 51, 255)])
    assert scorer_of("light", onnx_mean(tmp_path / "onnx")).of(frames) == pytest.approx([0.4], abs=1e-6)
    for over, value in (("mean", 0.4), ("max", 1.0), ("min", 0.0)):
        folder = torchscript(tmp_path / over, over_frames=over)
        assert scorer_of("light", folder).of(frames) == pytest.approx([value, value], abs=1e-6)
    both = scorer_of("light", torchscript(tmp_path / "both", then="softmax")).of(frames)
    assert both == pytest.approx([0.5, 0.5])


def test_a_classifier_as_transformers_saves_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(
        **shape,
        image_size=32,
        patch_size=16,
        id2label={0: "Safe", 1: "Not safe!"},
        label2id={"Safe": 0, "Not safe!": 1},
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "nsfw")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "nsfw")
    scorer = scorer_of("nsfw", str(tmp_path / "nsfw"))
    assert scorer.columns == ("nsfw_safe", "nsfw_not_safe")
    one = scorer.of(np.full((1, 40, 60, 3), 90, np.uint8))
    assert sum(one) == pytest.approx(1.0, abs=1e-5)


def test_what_is_wrong_is_one_line(give: Give, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    good = torchscript(tmp_path / "good")
    bad = torchscript(tmp_path / "bad", columns=["one"])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/scores.json").write_text('{"columns": ["a"], "colums": 3}')
    for given, says in (
        (f"models={{a: {tmp_path}/empty}}", "holds neither scores.json nor an image classifier"),
        (f"models={{a: {tmp_path}/broken}}", "did you mean 'columns'"),
        (f"models={{a: {bad}}}", "gives 2 figures"),
        (f"models={{key: {good}, key_all: {tmp_path}/gone}}", "gone holds neither"),
        ("frames=2", "give models="),
    ):
        with pytest.raises(InputError, match=says):
            give(given)
