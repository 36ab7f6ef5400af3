"""Stand-in for `python` that has a command run by a fork of the server beside this file.

The server writes it, behind a line that names interpreter and socket, to an executable file. It takes what `python`
takes (`-m MODULE`, `-c CODE` or a file, then arguments) and behaves like the command: same input and output, same exit
code, signals are passed on, and the command is killed with it. Imports little, because every command pays for it.
"""

# ruff: noqa: PTH109, PTH110, PTH208 -- pathlib would triple the time of a start

import json
import os
import signal
import socket
import sys
from contextlib import suppress

PASSED_ON = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def main(address: str, interpreter: str) -> int:
    """Have the command run, or become the interpreter where there is none (`-V`, a session).

    Returns:
        The exit code of the command; ends by the signal that ended it, if one did.
    """
    arguments = sys.argv[1:]
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-c", "-m", "-u")):
        os.execv(interpreter, [interpreter, *arguments])
    descriptors = [n for n in map(int, os.listdir("/proc/self/fd")) if os.path.exists(f"/proc/self/fd/{n}")]
    request = {
        "arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ), "descriptors": descriptors,
    }  # fmt: skip
    pid, early = 0, []  # signals that come before the command has begun

    def pass_on(number: int, frame: object) -> None:
        if not pid:
            early.append(number)
        else:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, number)

    for number in PASSED_ON:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, pass_on)
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        body = json.dumps(request).encode()
        socket.send_fds(server, [len(body).to_bytes(8, "big")], descriptors)
        server.sendall(body)
        answers = server.makefile()
        pid = int(answers.readline())
        for number in early:
            pass_on(number, None)
        code = int(answers.readline())
    if code < 0:
        if -code in PASSED_ON:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code
