"""New seeds for the random generators that a process has in its own memory.

A clone's memory is its siblings': without new seeds they all draw the same numbers.
os.urandom, secrets and uuid.uuid4 ask the kernel each time and need none.
"""

import os
import re
import sys


def reseed():
    """Gives new seeds from the kernel to what this process has loaded of: OpenSSL (ssl,
    and every libcrypto that other modules brought), random, and numpy's global
    generator. It is called after each restore, before the hooks.

    Generators that a program made for itself (random.Random, numpy's default_rng) are
    its own to reseed. So is an OpenSSL that a module hides within itself, but for that
    of the cryptography package.
    """
    if "random" in sys.modules:
        sys.modules["random"].seed()
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    _openssl()


def prepare():
    """Loads before a checkpoint what reseed needs after it: it is then in the image."""
    try:
        import ctypes  # noqa: F401
    except ImportError:
        pass


def _openssl():
    # Adding as much as a whole seed makes the first generator take new entropy, and the
    # generators of each thread, which compare a count with it, follow at their next use.
    # OpenSSL does this by itself when it sees another process id, as after fork; a
    # clone has the same.
    if "_ssl" in sys.modules:
        sys.modules["_ssl"].RAND_add(os.urandom(64), 64.0)
    if "cryptography.hazmat.bindings.openssl.binding" in sys.modules:
        lib = sys.modules["cryptography.hazmat.bindings.openssl.binding"].Binding.lib
        if hasattr(lib, "RAND_add"):
            lib.RAND_add(os.urandom(64), 64, 64.0)
    for path in _loaded_libcrypto():
        import ctypes

        if ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY).RAND_poll() != 1:
            raise RuntimeError(f"{path}: RAND_poll failed: OpenSSL has no new seed")


def _loaded_libcrypto():
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        paths = {line.rstrip("\n").split(None, 5)[5] for line in maps if "/libcrypto" in line}
    return sorted(p for p in paths if re.search(r"/libcrypto[^/]*\.so[^/ ]*$", p))
