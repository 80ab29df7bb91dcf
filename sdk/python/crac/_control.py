"""Requests to the runtime, over control.sock."""

import json
import os
import socket
import time


class CheckpointError(Exception):
    """There was no checkpoint. errors holds what this process's own hooks raised."""

    def __init__(self, message, errors=()):
        super().__init__(message)
        self.errors = list(errors)


class RestoreError(CheckpointError):
    """The program was restored, but after-restore hooks of this process raised:
    errors holds what."""


class Unavailable(CheckpointError):
    """Nobody is there to ask: this container's runtime is another one, or was told
    hooks=off, or does not answer."""


def directory():
    """Where the sockets are. A shell or su may have dropped the variable."""
    return os.environ.get("CRAC_DIR") or "/run/crac"


def status():
    """What this container is, as a dict: "start" is "cold" or "warm", "reason" says why
    it is cold, "image" and "generation" where it comes from; docs/hooks.md lists all.

    Raises Unavailable in a container of another runtime.
    """
    return ask({"op": "status"})


def ask(request, tries=500):
    """Sends one request and returns the answer. During a dump there is no control.sock,
    so it is tried again. Tries are counted, not seconds: frozen, a process has none."""
    path = os.path.join(directory(), "control.sock")
    if not os.path.isdir(directory()):
        raise Unavailable(f"{directory()} does not exist: this container does not run under io.containerd.crac.v2, or with hooks=off")
    line = json.dumps({"v": 1, **request}).encode() + b"\n"
    while True:
        try:
            answer = _exchange(path, line, 10 + request.get("wait_ms", 0) / 1000)
            break
        except (FileNotFoundError, ConnectionError, EOFError) as e:
            tries -= 1
            if tries <= 0:
                raise Unavailable(f"{path} does not answer: {e}") from e
            time.sleep(0.02)
        except OSError as e:
            raise Unavailable(f"{path}: {e}") from e
    if answer.get("ok") is not True:
        raise CheckpointError(answer.get("error") or f"{path}: the runtime refused without a reason")
    return answer


def _exchange(path, line, timeout):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
        s.settimeout(timeout)
        s.connect(path)
        s.sendall(line)
        data = read_line(s, timeout)
    if data is None:
        raise EOFError("the connection was closed")
    try:
        return json.loads(data)
    except ValueError as e:
        raise OSError(f"the answer is not JSON: {e}") from None


def read_line(s, timeout, most=1 << 20):
    """Reads up to a newline, for that many seconds in all; None if the connection ends
    without one."""
    data = bytearray()
    deadline = time.monotonic() + timeout
    while not data.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0:
            raise socket.timeout(f"no line within {timeout} s")
        s.settimeout(left)
        more = s.recv(1 << 16)
        if not more or len(data) + len(more) > most:
            return None
        data += more
    return bytes(data)
