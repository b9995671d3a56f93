"""Commands of Python that begin in a fork, and so without the seconds that importing torch takes.

``fork_server.py --serve FD`` imports torch and flashddpm once and then forks a child for every
``fork_server.py SOCKET COMMAND...``, which lends the child its arguments, environment, working
folder and streams, passes signals on to it and ends as it ends; if the one is killed so is the
other. The fixture ``forked`` of conftest.py begins such a command. Environment variables that are
read while torch or flashddpm are imported are the server's: what depends on them, or is about a
fresh interpreter, must be a process of its own.
"""

import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import types
from typing import Any

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ENOUGH = 1 << 20
"""Bytes of a request, at most."""


def ask(path: str, command: list[str]) -> None:
    """Have the server run a command, and end as it ends."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.connect(path)
    request = json.dumps([command, dict(os.environ), os.getcwd()]).encode()
    socket.send_fds(server, [request], [0, 1, 2])
    for number in PASSED_ON:
        signal.signal(number, lambda number, frame: server.send(bytes([number])))
    code = int(server.recv(ENOUGH))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def serve(listener: socket.socket) -> list[str] | None:
    """Fork for each request, until stdin is closed; return the command, in its child only."""
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            return None
        client, _ = listener.accept()
        with contextlib.suppress(ChildProcessError):  # there is none
            while os.waitpid(-1, os.WNOHANG)[0]:
                continue
        if os.fork():
            client.close()
            continue
        listener.close()
        request, streams, _, _ = socket.recv_fds(client, ENOUGH, 3)
        child = os.fork()
        if child:
            for number in streams:
                os.close(number)
            watch(child, client)
        client.close()
        return become(streams, *json.loads(request))


def watch(child: int, client: socket.socket) -> None:
    """Pass the client's signals on, and then the child's exit code; end with them."""
    ended = os.pidfd_open(child)
    while ended not in select.select([ended, client], [], [])[0]:
        number = client.recv(1)
        os.kill(child, number[0] if number else signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(OSError):  # the client was killed
        client.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def become(
    streams: list[int], command: list[str], environment: dict[str, str], folder: str
) -> list[str]:
    """Take over what belongs to a process; return the command."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    return command


def run(command: list[str]) -> None:
    """Do what the interpreter does with its arguments, and end."""
    if command[0] == sys.executable:
        command = command[1:]
    while command[0] in ("-P", "-u"):
        command = command[1:]
    kind, *rest = command
    code: Any = 0
    try:
        execute(kind, rest)
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            raise
    # As the interpreter does, but for half a second of taking modules apart.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def execute(kind: str, rest: list[str]) -> None:
    """Execute -c CODE, -m MODULE or a file as the main module."""
    if kind == "-c":
        sys.argv = [kind, *rest[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [kind, *rest]
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] != "--serve":
        ask(sys.argv[1], sys.argv[2:])
    # What children would import in their first seconds.
    import torch._dynamo  # noqa: F401  (an optimizer's first step does)
    import torch.distributed.run  # noqa: F401

    import flashddpm.cli.main  # noqa: F401
    import flashddpm.cli.sample  # noqa: F401
    import flashddpm.training.trainer  # noqa: F401

    assert len(os.listdir("/proc/self/task")) == 1, "a thread would be missing in the children"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.freeze()  # else every child's first collection copies all pages
    command = serve(socket.socket(fileno=int(sys.argv[2])))
    if command is not None:
        run(command)
