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
    its own to reseed. An OpenSSL that a module hides within itself is out of reach, but
    for that of the cryptography package.
    """
    if "random" in sys.modules:
        sys.modules["random"].seed()
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    _openssl()


def prepare():
    """Finds before a checkpoint what reseed needs after it: it is then in the image."""
    try:
        _libcryptos()
    except (ImportError, OSError):
        pass  # reseed will say so


def _openssl():
    # Adding as much as a whole seed makes the first generator take new entropy, and the
    # generators of each thread, which compare a count with it, follow at their next use.
    # OpenSSL does this by itself when it sees another process id, as after fork; a
    # clone has the same.
    if "_ssl" in sys.modules:
        sys.modules["_ssl"].RAND_add(os.urandom(64), 64.0)
    if any(name in sys.modules for name in ("cryptography.hazmat.bindings._rust", "cryptography.hazmat.bindings._openssl")):
        from cryptography.hazmat.bindings.openssl.binding import Binding

        Binding.lib.RAND_add(os.urandom(64), 64, 64.0)
    for path, library in _libcryptos().items():
        if library.RAND_poll() != 1:
            raise RuntimeError(f"{path}: RAND_poll failed: OpenSSL has no new seed")


_found = {}


def _libcryptos():
    """Every shared libcrypto of this process, by its path."""
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        lines = [line.rstrip("\n").split(None, 5) for line in maps if "/libcrypto" in line]
    for path in {line[5] for line in lines}:
        if path not in _found and re.search(r"/libcrypto[^/]*\.so[^/ ]*$", path):
            _found[path] = _loaded(path)
    return _found


def _loaded(path):
    """The library that is mapped from path. The linker knows what it has loaded by name,
    or by device and inode, which are not those of the dump in a clone."""
    import ctypes

    name = os.path.basename(path)
    names = [path, name]
    while re.search(r"\.so\.\d+(\.\w+)+$", name):
        name = name.rpartition(".")[0]
        names.append(name)
    for name in names:
        try:
            return ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        except OSError:
            pass
    raise OSError(f"{path}: cannot be found again in this process, so its generator has no new seed")
