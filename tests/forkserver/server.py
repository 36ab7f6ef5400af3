"""Server that has imported the libraries of the project, and forks a process for each command that its clients give.

    python tests/forkserver/server.py FOLDER OWNER

writes FOLDER/python, which can be used in place of the interpreter (see client.py), and ends with the process OWNER. A
command costs a fork (a tenth of a second) instead of the import of torch, DeepSpeed and our own modules (seven). A
command that finds other modules of ours by its folder and PYTHONPATH than those of this checkout imports those.
"""

from __future__ import annotations

import ast
import atexit
import ctypes
import gc
import importlib
import io
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

ROOT = Path(__file__).parents[2]
OURS = ("sora_train", "data_tools", "hydra_plugins", "benchmarks", "tests")
# Their imports start threads, or cost more than they save: what needs one imports it itself.
LEFT_OUT = ("decord", "diffusers", "fastapi", "onnxruntime", "peft", "ray", "torchcodec", "transformers", "uvicorn")
# The one thread that a fork may lack: jemalloc, which pyarrow brings, starts it anew in every fork.
HARMLESS = {"jemalloc_bg_thd"}
# What DeepSpeed, torch, Hydra and a run of ours import later than at their own import.
LATE = (
    "deepspeed.runtime.engine", "deepspeed.runtime.zero.stage3", "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.module_inject.auto_ep_layer", "deepspeed.ops.op_builder",
    "torch._dynamo.testing", "torch._inductor.compile_fx", "torch.distributed.run", "torch.distributed.launcher.api",
    "torch.utils._runtime_estimation", "torch.utils.flop_counter", "torch.utils.tensorboard", "functorch.compile",
    "hydra.main", "hydra._internal.hydra", "networkx", "pyarrow.dataset", "sora_train.encoding.encoder",
    "sora_train.methods.diffusion.learner", "sora_train.models.wan.model", "sora_train.operations.build",
    "sora_train.operations.indexing", "sora_train.operations.memory", "sora_train.operations.vocabulary",
)  # fmt: skip


def preload() -> None:
    """Import every library that a module of the project names, also inside functions; parts may be missing."""
    named: set[str] = set()
    for path in (path for folder in OURS[:3] for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                named.add(node.module)
    named -= {name for name in named if name.partition(".")[0] in (*OURS, *LEFT_OUT)}
    commands = [f"{folder}.{path.stem}" for folder in OURS[:2] for path in sorted((ROOT / folder).glob("[a-z]*.py"))]
    sys.path.insert(0, str(ROOT))
    for name in (*sorted(named), *LATE, *commands):
        with suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # so that the collections of a fork don't look through it, and copy its memory
    others = [task / "comm" for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())]
    if unknown := {comm.read_text().strip() for comm in others} - HARMLESS:
        raise RuntimeError(f"an import has started threads, so that forks may hang: {unknown}")


class Command(NamedTuple):
    """A command as its client was given it."""

    arguments: list[str]
    folder: str
    environment: dict[str, str]
    descriptors: dict[int, int]  # number in the client: number here


def receive(connection: socket.socket) -> Command:
    """Read a client's request."""
    size, received, _, _ = socket.recv_fds(connection, 8, 253)
    with connection.makefile("rb") as file:
        about = json.loads(file.read(int.from_bytes(size, "big")))
    descriptors = dict(zip(about.pop("descriptors"), received, strict=True))
    return Command(**about, descriptors=descriptors)


class Server:
    """The loop: clients that ask, clients that are gone, commands that have ended, the owner's end."""

    def __init__(self, address: str, owner: int) -> None:
        self.selector = selectors.DefaultSelector()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(address)
        self.listener.listen(64)
        self.selector.register(self.listener, selectors.EVENT_READ, None)
        self.selector.register(os.pidfd_open(owner), selectors.EVENT_READ, None)
        self.running: dict[int, tuple[socket.socket, int]] = {}  # by process: its client, its pidfd

    def serve(self) -> Command | None:
        """Answer until the owner ends (None); in a fork, returns the command to run."""
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is self.listener:
                    if command := self._start():
                        return command
                elif key.data is None:
                    for pid in list(self.running):
                        with suppress(ProcessLookupError):
                            os.killpg(pid, signal.SIGKILL)
                    return None
                elif key.data in self.running:
                    self._end(key.data, client_is_gone=isinstance(key.fileobj, socket.socket))

    def _start(self) -> Command | None:
        """Fork for a client. Returns its command in the fork, None in the server."""
        client, _ = self.listener.accept()
        try:
            command = receive(client)
        except (OSError, ValueError):  # killed while it asked
            client.close()
            return None
        if not (pid := os.fork()):
            self.selector.close()
            self.listener.close()
            client.close()
            for other, pidfd in self.running.values():
                other.close()
                os.close(pidfd)
            return command
        for descriptor in command.descriptors.values():
            os.close(descriptor)
        self.running[pid] = client, os.pidfd_open(pid)
        for what in self.running[pid]:
            self.selector.register(what, selectors.EVENT_READ, pid)
        with suppress(OSError):
            client.sendall(f"{pid}\n".encode())
        return None

    def _end(self, pid: int, client_is_gone: bool) -> None:
        if client_is_gone:  # killed, so the command is too: itself alone, as it would have been
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        client, pidfd = self.running.pop(pid)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        for what in (client, pidfd):
            self.selector.unregister(what)
        with suppress(OSError):
            client.sendall(f"{code}\n".encode())
        client.close()
        os.close(pidfd)


def become(command: Command, client: str) -> list[str]:
    """Make this fork the process that its client was; returns the arguments of `python`.

    `sys.executable` stays the interpreter, for decoders, which have limits of their own; torchrun starts the client.
    """
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it doesn't outlive the server
    above = max(*command.descriptors, *command.descriptors.values()) + 1
    moved = {number: os.dup2(here, above + n) for n, (number, here) in enumerate(command.descriptors.items())}
    os.closerange(0, above)
    for number, here in moved.items():
        os.dup2(here, number)
        os.close(here)
    os.chdir(command.folder)
    os.environ.clear()
    os.environ.update({"PYTHON_EXEC": client, **command.environment})  # what torchrun starts
    tempfile.tempdir = None
    arguments = command.arguments
    unbuffered = arguments[0] == "-u" or bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = _output(1, line_buffering=os.isatty(1), write_through=unbuffered)
    sys.stderr = sys.__stderr__ = _output(2, line_buffering=True, write_through=unbuffered, errors="backslashreplace")
    threads = os.environ.get("OMP_NUM_THREADS", "")
    torch, numpy = sys.modules["torch"], sys.modules["numpy"]
    torch.set_num_threads(int(threads) if threads.isdecimal() else os.cpu_count() or 1)
    numpy.random.seed()
    return arguments[1:] if arguments[0] == "-u" else arguments


def _output(descriptor: int, **settings: Any) -> io.TextIOWrapper:
    """A text stream as the interpreter makes it at its start."""
    return io.TextIOWrapper(open(descriptor, "wb", closefd=False), encoding="utf-8", **settings)  # noqa: SIM115


def run(arguments: list[str], libraries: list[str]) -> None:
    """Run what `python` was given, in the way it does."""
    own = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    kind, rest = arguments[0], arguments[1:]
    first = {"-m": str(Path.cwd()), "-c": ""}.get(kind, str(Path(kind).resolve().parent))
    sys.path[:] = [first, *own, *libraries]
    holders = (Path(path).absolute() for path in sys.path)
    if next((path for path in holders if (path / OURS[0]).is_dir()), None) != ROOT:
        for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
            del sys.modules[name]
    importlib.invalidate_caches()
    if kind == "-m":
        name, sys.argv = rest[0], rest
        sys.modules.pop(name, None)  # run as the main module, though it was imported
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.modules["__main__"] = main = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = arguments
        runpy.run_path(kind, run_name="__main__")


def end(job: Callable[[], None]) -> NoReturn:
    """Run a command and end as the interpreter does, but without tearing modules down, which copies their memory."""
    code: object = None
    try:
        job()
    except SystemExit as asked:
        code = asked.code
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as the interpreter does first
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit((code or 0) & 0xFF)


def write_client(path: Path, address: str) -> None:
    """Write the executable that stands for `python`; it becomes the real one for what isn't a command."""
    text = Path(__file__).with_name("client.py").read_text()
    path.write_text(f"#!{sys.executable} -SsE\n{text}\n\nsys.exit(main({address!r}, {sys.executable!r}))\n")
    path.chmod(0o755)


def main() -> None:
    """Import, write the client, serve; in a fork, run the command."""
    folder, owner = Path(sys.argv[1]), int(sys.argv[2])
    libraries = [path for path in sys.path if Path(path or ".").resolve() not in (ROOT, Path(__file__).parent)]
    libraries = [path for path in libraries if path not in os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    preload()
    address = f"\0sora_train-fork-{os.getpid()}"  # of no file
    server = Server(address, owner)
    write_client(folder / "python.tmp", address)
    (folder / "python.tmp").rename(folder / "python")
    command = server.serve()
    if command is not None:
        arguments = become(command, str(folder / "python"))
        end(lambda: run(arguments, libraries))


if __name__ == "__main__":
    main()
