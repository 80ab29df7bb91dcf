"""The listening side: a thread that is told what happens, and calls the hooks."""

import atexit
import errno
import json
import logging
import os
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Dict, List, Optional

from . import _control, _environ, _hooks, _reseed
from ._control import CheckpointError, RestoreError
from ._settings import settings

log = logging.getLogger("crac")

_PATIENCE = 10  # seconds for a whole line, in either direction


@dataclass(frozen=True)
class Restore:
    """What a clone was told about itself. env, args and annotations are those of the
    request that started it."""

    generation: str  #: new for each clone
    container: str
    hostname: str
    env: Dict[str, str] = field(default_factory=dict)
    args: List[str] = field(default_factory=list)
    annotations: Dict[str, str] = field(default_factory=dict)
    frozen_ns: int = 0  #: how long it was frozen, in nanoseconds


class _Participant:
    def __init__(self):
        self.pid = os.getpid()
        self.path, self.listener = _listen()
        self.connection = None
        self.changed = threading.Condition()
        # Guarded by changed:
        self.told = None  # the notification that the hooks are being called for
        self.stopped = False  # before-checkpoint came, what ends it did not yet
        self.ended = None  # the last after-resume or after-restore
        self.errors = []  # of the hooks, since the last before-checkpoint
        self.thread = threading.Thread(target=self.serve, name="crac", daemon=True)
        self.thread.start()

    def serve(self):
        while True:
            try:
                self.connection, _ = self.listener.accept()
            except OSError as e:
                log.warning("%s: %s", self.path, e)
                time.sleep(0.1)
                self.listen_again(e)
                continue
            try:
                self.answer(self.connection)
            except Exception as e:
                # Whoever asked has gone, or asks too slowly.
                log.warning("%s: %s", self.path, e)
            finally:
                with self.changed:
                    if self.told and self.told["event"].startswith("after-"):
                        self.stopped, self.ended = False, self.told
                    self.told = None
                    self.changed.notify_all()
                self.connection.close()

    def listen_again(self, error):
        """A program that makes itself a daemon closes all descriptors, this one too."""
        if error.errno not in (errno.EBADF, errno.ENOTSOCK, errno.EINVAL):
            return
        self.listener.detach()  # the number may be another file's now
        try:
            self.path, self.listener = _listen()
        except OSError as e:
            log.warning("%s: %s", self.path, e)

    def answer(self, connection):
        line = _control.read_line(connection, _PATIENCE)
        if line is None:
            return
        try:
            message = json.loads(line)
            event = message["event"]
            deadline = float(message.get("deadline_ms", 10000)) / 1000
            if not isinstance(event, str):
                raise TypeError("the event is no string")
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            errors = [f"not a notification: {e!r}"]
        else:
            # A little before the runtime's, which would not know which hook it waits for.
            errors = self.notify(event, message, time.monotonic() + 0.95 * deadline)
        answer = {"ok": True}
        if errors:
            answer = {"ok": False, "error": "; ".join(errors)[:4096]}
        connection.settimeout(_PATIENCE)
        connection.sendall(json.dumps(answer).encode() + b"\n")

    def notify(self, event, message, deadline):
        """Does what an event asks for, and returns what went wrong, in words."""
        with self.changed:
            self.told = message
            if event == "before-checkpoint":
                self.stopped, self.errors = True, []
        failed = []
        if event == "before-checkpoint":
            _reseed.prepare()
        elif event == "after-restore":
            failed = _adapt(message)
        failed += _hooks.call(event, deadline)
        with self.changed:
            self.errors += [e for _, e in failed]
        return [f"{hook}: {type(e).__name__}: {e}" if str(e) else f"{hook}: {type(e).__name__}" for hook, e in failed]

    def close(self):
        """Lets go of the sockets: at the end, and in a child, where they are its parent's."""
        if self.connection:
            self.connection.close()
        self.listener.close()


def _adapt(message):
    """Makes the process what a clone should be, ahead of its hooks."""
    global _last_restore
    given = {name: message[name] for name in Restore.__dataclass_fields__ if name in message}
    _last_restore = Restore(**{"generation": "", "container": "", "hostname": "", **given})
    failed = []
    for wanted, name, do in (
        (settings.reseed, "reseed", _reseed.reseed),
        (settings.environ and "env" in message, "environ", lambda: _environ.update(_last_restore.env)),
    ):
        try:
            if wanted:
                do()
        except Exception as e:
            log.error("after a restore: %s failed", name, exc_info=True)
            failed.append((name, e))
    return failed


def _listen():
    """Makes this process's socket. A name that another process listens at gets the
    process id added."""
    name = os.environ.get("CRAC_NAME") or f"python-{os.getpid()}"
    if "/" in name or name.startswith(".") or name == "control":
        raise ValueError(f"CRAC_NAME={name}: not a name for a socket: leave out slashes, a dot in front, and 'control'")
    directory = _control.directory()
    _sweep(directory)
    for name in (name, f"{name}-{os.getpid()}"):
        path = os.path.join(directory, name + ".sock")
        if _is_listened_at(path):
            continue
        # No other name first and a rename: CRIU restores it by the name it was bound to.
        s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _unlink(path)
            s.bind(path)
            s.listen()
        except BaseException:
            s.close()
            raise
        return path, s
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE), path)


def _is_listened_at(path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
        s.settimeout(1)
        try:
            s.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True


def _sweep(directory):
    """Removes what processes left that ended without a chance to."""
    for name in os.listdir(directory):
        left = re.fullmatch(r"python-(\d+)\.sock", name)
        if left and not os.path.exists(f"/proc/{left[1]}"):
            _unlink(os.path.join(directory, name))


def _unlink(path):
    try:
        os.unlink(path)
    except OSError:
        pass  # not there, or somebody else's


_participant: Optional[_Participant] = None
_last_restore: Optional[Restore] = None


def start():
    """Begins to take part; importing crac does it. To be called by a program that was
    started without CRAC_DIR and set it later. Returns whether this process takes part."""
    global _participant
    if _participant is None and os.path.isdir(_control.directory()):
        try:
            _participant = _Participant()
        except (OSError, ValueError, RuntimeError) as e:
            # The program works without; that it is not told must not go unseen.
            log.warning("this process takes no part in checkpoints: %s", e)
    return _participant is not None


def available():
    """Whether this process takes part in checkpoints."""
    return _participant is not None


def last_restore():
    """The restore that made this clone, or None in a process that was never restored."""
    return _last_restore


def checkpoint():
    """Asks for a checkpoint of the container, and blocks until it has happened.

    Returns "checkpointed" in the original, if that goes on, and "restored" in each
    clone, when the hooks of this process have been called. Raises CheckpointError if
    there is none (the option checkpoint.allow must be "workload", checkpoint.image must
    name an image, and no participant may object), RestoreError if an after-restore hook
    of this process raised, and Unavailable in a container of another runtime.
    """
    if _hooks.running_loop():
        raise CheckpointError("checkpoint() would block the event loop: await checkpoint_async()")
    me = _participant
    if me is None:
        return _result(_control.ask({"op": "checkpoint"})["id"], None)
    with me.changed:
        if me.told or me.stopped:
            raise CheckpointError("a checkpoint or a restore is under way already")
        before = me.ended
    return _result(_control.ask({"op": "checkpoint"})["id"], me, before)


async def checkpoint_async():
    """checkpoint() for a coroutine: the event loop runs on meanwhile."""
    return await _hooks.running_loop().run_in_executor(None, checkpoint)


def _result(checkpoint_id, me, before=None):
    """Waits until a checkpoint has ended: for our own hooks, and, in the original, until
    the image is there, which takes longer."""
    resumed = False
    while True:
        ended = None if me is None or resumed else _ended(me, checkpoint_id, before)
        if ended:
            resumed = ended.get("outcome") == "checkpointed"
            if not resumed:
                break
        ended = _control.ask({"op": "outcome", "id": checkpoint_id, "wait_ms": 5000 if me is None or resumed else 0})
        # Were we told of its beginning, we shall be told of its end.
        if ended["outcome"] != "pending" and not (me and me.stopped):
            break
    outcome = ended.get("outcome") or "restored"
    errors = me.errors if me else ()
    if outcome == "failed":
        raise CheckpointError(ended.get("error") or "the checkpoint failed", errors)
    if outcome == "restored" and errors:
        raise RestoreError("; ".join(map(str, errors)), errors)
    return outcome


def _ended(me, checkpoint_id, before):
    """Waits a second for the notification that ends a checkpoint."""

    def ended():
        e = me.ended
        return e is not before and (e["event"] == "after-restore" or e.get("id") == checkpoint_id)

    with me.changed:
        return me.ended if me.changed.wait_for(ended, 1) else None


@atexit.register
def _stop():
    if _participant and _participant.pid == os.getpid():
        _unlink(_participant.path)


def _after_fork():
    """A child takes part for itself: it has its own generators and its own copies of
    what the hooks close, and no thread but this one."""
    global _participant
    parents, _participant = _participant, None
    _hooks.after_fork()
    if parents:
        parents.close()
        start()


os.register_at_fork(after_in_child=_after_fork)
