"""The service's HTTP API and its page.

Annotations aren't postponed in this module: FastAPI couldn't resolve those that name local variables of a function.
"""

import json
import logging
import os
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, Field, field_validator

from sora_train.core.options import MAX_SEED
from sora_train.release.folder import append_line
from sora_train.service.database import DONE, ENDED, Database, Job, Key
from sora_train.service.limits import CANT_WRITE, Bounds, Guarded, Rate

_PAGE = Path(__file__).with_name("page")
_FILES = {"/": ("index.html", "text/html"), "/app.js": ("app.js", "text/javascript"),
          "/style.css": ("style.css", "text/css")}  # fmt: skip
_FAILURES_PER_MINUTE = 20  # wrong keys from an address
_SCHEME = "Bearer "
UPLOADS = "/api/uploads"
AUDIT, REPORTS = "audit.jsonl", "reports.jsonl"
Id = Annotated[str, PathParameter(pattern="^[0-9a-f]{32}$")]
_NO_JOB: dict[int | str, dict[str, Any]] = {404: {"description": "no job of yours has this id"}}
_NO_KEY: dict[int | str, dict[str, Any]] = {
    401: {"description": "no valid key"}, 403: {"description": "not from this address"},
    408: {"description": "the body came too slowly"}, 413: {"description": "the body is too large"},
    429: {"description": "too many requests, jobs or seconds"},
    400: {"description": "the body can't be read"},
    422: {"description": "a field isn't as described"},
    503: {"description": "the service can't write just now"},
}  # fmt: skip


@dataclass(frozen=True)
class Terms:
    """Limits of the service for one key."""

    most_seconds: float  # of a video
    default_seconds: float  # of a video, if the request has no length
    most_waiting: int = 8  # queued and running jobs
    most_upload_bytes: int = 1 << 28  # sum of a key's uploads
    contact: str = ""
    prompt_hash: Callable[[str], str] = lambda text: ""


class Wish(BaseModel):
    """Request for a video."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(max_length=2000)
    seconds: float | None = Field(None, gt=0, le=3600)
    seed: int = Field(0, ge=0, le=MAX_SEED)
    image: str | None = Field(None, pattern="^[0-9a-f]{32}$", description="an upload: the first frame")
    video: str | None = Field(None, pattern="^[0-9a-f]{32}$", description="an upload: the beginning")

    @field_validator("prompt")
    @classmethod
    def _is_text(cls, prompt: str) -> str:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError("the prompt is not Unicode text") from error
        return prompt


class Shown(BaseModel):
    """A job as its owner sees it."""

    id: str
    state: str
    prompt: str
    seconds: float
    seed: int
    progress: float
    ahead: int = Field(description="jobs before it in the queue")
    message: str
    made: float


class Report(BaseModel):
    """A problem with a video."""

    model_config = ConfigDict(extra="forbid")

    text: str = Field(min_length=1, max_length=2000)


class Me(BaseModel):
    """Remaining quota of a key."""

    name: str
    seconds_left_today: float
    seconds_per_day: float
    most_seconds: float
    contact: str


class Made(BaseModel):
    """Id of an accepted job or upload."""

    id: str


def build_app(folder: Path, database: Database, terms: Terms, bounds: Bounds, wake: Callable[[], None]) -> FastAPI:
    """Build the application of a service folder. `wake` tells the worker that there is a new job."""
    app = FastAPI(title="sora_train", docs_url=None, redoc_url=None, responses=_NO_KEY)
    known = _Door(database)
    app.add_middleware(Guarded, bounds=bounds, audit=folder / AUDIT, uploads=UPLOADS)
    app.add_exception_handler(RequestValidationError, _say_what_is_wrong)
    for kind in (sqlite3.OperationalError, OSError):  # mostly a full disk
        app.add_exception_handler(kind, _say_to_come_again)
    _add_page(app)
    _add_jobs(app, database, terms, known, wake)
    _add_job(app, folder, database, known)
    _add_uploads(app, folder, database, terms, known)
    return app


def _say_what_is_wrong(request: Request, error: Exception) -> JSONResponse:
    """Answer an invalid request with status 422 and one line, which doesn't repeat the request's content."""
    assert isinstance(error, RequestValidationError)
    lines = [f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in error.errors()]
    return JSONResponse({"detail": "; ".join(lines).encode("utf-8", "replace").decode()}, 422)


def _say_to_come_again(request: Request, error: Exception) -> JSONResponse:
    """Answer with status 503: nothing was accepted, since it couldn't be stored."""
    logging.getLogger(__name__).error("%s %s: %s", request.method, request.url.path, error)
    return JSONResponse({"detail": CANT_WRITE}, 503, {"Retry-After": "60"})


class _Door:
    """Checks the key of a request and its rate; a dependency of every endpoint except the page and /health."""

    def __init__(self, database: Database) -> None:
        self._database, self._rate = database, Rate()

    def __call__(self, request: Request) -> Key:
        facts: dict[str, Any] = request.state.audit
        address = request.client.host if request.client else ""
        said = request.headers.get("authorization", "")
        key = self._database.key(said.removeprefix(_SCHEME)) if said.startswith(_SCHEME) and len(said) < 200 else None
        if key is None:
            if not self._rate.allows(f"wrong {address}", _FAILURES_PER_MINUTE):
                raise HTTPException(429, "too many wrong keys from this address", {"Retry-After": "60"})
            raise HTTPException(401, "no valid key", {"WWW-Authenticate": "Bearer"})
        facts["key"] = key.name
        if not self._rate.allows(f"key {key.name}", key.requests_per_minute):
            raise HTTPException(429, "too many requests a minute", {"Retry-After": "5"})
        return key


def _add_page(app: FastAPI) -> None:
    def serve(name: str, kind: str) -> Callable[[], Response]:
        content = (_PAGE / name).read_bytes()
        return lambda: Response(content, media_type=kind)

    for path, (name, kind) in _FILES.items():
        app.add_api_route(path, serve(name, kind), include_in_schema=False)

    @app.get("/health", responses={200: {"description": "the service runs"}})
    def health() -> dict[str, str]:
        return {"status": "ok"}


def _add_jobs(app: FastAPI, database: Database, terms: Terms, known: _Door, wake: Callable[[], None]) -> None:
    """Add the endpoints of a key: its quota, a new job, and its jobs."""
    Known = Annotated[Key, Depends(known)]

    @app.get("/api/me")
    def me(key: Known) -> Me:
        left = max(0.0, key.seconds_per_day - database.used(key))
        return Me(name=key.name, seconds_left_today=left, seconds_per_day=key.seconds_per_day,
                  most_seconds=terms.most_seconds, contact=terms.contact)  # fmt: skip

    @app.post("/api/jobs", status_code=202, responses=_NO_JOB)
    def ask(wish: Wish, key: Known, request: Request) -> Made:
        """Queue a job for a video. Returns its id."""
        seconds = wish.seconds or terms.default_seconds
        if seconds > terms.most_seconds:
            raise HTTPException(422, f"seconds={seconds:g} is above {terms.most_seconds:g}")
        if wish.image and wish.video:
            raise HTTPException(422, "give an image or a video, not both")
        for upload in (wish.image, wish.video):
            if upload and not database.has_upload(upload, key.name):
                raise HTTPException(404, "no upload of yours has this id")
        id = database.add_job(key, wish.model_dump_json(), seconds, terms.most_waiting)
        if id is None:
            raise HTTPException(429, "too many jobs are waiting, or today's seconds are used up", {"Retry-After": "60"})
        request.state.audit |= {"job": id, "prompt_hash": terms.prompt_hash(wish.prompt), "seconds": seconds}
        wake()
        return Made(id=id)

    @app.get("/api/jobs")
    def jobs(key: Known) -> list[Shown]:
        return [_shown(job, database) for job in database.jobs(key.name)]


def _add_job(app: FastAPI, folder: Path, database: Database, known: _Door) -> None:
    """Add the endpoints of one job, which only its owner can use."""

    def owned(id: Id, key: Annotated[Key, Depends(known)], request: Request) -> Job:
        job = database.job(id, key.name)
        if job is None:
            raise HTTPException(404, "no job of yours has this id")
        request.state.audit["job"] = id
        return job

    Owned = Annotated[Job, Depends(owned)]

    @app.get("/api/jobs/{id}", responses=_NO_JOB)
    def job(job: Owned) -> Shown:
        return _shown(job, database)

    @app.delete("/api/jobs/{id}", responses={**_NO_JOB, 409: {"description": "it has ended"}})
    def cancel(job: Owned) -> Shown:
        if not database.cancel(job.id, job.key):
            raise HTTPException(409, "it has ended")
        ended = database.job(job.id, job.key)
        return _shown(ended or job, database)

    @app.get(
        "/api/jobs/{id}/video",
        response_class=FileResponse,
        responses={
            **_NO_JOB, 206: {"description": "a part"}, 409: {"description": "it isn't made"},
            416: {"description": "no such part"},
        },
    )  # fmt: skip
    def video(job: Owned) -> FileResponse:
        path = folder / "outputs" / job.file
        if job.state != DONE or not path.is_file():
            raise HTTPException(409, "it isn't made")
        return FileResponse(path, filename=f"{job.id}{path.suffix}", content_disposition_type="attachment")

    @app.post("/api/jobs/{id}/report", status_code=202, responses=_NO_JOB)
    def report(report: Report, job: Owned, request: Request) -> Made:
        text = report.text.encode("utf-8", "replace").decode()
        entry: dict[str, object] = {"job": job.id, "key": job.key, "text": text, "state": job.state}
        append_line(folder / REPORTS, entry)
        request.state.audit["reported"] = True
        return Made(id=job.id)


def _add_uploads(app: FastAPI, folder: Path, database: Database, terms: Terms, known: _Door) -> None:
    body = {"requestBody": {"required": True, "content": {"application/octet-stream": {"schema": {
        "type": "string", "format": "binary"}}}}}  # fmt: skip

    @app.post(UPLOADS, status_code=201, openapi_extra=body)
    async def upload(request: Request, key: Annotated[Key, Depends(known)]) -> Made:
        """Store an image or video prompt, the body of the request. Returns its id, for a job of the same key."""
        data = await request.body()
        if not data:
            raise HTTPException(400, "the body is empty")
        id = database.add_upload(key.name, len(data), terms.most_upload_bytes)
        if id is None:
            raise HTTPException(429, "your uploads are too large together; the oldest are removed in a while")
        try:
            descriptor = os.open(folder / "uploads" / id, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
        except OSError:
            (folder / "uploads" / id).unlink(missing_ok=True)
            database.remove_upload(id)
            raise
        return Made(id=id)


def _shown(job: Job, database: Database) -> Shown:
    wish = json.loads(job.request)
    ahead = 0 if job.state in ENDED else database.ahead(job)
    return Shown(
        id=job.id, state=job.state, prompt=wish["prompt"], seconds=job.seconds, seed=wish["seed"],
        progress=job.progress, ahead=ahead, message=job.message, made=job.made,
    )  # fmt: skip
