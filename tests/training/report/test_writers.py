"""The writers and the console: what a resumed run leaves, what failing dashboards do, what people read."""

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from sora_train.training.report import writers as metrics
from sora_train.training.report.console import Console, duration, setup_logging, short
from sora_train.training.report.writers import Writers, wandb_mode
from sora_train.training.state.ledger import Ledger


def make(run_dir: Path, *names: str, resume_step: int = 0) -> Writers:
    return Writers(run_dir, "run-1", {"lr": 0.1}, list(names), 100, "demo", resume_step=resume_step)


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for i in range(5):
            frame = av.VideoFrame.from_ndarray(np.full((32, 64, 3), 40 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture
def no_wandb_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_lines_are_strict_json_with_the_step_first(tmp_path: Path) -> None:
    writers = make(tmp_path)
    writers.scalars(3, {"loss": 0.5, "tokens": 7, "grad_norm": float("nan"), "worst": float("inf")})
    assert (tmp_path / "metrics.jsonl").read_text() == (  # flushed before close
        '{"step": 3, "loss": 0.5, "tokens": 7, "grad_norm": "nan", "worst": "inf"}\n'
    )
    writers.close()


def test_resumed_run_leaves_the_file_of_an_undisturbed_one(tmp_path: Path) -> None:
    def log(writers: Writers, first: int, last: int) -> None:
        for step in range(first, last + 1):
            writers.scalars(step, {"loss": 1 / (step + 1)})
        writers.close()

    log(make(tmp_path / "whole"), 1, 9)
    log(make(tmp_path / "killed"), 1, 6)
    with (tmp_path / "killed/metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    log(make(tmp_path / "killed", resume_step=4), 5, 9)
    assert (tmp_path / "killed/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_torn_last_line_that_reads_as_json_is_cut(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    make(tmp_path, resume_step=2).close()
    assert lines(tmp_path) == [{"step": 1}]


def test_new_run_in_a_used_folder_starts_empty(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    make(tmp_path).close()
    assert lines(tmp_path) == []


def test_unknown_writer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no writer 'wandbb'"):
        make(tmp_path, "wandbb")


def test_tensorboard_gets_scalars_and_an_animated_image(tmp_path: Path, video: Path) -> None:
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writers = make(tmp_path, "tensorboard")
    writers.scalars(5, {"loss": 0.25})
    writers.videos(5, {"a red circle": video})
    writers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(5, 0.25)]
    (image,) = events.Images("samples/a red circle")
    with Image.open(io.BytesIO(image.encoded_image_string)) as gif:
        assert (gif.format, gif.size, getattr(gif, "n_frames", 1), gif.info["duration"]) == ("GIF", (64, 32), 5, 120)


def test_missing_tensorboard_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    writers = make(tmp_path, "tensorboard")
    writers.scalars(1, {"loss": 1.0})
    writers.close()
    assert len(caplog.records) == 1 and "tensorboard does not start" in caplog.text and "install it" in caplog.text
    assert lines(tmp_path) == [{"step": 1, "loss": 1.0}]


def test_writer_that_fails_later_is_dropped_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Full:
        def scalars(self, step: int, values: object) -> None:
            raise OSError(28, "No space left on device")

    writers = make(tmp_path)
    writers._writers = {"tensorboard": Full(), **writers._writers}  # type: ignore[dict-item]
    for step in (1, 2):
        writers.scalars(step, {"loss": 1.0})
    writers.close()
    assert [r.getMessage().split(",")[0] for r in caplog.records] == ["tensorboard failed"]
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


@pytest.mark.usefixtures("no_wandb_account")
def test_wandb_is_offline_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, public = "https://wandb.example.org/", "https://api.wandb.ai"
    assert wandb_mode(public) == "offline" and wandb_mode(public, "key of a settings file") == "online"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    assert wandb_mode(public) == "online" and wandb_mode(ours) == "offline"
    for name, value, mode in (
        ("WANDB_IDENTITY_TOKEN_FILE", "token", "online"), ("WANDB_MODE", "disabled", "disabled"),
        ("WANDB_API_KEY", "x", "disabled"), ("WANDB_MODE", "online", "online"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
        assert wandb_mode(ours) == mode


def test_wandb_hears_its_own_variables_and_a_moved_run_keeps_its_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []

    class Run:
        def define_metric(self, *_: object, **__: object) -> None:
            return None

        def finish(self) -> None:
            return None

    def init(**said: Any) -> Run:
        given.append(said)
        return Run()

    known = types.SimpleNamespace(settings=types.SimpleNamespace(base_url="", api_key=None))
    stub = types.SimpleNamespace(Video=None, Table=None, init=init, Settings=dict, setup=lambda: known)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    names = ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_GROUP", "WANDB_TAGS", "WANDB_RUN_ID")
    for name in names:
        monkeypatch.delenv(name, raising=False)

    def begin(folder: str, run_id: str, project: str = "") -> tuple[Any, ...]:
        Writers(tmp_path / folder, run_id, {}, ["wandb"], 9, project, resume_step=0).close()
        return tuple(given[-1][key] for key in ("project", "name", "group", "tags", "id"))

    assert begin("a/run", "run-1") == ("sora_train", "run", "a", [], "run-1")
    (tmp_path / "a").rename(tmp_path / "b")
    assert begin("b/run", "run-2")[4] == "run-1"
    for name, value in zip(names, ("films", "first", "tries", "x,y", "id-7"), strict=True):
        monkeypatch.setenv(name, value)
    assert begin("b/run", "run-2") == ("films", "first", "tries", ["x", "y"], "id-7")
    assert begin("b/run", "run-2", "own")[0] == "own", "the key of the configuration comes first"


@pytest.mark.timeout(60)
def test_wandb_writes_an_offline_run_without_a_prompt(python: str, tmp_path: Path, video: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from sora_train.training.report.writers import Writers\n"
        "w = Writers(Path(sys.argv[1]), 'run-1', {'lr': 0.1}, ['wandb'], 9, 'demo', resume_step=0)\n"
        "w.scalars(1, {'loss': 0.5}); w.videos(1, {'a red circle': Path(sys.argv[2])})\n"
        "assert set(w._writers) == {'metrics.jsonl', 'wandb'}; w.close()\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"NETRC": str(tmp_path / "none")}
    done = subprocess.run(
        [python, "-c", script, str(tmp_path / "run"), str(video)],
        env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "run/wandb").glob("offline-run-*-run-1")
    assert (folder / "run-run-1.wandb").stat().st_size > 0
    assert len(list(folder.glob("files/media/videos/**/*.mp4"))) == 1


def test_wandb_that_cannot_start_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no\nnetwork")

    monkeypatch.setattr(metrics, "_Wandb", refuse)
    make(tmp_path, "wandb").close()
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "RuntimeError: no network" in caplog.text


@pytest.mark.parametrize("ending", ["hangs", "gives up", "fails"])
def test_wandb_without_a_network_does_not_keep_a_run_that_is_done(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    never = threading.Event()
    settings: dict[str, Any] = {}

    class Run:
        def define_metric(self, *_: object, **__: object) -> None:
            return None

        def finish(self) -> None:
            if ending == "hangs":
                never.wait(3600)
            raise TimeoutError("Timed out finishing run.") if ending == "gives up" else RuntimeError("no\nservice")

    def init(**given: Any) -> Run:
        settings.update(vars(given["settings"]))
        return Run()

    known = types.SimpleNamespace(settings=types.SimpleNamespace(base_url="", api_key=None))
    stub = types.SimpleNamespace(
        Video=None, Table=None, init=init, Settings=lambda **s: types.SimpleNamespace(**s), setup=lambda: known
    )
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.setattr(metrics, "_WANDB_GRACE_SECONDS", 0.1)
    writers = Writers(tmp_path / "run", "run-1", {}, ["wandb"], 9, "demo", resume_step=0, wandb_finish_s=0.2)
    writers.close()  # before this test's time is up, though one of them hangs for an hour
    never.set()
    assert settings["finish_timeout"] == 0.2 and settings["finish_timeout_raises"] is True
    (warning,) = caplog.records
    late = "not all was uploaded within logging.wandb_finish_s=0.2 s"
    said = "RuntimeError: no service" if ending == "fails" else late
    assert warning.levelname == "WARNING" and said in warning.getMessage()
    assert ("`wandb sync" in warning.getMessage()) == (ending != "fails")


def test_plain_console_prints_one_line_a_step(tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(1500, True, tmp_path, out)
    values = {"loss": 0.5234, "grad_norm": 0.31, "lr": 3e-3, "tokens_per_s": 7100, "data_wait": 0.012, "mfu": 0.31}
    console.step(120, values)
    console.say("saved")
    console.close()
    assert out.getvalue() == (
        "step 120/1500 loss 0.5234 grad 0.31 lr 3.0e-03 7.1k tok/s data wait 1.2% mfu 31% eta ?\nsaved\n"
    )


def test_terminal_console_draws_a_bar_and_keeps_lines_apart(tmp_path: Path) -> None:
    class Tty(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Tty()
    console = Console(10, True, tmp_path, out)
    console.step(4, {"loss": 0.5})
    console.say("saved [ok]")
    console.close()
    assert "step 4/10" in out.getvalue() and "loss 0.5000" in out.getvalue() and "saved [ok]" in out.getvalue()


def test_other_ranks_only_log(tmp_path: Path) -> None:
    before = logging.getLogger().handlers[:]
    try:
        path = setup_logging(tmp_path, 3)
        out = io.StringIO()
        Console(10, False, tmp_path, out).say("hello")
        assert out.getvalue() == "" and path == tmp_path / "logs/rank-3.log"
        assert path.read_text().rstrip().endswith("hello")
    finally:
        logging.basicConfig(handlers=before, force=True)


def test_short_figures() -> None:
    assert [short(v) for v in (12, 7100, 2_350_000, 3e9)] == ["12", "7.1k", "2.35M", "3G"]
    assert [duration(s) for s in (7, 372, 11_100, 187_200)] == ["7s", "6m12s", "3h05m", "2d04h"]


class Gone(io.StringIO):
    """A stream whose reader went away."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_a_closed_stdout_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (Gone(), closed, open("/dev/full", "w")):  # noqa: SIM115, PTH123 (closed below; its flush fails)
        caplog.clear()
        try:
            console = Console(10, True, tmp_path, Silent(stream))
            console.step(1, {"loss": 0.5})
            console.say("saved")
            console.close()
        finally:
            with contextlib.suppress(OSError):
                stream.close()
        assert [r.levelname for r in caplog.records if r.levelname == "WARNING"] == ["WARNING"]
        assert "standard output is gone" in caplog.text


class Silent:
    """A stream that is no terminal, whatever state it is in."""

    def __init__(self, stream: Any) -> None:
        self.write, self.flush = stream.write, stream.flush

    def isatty(self) -> bool:
        return False


def test_a_full_log_disk_stops_no_figures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger/rank-0.jsonl").symlink_to("/dev/full")
    ledger = Ledger(tmp_path, 0)
    for step in (1, 2):
        ledger.write(step, (0, 0, step), [1], [])
    assert [r.levelname for r in caplog.records] == ["ERROR"] and "its record has gaps" in caplog.text
    writers = make(tmp_path)
    writers._writers["metrics.jsonl"]._file = open("/dev/full", "w")  # type: ignore[attr-defined] # noqa: SIM115, PTH123
    for step in (1, 2):
        writers.scalars(step, {"loss": 1.0})
    assert "metrics.jsonl failed" in caplog.text
