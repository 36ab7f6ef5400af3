"""Where figures and sample videos go: metrics.jsonl always; TensorBoard, wandb and Prometheus if asked for.

metrics.jsonl is the record that tests, reports and comparisons read, so a run that was stopped and resumed must leave
the same file as one that was not. The others are for people; whatever happens to them, training goes on.
"""

from __future__ import annotations

import io
import json
import logging
import math
import netrc
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import av
from PIL import Image

from sora_train.core.lines import cut_after

log = logging.getLogger(__name__)

KNOWN = ("jsonl", "tensorboard", "wandb", "prometheus")

_GIF_SIDE = 160  # pixels: longer side of the animated images in TensorBoard
_GIF_FRAMES = 40
_WANDB_START_SECONDS = 30.0
_WANDB_GRACE_SECONDS = 10.0  # in which wandb must notice by itself that its time is over


class Writer(Protocol):
    """One place figures go to."""

    def scalars(self, step: int, values: Mapping[str, float | int]) -> None:
        """Write one step's figures."""

    def videos(self, step: int, paths: Mapping[str, Path]) -> None:
        """Write sample videos: {caption or name: mp4 file}."""

    def close(self) -> None:
        """Flush and release everything."""


class Writers:
    """Every writer of a run; made on rank 0 only.

    names: of `KNOWN`; metrics.jsonl is written even if it is not named. config: resolved, secrets masked. steps: of the
    whole run. resume_step: the step the run goes on from, 0 for a new one; later lines of metrics.jsonl are cut off.
    group and tags: of the wandb run; the group is the folder that the run folder lies in where it isn't given.
    prometheus_port: 0 writes run_dir/metrics.prom instead. wandb_finish_s: what its uploads may take at the end.
    A writer that cannot start, or fails later, is left out with one warning.
    Raises ValueError for an unknown name, OSError if metrics.jsonl cannot be opened.
    """

    def __init__(
        self,
        run_dir: Path,
        run_id: str,
        config: dict[str, Any],
        names: list[str],
        steps: int,
        project: str,
        resume_step: int,
        group: str = "",
        tags: Sequence[str] = (),
        prometheus_port: int = 0,
        wandb_finish_s: float = 60.0,
    ) -> None:
        unknown = sorted(set(names) - set(KNOWN))
        if unknown:
            raise ValueError(f"no writer {unknown[0]!r}; there are {', '.join(KNOWN)}")
        run_dir.mkdir(parents=True, exist_ok=True)
        self._writers: dict[str, Writer] = {"metrics.jsonl": _Lines(run_dir / "metrics.jsonl", resume_step)}
        if "tensorboard" in names:
            self._start("tensorboard", lambda: _TensorBoard(run_dir / "tensorboard", resume_step))
        if "wandb" in names:
            about = {**config, "total_steps": steps}
            place = group or run_dir.parent.name
            self._start("wandb", lambda: _Wandb(run_dir, run_id, about, project, place, tags, wandb_finish_s))
        if "prometheus" in names:
            self._start("prometheus", lambda: _prometheus(run_dir, prometheus_port))

    def scalars(self, step: int, values: Mapping[str, float | int]) -> None:
        """Log one step's figures; each call is on disk in metrics.jsonl when it returns."""
        self._each(lambda writer: writer.scalars(step, values))

    def videos(self, step: int, paths: Mapping[str, Path]) -> None:
        """Log sample videos: {caption or name: mp4 file}. metrics.jsonl does not hold them."""
        self._each(lambda writer: writer.videos(step, paths))

    def close(self) -> None:
        """Flush and close every writer."""
        self._each(lambda writer: writer.close())
        self._writers = {}

    def _start(self, name: str, make: Callable[[], Writer]) -> None:
        try:
            self._writers[name] = make()
        except Exception as error:  # whatever a dashboard raises, it is no reason not to train
            hint = "install it" if isinstance(error, ImportError) else f"see the cause, or leave {name} out"
            log.warning("%s does not start, training goes on without it: %s (%s)", name, _line(error), hint)

    def _each(self, act: Callable[[Writer], None]) -> None:
        for name, writer in list(self._writers.items()):
            try:
                act(writer)
            except Exception as error:
                log.warning("%s failed, the run goes on without it from here: %s", name, _line(error))
                del self._writers[name]


class _Lines:
    """metrics.jsonl: one strict JSON object per logged step, "step" first.

    JSON has no NaN and no infinity: they are the strings "nan", "inf" and "-inf", which Python's float() reads back.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        cut_after(path, resume_step or -1)  # a new run keeps nothing, not even a line of step 0
        self._file = path.open("a", encoding="utf-8")

    def scalars(self, step: int, values: Mapping[str, float | int]) -> None:
        line = {"step": step, **{key: _strict(value) for key, value in values.items() if key != "step"}}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def videos(self, step: int, paths: Mapping[str, Path]) -> None:
        return None  # they lie in samples/

    def close(self) -> None:
        self._file.close()


def _strict(value: float | int) -> float | int | str:
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else str(number)


class _TensorBoard:
    """Event files; a resumed run hides what the stopped one wrote after its last checkpoint."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)

    def scalars(self, step: int, values: Mapping[str, float | int]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def videos(self, step: int, paths: Mapping[str, Path]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        for name, path in paths.items():
            data, width, height = _gif(path)
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
            summary = Summary(value=[Summary.Value(tag=f"samples/{name}", image=image)])
            self._writer._get_file_writer().add_summary(summary, step)  # add_video would need moviepy
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _gif(path: Path) -> tuple[bytes, int, int]:
    """A small animated GIF of a video file, and its width and height."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        milliseconds = round(1000 / float(stream.average_rate or 8))
        images = []
        for frame in container.decode(stream):
            image = frame.to_image()
            image.thumbnail((_GIF_SIDE, _GIF_SIDE))
            images.append(image.quantize(64, method=Image.Quantize.MEDIANCUT))
            if len(images) == _GIF_FRAMES:
                break
    data = io.BytesIO()
    images[0].save(data, "GIF", save_all=True, append_images=images[1:], duration=milliseconds, loop=0)
    return data.getvalue(), images[0].width, images[0].height


class _Wandb:
    """A wandb run that a resumed run goes on with: its id is the run's own. Never asks for anything."""

    def __init__(
        self, run_dir: Path, run_id: str, config: dict[str, Any], project: str, group: str, tags: Sequence[str],
        finish_s: float,
    ) -> None:  # fmt: skip
        import wandb

        self._finish_s, self._folder = finish_s, run_dir / "wandb"
        self._video, self._table = wandb.Video, wandb.Table
        self._run = wandb.init(
            project=project,
            id=run_id,
            name=run_dir.name,
            dir=str(run_dir),  # wandb adds a folder wandb/
            group=group,
            tags=list(tags),
            config=config,
            resume="allow",
            mode=wandb_mode(),
            settings=wandb.Settings(
                init_timeout=_WANDB_START_SECONDS,
                silent=True,
                console="off",
                save_code=False,
                finish_timeout=finish_s,
                finish_timeout_raises=True,
            ),  # fmt: skip
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float | int]) -> None:
        self._run.log({**values, "step": step})

    def videos(self, step: int, paths: Mapping[str, Path]) -> None:
        for name, path in paths.items():
            self._run.log({f"samples/{name}": self._video(str(path), caption=name, format="mp4"), "step": step})
        rows = [[step, name, self._video(str(path), caption=name, format="mp4")] for name, path in paths.items()]
        self._run.log({"samples": self._table(columns=["step", "prompt", "video"], data=rows), "step": step})

    def close(self) -> None:
        """Wait for the uploads, but not for ever: a cut network must not keep a run that is done, or told to stop.

        wandb has a time limit of its own; the thread is for a wandb that doesn't answer at all.
        """
        raised: list[Exception] = []

        def finish() -> None:
            try:
                self._run.finish()
            except Exception as error:
                raised.append(error)

        thread = threading.Thread(target=finish, name="wandb finish", daemon=True)
        thread.start()
        thread.join(self._finish_s + _WANDB_GRACE_SECONDS)
        if thread.is_alive() or (raised and isinstance(raised[0], TimeoutError)):
            raise TimeoutError(
                f"not all was uploaded within logging.wandb_finish_s={self._finish_s:g} s; "
                f"`wandb sync {self._folder}/*` sends it later"
            )
        if raised:
            raise raised[0]


def _prometheus(run_dir: Path, port: int) -> Writer:
    from sora_train.training.report.prometheus import PrometheusWriter

    return PrometheusWriter(run_dir, port)


def wandb_mode() -> Any:
    """ "online", "offline" or "disabled": what WANDB_MODE says, else online only where a key is found.

    A key is WANDB_API_KEY or a netrc entry for the wandb server; without one wandb would ask for it.
    """
    said = os.environ.get("WANDB_MODE", "")
    if said in ("offline", "disabled"):
        return said
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0].split(":")[0]
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return "online" if server in netrc.netrc(str(file)).hosts else "offline"
    except (OSError, netrc.NetrcParseError):
        return "offline"


def _line(error: BaseException) -> str:
    """An error as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
