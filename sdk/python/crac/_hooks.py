"""What a program registered, and how it is called."""

import inspect
import logging
import sys
import threading
import time

log = logging.getLogger("crac")

_lock = threading.Lock()
_registered = {"before-checkpoint": [], "after-restore": [], "after-resume": [], "check": []}
_default_loop = None


class _Hook:
    def __init__(self, func, args, kwargs):
        self.func, self.args, self.kwargs = func, args, kwargs
        self.loop = running_loop()

    def __str__(self):
        return getattr(self.func, "__qualname__", None) or repr(self.func)

    def call(self, deadline):
        """Calls the function where it belongs. In an event loop it is waited for
        until deadline, a time.monotonic; elsewhere nothing can interrupt it."""
        loop = self.loop
        if loop is None and inspect.iscoroutinefunction(self.func):
            loop = _default_loop
        if loop is None or not loop.is_running():
            result = self.func(*self.args, **self.kwargs)
            if inspect.isawaitable(result):
                import asyncio

                asyncio.run(_wait_for(result))
            return
        import asyncio
        import concurrent.futures

        future = asyncio.run_coroutine_threadsafe(self._call_in_loop(), loop)
        done, _ = concurrent.futures.wait([future], max(deadline - time.monotonic(), 0))
        if not done:
            future.cancel()
            raise TimeoutError("has not ended in time")
        future.result()

    async def _call_in_loop(self):
        result = self.func(*self.args, **self.kwargs)
        if inspect.isawaitable(result):
            await result


def running_loop():
    """The event loop that runs in this thread, or None. asyncio is not for us to load:
    most of what this module needs to start would be that."""
    if "asyncio" not in sys.modules:
        return None
    try:
        return sys.modules["asyncio"].get_running_loop()
    except RuntimeError:
        return None


async def _wait_for(awaitable):
    await awaitable


def _register(event, func, args, kwargs):
    if not callable(func):
        raise TypeError(f"a hook must be callable, not {type(func).__name__}")
    with _lock:
        _registered[event].append(_Hook(func, args, kwargs))
    return func


def register_before_snapshot(func, *args, **kwargs):
    """Has func(*args, **kwargs) called before a checkpoint: a decorator, or a call.

    If it raises, there is no checkpoint, and the after-resume hooks are called.
    """
    return _register("before-checkpoint", func, args, kwargs)


def register_after_restore(func, *args, **kwargs):
    """Has func(*args, **kwargs) called in each clone, before its start is reported.

    crac.last_restore() then tells what the clone is, and os.environ is up to date.
    """
    return _register("after-restore", func, args, kwargs)


def register_after_resume(func, *args, **kwargs):
    """Has func(*args, **kwargs) called when the original goes on: after a checkpoint
    that left it running, and after one that failed."""
    return _register("after-resume", func, args, kwargs)


def register_check(func, *args, **kwargs):
    """Has func(*args, **kwargs) called when somebody asks whether a checkpoint would
    be possible now. It raises if not, and must change nothing."""
    return _register("check", func, args, kwargs)


def unregister(func):
    """Forgets func, for all events it was registered for."""
    with _lock:
        for hooks in _registered.values():
            hooks[:] = [h for h in hooks if h.func != func]


def use_event_loop(loop=None):
    """Names the loop for coroutine functions that were registered outside of any, such
    as by a decorator: the loop given, or else the one that runs here and now."""
    global _default_loop
    _default_loop = loop or running_loop()
    if _default_loop is None:
        raise RuntimeError("no event loop runs here: call use_event_loop() in a coroutine, or with a loop")


def call(event, deadline):
    """Calls the hooks for an event and returns what they raised."""
    with _lock:
        hooks = list(_registered.get(event, ()))
    if event in ("before-checkpoint", "check"):
        hooks.reverse()
    errors = []
    for hook in hooks:
        try:
            hook.call(deadline)
        except BaseException as e:  # also SystemExit: this is not its thread to end
            log.error("the %s hook %s failed", event, hook, exc_info=True)
            errors.append((str(hook), e))
    return errors


def after_fork():
    """A lock that another thread of the parent held would never be released here."""
    global _lock
    _lock = threading.Lock()
