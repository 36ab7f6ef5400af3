"""Writers of metrics and sample videos: metrics.jsonl always; TensorBoard, wandb and Prometheus if configured.

Tests, reports and comparisons read metrics.jsonl, so a run that was stopped and resumed must leave the same file as one
that was not. A failure of any other writer doesn't affect training.
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
_WANDB_GRACE_SECONDS = 10.0  # beyond wandb's own time limit, before we stop waiting for it


class Writer(Protocol):
    """A destination of metrics and videos."""

    def scalars(self, step: int, values: Mapping[str, float | int]) -> None:
        """Write one step's figures."""

    def videos(self, step: int, paths: Mapping[str, Path]) -> None:
        """Write sample videos: {caption or name: mp4 file}."""

    def close(self) -> None:
        """Flush and release everything."""


class Writers:
    """All writers of a run; created on rank 0 only. A writer that fails is dropped with a warning.

    Args:
        run_dir: Run folder.
        run_id: Identity of the run, with which wandb resumes it.
        config: Resolved configuration, secrets masked.
        names: Names of writers, of `KNOWN`; metrics.jsonl is written even if it is not named.
        steps: Steps of the whole run.
        project: Project of the wandb run; empty: WANDB_PROJECT, or sora_train.
        resume_step: Step from which the run resumes, 0 for a new one; later lines of metrics.jsonl are removed.
        group: Group of the wandb run; empty: WANDB_RUN_GROUP, or the name of the folder that holds the run folder.
        tags: Tags of the wandb run; empty: WANDB_TAGS.
        prometheus_port: HTTP port for Prometheus; 0 writes run_dir/metrics.prom instead.
        wandb_finish_s: Seconds that wandb's uploads may take at the end.

    Raises:
        ValueError: A name is unknown.
        OSError: metrics.jsonl can't be opened.
    """

    def __init__(
        self,
        run_dir: Path,
        run_id: str,
        config: dict[str, Any],
        names: list[str],
        steps: int,
        project: str,
        *,
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
            place = group or os.environ.get("WANDB_RUN_GROUP") or run_dir.parent.name
            where = project or os.environ.get("WANDB_PROJECT") or "sora_train"
            tags = tags or [tag for tag in os.environ.get("WANDB_TAGS", "").split(",") if tag]
            self._start("wandb", lambda: _Wandb(run_dir, run_id, about, where, place, tags, finish_s=wandb_finish_s))
        if "prometheus" in names:
            self._start("prometheus", lambda: _prometheus(run_dir, prometheus_port))

    def scalars(self, step: int, values: Mapping[str, float | int]) -> None:
        """Log the metrics of a step; when it returns, metrics.jsonl is flushed to the file system."""
        self._each(lambda writer: writer.scalars(step, values))

    def videos(self, step: int, paths: Mapping[str, Path]) -> None:
        """Log sample videos, {caption or name: mp4 file}; not to metrics.jsonl."""
        self._each(lambda writer: writer.videos(step, paths))

    def close(self) -> None:
        """Flush and close every writer."""
        self._each(lambda writer: writer.close())
        self._writers = {}

    def _start(self, name: str, make: Callable[[], Writer]) -> None:
        try:
            self._writers[name] = make()
        except Exception as error:  # of any kind: a dashboard must not keep a run from training
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

    NaN and infinity, which JSON doesn't have, become the strings "nan", "inf" and "-inf", which float() parses.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        cut_after(path, resume_step or -1)  # a new run removes all lines, that of step 0 too
        self._file = path.open("a", encoding="utf-8")

    def scalars(self, step: int, values: Mapping[str, float | int]) -> None:
        line = {"step": step, **{key: _strict(value) for key, value in values.items() if key != "step"}}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def videos(self, step: int, paths: Mapping[str, Path]) -> None:
        return None  # the files stay in samples/

    def close(self) -> None:
        self._file.close()


def _strict(value: float | int) -> float | int | str:
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else str(number)


class _TensorBoard:
    """TensorBoard event files; a resumed run hides events after the checkpoint (`purge_step`)."""

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
    """Convert a video file to a small animated GIF; returns its bytes, width and height."""
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
    """A wandb run with the id of our run, so that a resumed run continues the wandb run. Never prompts for a login."""

    def __init__(
        self, run_dir: Path, run_id: str, config: dict[str, Any], project: str, group: str, tags: Sequence[str],
        *, finish_s: float,
    ) -> None:  # fmt: skip
        import wandb

        self._finish_s, self._folder = finish_s, run_dir / "wandb"
        self._video, self._table = wandb.Video, wandb.Table
        known = wandb.setup().settings  # includes wandb's settings files, e.g. the server of `wandb login --host`
        mode = wandb_mode(known.base_url, known.api_key)
        if mode == "offline" and "WANDB_MODE" not in os.environ:
            log.warning("there is no key of wandb (`wandb login`): it writes to %s, for `wandb sync`", self._folder)
        self._run = wandb.init(  # which takes WANDB_ENTITY and WANDB_NOTES by itself
            project=project,
            id=_wandb_id(run_dir, run_id),
            name=os.environ.get("WANDB_NAME") or run_dir.name,
            dir=str(run_dir),  # wandb adds a folder wandb/
            group=group,
            tags=list(tags),
            config=config,
            resume="allow",
            mode=mode,
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
        """Wait for the uploads, for a limited time, so that a network failure doesn't prevent the process from exiting.

        wandb has a time limit of its own; the thread is for the case that wandb ignores it.
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


def wandb_mode(server: str, key: str | None = None) -> Any:
    """Mode for wandb: WANDB_MODE if it is set, else online if there is a key for the server, else offline.

    A key is WANDB_API_KEY, an identity token, or a netrc entry of a login; without one wandb would prompt for it.
    """
    said = os.environ.get("WANDB_MODE", "")
    if said in ("online", "offline", "disabled", "shared"):
        return said
    if key or os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return "online"
    host = server.split("://")[-1].split("/")[0].split(":")[0]
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return "online" if host in netrc.netrc(str(file)).hosts else "offline"
    except (OSError, netrc.NetrcParseError):
        return "offline"


def _wandb_id(run_dir: Path, made: str) -> str:
    """Id of the wandb run: WANDB_RUN_ID, or the id of the last start, which stays the same in a moved run folder."""
    path = run_dir / "wandb_id"
    known = path.read_text().strip() if path.is_file() else ""
    chosen = os.environ.get("WANDB_RUN_ID") or known or made
    path.write_text(chosen + "\n")
    return chosen


def _line(error: BaseException) -> str:
    """Format an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
