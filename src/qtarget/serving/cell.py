"""A network of its own for mosec's HTTP server: nobody on this machine can connect to its port, whatever it would show.

mosec listens on TCP only, and its ``/``, ``/metrics`` and ``/openapi`` know no secret. So its process is started in a new
network namespace, in which there is nothing but a loopback interface. A helper beside it hands sockets of that namespace to
the supervisor through a Unix socket in the server's private folder; the supervisor connects them.

``python cell.py FOLDER PROGRAM CONFIG`` is what mosec is told to be its program. Where the system does not let
users make namespaces (some containers), the program is started as it is, and the server's log says so.
"""

from __future__ import annotations

import array
import ctypes
import os
import shlex
import socket
import sys
from contextlib import suppress
from pathlib import Path

SOCKET = "cell"
"""Unix socket in the server's folder; absent where there is no namespace."""
REFUSED = "cell-refused"
"""File that says why, instead."""
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
AHEAD = 64
"""Sockets that wait to be fetched."""
SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1


def wrapper(folder: Path, program: Path) -> Path:
    """An executable file that starts ``program`` with its arguments in a cell."""
    path = folder / "cell.sh"
    words = [
        sys.executable,
        "-I",
        "-S",
        __file__,
        str(folder),
        str(program),
    ]  # by path: importing qtarget makes threads
    path.write_text(f'#!/bin/sh\nexec {" ".join(map(shlex.quote, words))} "$@"\n', encoding="utf-8")
    path.chmod(0o700)
    return path


def enter() -> None:
    """Give this process, which must have one thread, a user and a network namespace with a loopback interface.

    Raises:
        OSError: the system does not allow it, or has no such thing.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "unshare"):
        raise OSError("this system has no network namespaces")
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    with socket.socket() as control:
        import fcntl

        fcntl.ioctl(control, SIOCSIFFLAGS, b"lo".ljust(16, b"\0") + IFF_UP.to_bytes(2, sys.byteorder).ljust(24, b"\0"))


def hand_out(listener: socket.socket) -> None:
    """Keep sockets of this namespace ready for the one that connects; ends when it does."""
    peer, _ = listener.accept()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least there is: some sockets ahead, not hundreds
    with peer, suppress(OSError):
        while True:
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as made:
                peer.sendmsg([b"s"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [made.fileno()]))])


class Cell:
    """The supervisor's end: fetches sockets.

    Args:
        folder: the server's.
    """

    def __init__(self, folder: Path) -> None:
        self._peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._peer.settimeout(1.0)
        self._peer.connect(str(folder / SOCKET))

    def fetch(self) -> socket.socket:
        """A TCP socket inside, not connected yet.

        Raises:
            OSError: the helper is gone or stopped.
        """
        content, files, _, _ = socket.recv_fds(self._peer, 1, 1)
        if not content or not files:
            raise OSError("the pipeline's network is gone")
        made = socket.socket(fileno=files[0])
        made.setblocking(False)
        return made

    def close(self) -> None:
        """No more sockets."""
        self._peer.close()


def main(folder: Path, program: str, arguments: list[str]) -> None:
    """Become ``program``, in a cell if that can be; a child hands out sockets."""
    try:
        enter()
    except OSError as error:
        (folder / REFUSED).write_text(error.strerror or str(error), encoding="utf-8")
    else:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(folder / SOCKET))
        listener.listen(1)
        if os.fork() == 0:
            hand_out(listener)
            os._exit(0)
        listener.close()
    os.execv(program, [program, *arguments])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
