# SPDX-License-Identifier: Apache-2.0
"""Servers without waiting for their imports, which are most of what a start costs.

A process imports SGLang, and each server is a fork of it that goes on as the `sglang` script would.
Those that the server spawns (scheduler, detokenizer) are forks, too, made before it has done
anything: they are told what a spawned interpreter is told. Nothing else differs; some tests start
servers as users do all the same.
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from multiprocessing import util
from pathlib import Path
from typing import Any, NoReturn

import psutil

IMPORTED = (
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.model_executor.model_runner",
    "sglang.cli.main",
)
SPARE = 3
"""Forks that a server has for those that it spawns; the rest are started from nothing."""
ENVIRONMENTS = 3
"""Processes that are kept: most of a GiB each."""
LONGEST = 1 << 20
"""Bytes of a message."""
OUT_OF_THE_WAY = 1000
"""A descriptor above those that processes have here."""


class Forked:
    """A server's main process, with as much of ``subprocess.Popen`` as is needed."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._process = psutil.Process(pid)

    def poll(self) -> int | None:
        """None while it runs; how it ended is not known here."""
        try:
            return 0 if self._process.status() == psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return 0

    def wait(self) -> None:
        # Not until it is gone: its parent may have ended, and whoever adopts it may never look.
        while self.poll() is None:
            time.sleep(0.05)


class _Imported:
    """The process that has imported SGLang, with the environment that its servers are to have."""

    def __init__(self, env: dict[str, str]) -> None:
        self.env = env
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-P", __file__, str(theirs.fileno())]
        self._process = subprocess.Popen(command, env=env, pass_fds=[theirs.fileno()])
        theirs.close()

    def fork(self, command: Sequence[str], log: Path) -> Forked:
        message = {"command": list(command), "log": str(log), "env": self.env, "cwd": os.getcwd()}
        self._socket.send(json.dumps(message).encode())
        return Forked(int(self._socket.recv(64)))

    def end(self) -> None:
        """Its servers go on."""
        self._socket.close()
        self._process.wait()


_imported: list[_Imported] = []
"""Those that there are, the latest asked last."""


def start(command: Sequence[str], env: dict[str, str], log: Path) -> Forked:
    """Start the `sglang` script with arguments, ``command`` in all, and an environment.

    What is imported may depend on the environment: each has a process of its own.
    """
    found = next((one for one in _imported if one.env == env), None)
    if found is None:
        found = _Imported(env)
        atexit.register(found.end)
    else:
        _imported.remove(found)
    _imported.append(found)
    if len(_imported) > ENVIRONMENTS:
        _imported.pop(0).end()
    return found.fork(command, log)


# -- the process that imports --


def _serve_forks(requests: socket.socket) -> None:
    """Fork for each message, until the socket is closed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for servers here
    while message := requests.recv(LONGEST):
        pid = os.fork()
        if pid == 0:
            requests.close()
            _be_a_server(json.loads(message))
        requests.send(str(pid).encode())


def _be_a_server(asked: dict[str, Any]) -> NoReturn:
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    output = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    spares = [_spare() for _ in range(SPARE)]
    spawn_anew = util.spawnv_passfds

    def spawn_fork(path: bytes, args: Sequence[Any], passfds: Sequence[int]) -> int:
        if not spares or "--multiprocessing-fork" not in args:
            return spawn_anew(path, args, passfds)
        pid, told = spares.pop()
        known = {"args": [str(a) for a in args], "fds": list(passfds), "env": dict(os.environ)}
        socket.send_fds(told, [json.dumps(known).encode()], list(passfds))
        told.close()
        return pid

    util.spawnv_passfds = spawn_fork
    sys.argv = asked["command"]
    _end(lambda: runpy.run_path(sys.argv[0], run_name="__main__"))


def _spare() -> tuple[int, socket.socket]:
    """A fork that waits to be told what to be; its pid, and where to tell it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid:
        theirs.close()
        return pid, ours
    ours.close()
    message, fds, *_ = socket.recv_fds(theirs, LONGEST, 64)
    theirs.close()
    if not message:
        os._exit(0)
    known = json.loads(message)
    os.environ.clear()
    os.environ.update(known["env"])
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD, OUT_OF_THE_WAY) for fd in fds]
    for fd, wanted in zip(moved, known["fds"], strict=True):
        os.dup2(fd, wanted)
        os.close(fd)
    at = known["args"].index("-c")
    sys.argv = known["args"][at : at + 1] + known["args"][at + 2 :]
    _end(lambda: exec(known["args"][at + 1], {"__name__": "__main__"}))


def _end(run: Any) -> NoReturn:
    """Run to the end, as an interpreter does."""
    code = 1
    try:
        run()
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    for name in IMPORTED:
        import_module(name)
    # Seconds for each process, and the same in all: SGLang looks for each hook's target everywhere.
    import_module("sglang.srt.plugins").load_plugins()
    gc.freeze()
    _serve_forks(socket.socket(fileno=int(sys.argv[1])))
