"""The environment of a clone's own start."""

import os


def _of_start():
    """What the container was started with. Its first process knows; between that and
    this one a script may have changed more, which a restore must leave alone."""
    for pid in ("1", "self"):
        try:
            with open(f"/proc/{pid}/environ", "rb") as f:
                pairs = (os.fsdecode(p).partition("=") for p in f.read().split(b"\0"))
        except OSError:
            continue
        env = {k: v for k, sep, v in pairs if sep}
        if "CRAC_DIR" in env:
            return env
    return dict(os.environ)


_before = _of_start()


def update(env):
    """Puts into os.environ what differs between the request that started the container
    first and this one. What the program itself changed stays, unless the request
    changed the same variable; a variable goes that the request no longer has. CRAC_DIR
    is where the sockets are, in a clone too."""
    global _before
    for name in (_before.keys() | env.keys()) - {"CRAC_DIR"}:
        if _before.get(name) == env.get(name):
            continue
        if name in env:
            os.environ[name] = env[name]
        elif os.environ.get(name) == _before[name]:
            del os.environ[name]
    _before = dict(env)
