"""Take part in checkpoint and restore of a container run by io.containerd.crac.v2.

    import crac

    @crac.register_before_snapshot
    def close_pool(): ...

    @crac.register_after_restore
    async def reopen_pool(): ...

Importing it is enough for the reseeding of random generators and for the new
environment after a restore. In any other container the functions can be called,
and nothing calls the hooks.

The hooks of one process run one after another: before-snapshot hooks against the
order of their registration, the others in it. Each is called even if another
raises; all that they raise is logged (logger "crac") and sent to the runtime: a
before-snapshot hook that raises prevents the checkpoint. A function that is
registered while an asyncio loop runs is called in that loop. Others are called in
a thread of this module; a coroutine function is then run by asyncio.run, or in the
loop that use_event_loop named.

A child made by os.fork takes part for itself, with the hooks of its parent.
"""

from ._control import CheckpointError, RestoreError, Unavailable, status
from ._hooks import (
    register_after_restore,
    register_after_resume,
    register_before_snapshot,
    register_check,
    unregister,
    use_event_loop,
)
from ._participant import Restore, available, checkpoint, checkpoint_async, last_restore, start
from ._reseed import reseed
from ._settings import settings

__all__ = [
    "CheckpointError",
    "Restore",
    "RestoreError",
    "Unavailable",
    "available",
    "checkpoint",
    "checkpoint_async",
    "last_restore",
    "register_after_restore",
    "register_after_resume",
    "register_before_snapshot",
    "register_check",
    "reseed",
    "settings",
    "start",
    "status",
    "unregister",
    "use_event_loop",
]

start()
