"""What is Python's own about the SDK: event loops, fork, random generators. The
contract is tested for all languages by sdk/conformance_test.go, which runs this too."""

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import unittest
from unittest import mock

directory = tempfile.TemporaryDirectory(prefix="crac")
os.environ["CRAC_DIR"] = directory.name

import crac  # noqa: E402  (it listens in the directory)


def tearDownModule():
    directory.cleanup()


def tell(event, pid=None, **more):
    """Plays the runtime's part."""
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(20)
        s.connect(os.path.join(directory.name, f"python-{pid or os.getpid()}.sock"))
        message = {"v": 1, "event": event, "id": "1", "deadline_ms": 10000, **more}
        s.sendall(json.dumps(message).encode() + b"\n")
        with s.makefile() as f:
            return json.loads(f.read())


def tell_soon(event, pid):
    """tell for another process, which may not listen yet."""
    for _ in range(200):
        try:
            return tell(event, pid)
        except (ConnectionRefusedError, FileNotFoundError):
            time.sleep(0.1)
    raise AssertionError(f"{pid} does not listen")


class Case(unittest.TestCase):
    def setUp(self):
        self.calls = []

    def register(self, register, func, *args, **kwargs):
        register(func, *args, **kwargs)
        self.addCleanup(crac.unregister, func)


class Registration(Case):
    def test_decorators_leave_the_function_as_it_was(self):
        for register in (
            crac.register_before_snapshot,
            crac.register_after_restore,
            crac.register_after_resume,
            crac.register_check,
        ):

            @register
            def hook():
                return 7

            self.addCleanup(crac.unregister, hook)
            self.assertEqual(hook(), 7)

    def test_arguments(self):
        self.register(crac.register_before_snapshot, lambda *a, **k: self.calls.append((a, k)), 1, b=2)
        self.assertEqual(tell("before-checkpoint"), {"ok": True})
        self.assertEqual(self.calls, [((1,), {"b": 2})])

    def test_unregister(self):
        self.register(crac.register_check, self.calls.append, 1)
        crac.unregister(self.calls.append)
        tell("check")
        self.assertEqual(self.calls, [])

    def test_not_callable(self):
        with self.assertRaisesRegex(TypeError, "callable, not int"):
            crac.register_check(7)

    def test_a_hook_that_exits_ends_nothing(self):
        self.register(crac.register_check, sys.exit, "no")
        with self.assertLogs("crac", "ERROR"):
            self.assertEqual(tell("check"), {"ok": False, "error": "exit: SystemExit: no"})
        with self.assertLogs("crac", "ERROR"):
            self.assertFalse(tell("check")["ok"])


class EventLoops(Case):
    """Hooks registered while a loop runs are called in it, others elsewhere."""

    def in_a_loop(self, main):
        async def bounded():
            return await asyncio.wait_for(main(), 20)

        return asyncio.run(bounded())

    async def tell(self, *args, **kwargs):
        return await asyncio.get_running_loop().run_in_executor(None, lambda: tell(*args, **kwargs))

    def hooks(self):
        async def coroutine():
            await asyncio.sleep(0)
            self.calls.append(("coroutine", threading.current_thread(), asyncio.get_running_loop()))

        def function():
            try:
                loop = asyncio.get_running_loop()
            except RuntimeError:
                loop = None
            self.calls.append(("function", threading.current_thread(), loop))

        return coroutine, function

    def test_in_the_loop_of_registration(self):
        async def main():
            for hook in self.hooks():
                self.register(crac.register_after_restore, hook)
            self.assertEqual(await self.tell("after-restore"), {"ok": True})
            return asyncio.get_running_loop()

        loop = self.in_a_loop(main)
        me = threading.current_thread()
        self.assertEqual(self.calls, [("coroutine", me, loop), ("function", me, loop)])

    def test_after_the_loop_has_ended(self):
        async def main():
            for hook in self.hooks():
                self.register(crac.register_after_restore, hook)

        self.in_a_loop(main)
        self.assertEqual(tell("after-restore"), {"ok": True})
        self.assertEqual([(what, t.name) for what, t, _ in self.calls], [("coroutine", "crac"), ("function", "crac")])

    def test_use_event_loop_needs_one(self):
        with self.assertRaisesRegex(RuntimeError, "no event loop runs here"):
            crac.use_event_loop()

    def test_use_event_loop(self):
        for hook in self.hooks():
            self.register(crac.register_after_restore, hook)

        async def main():
            crac.use_event_loop()
            self.assertEqual(await self.tell("after-restore"), {"ok": True})
            return asyncio.get_running_loop()

        loop = self.in_a_loop(main)
        self.assertEqual([c[::2] for c in self.calls], [("coroutine", loop), ("function", None)])

    def test_a_coroutine_that_takes_too_long_is_cancelled_and_named(self):
        async def main():
            cancelled = asyncio.Event()

            async def close_pool():
                try:
                    await asyncio.sleep(60)
                finally:
                    cancelled.set()

            self.register(crac.register_before_snapshot, close_pool)
            with self.assertLogs("crac", "ERROR"):
                answer = await self.tell("before-checkpoint", deadline_ms=200)
            self.assertRegex(answer["error"], "close_pool: TimeoutError: ")
            await cancelled.wait()
            await self.tell("after-resume", outcome="failed")

        self.in_a_loop(main)

    def test_the_hooks_own_timeout(self):
        async def main():
            async def ping():
                raise asyncio.TimeoutError("no pong")

            self.register(crac.register_check, ping)
            with self.assertLogs("crac", "ERROR"):
                self.assertRegex((await self.tell("check"))["error"], "TimeoutError: no pong")

        self.in_a_loop(main)

    def test_checkpoint_would_block_the_loop(self):
        async def main():
            with self.assertRaisesRegex(crac.CheckpointError, "checkpoint_async"):
                crac.checkpoint()
            answers = {"checkpoint": {"id": "1"}, "outcome": {"outcome": "checkpointed"}}
            with mock.patch("crac._control.ask", lambda request: answers[request["op"]]):
                self.assertEqual(await crac.checkpoint_async(), "checkpointed")

        self.in_a_loop(main)


class Processes(Case):
    def wait(self, pid):
        self.assertEqual(os.waitpid(pid, 0)[1], 0)

    def test_a_forked_child_takes_part_with_the_hooks_of_its_parent(self):
        r, w = os.pipe()
        self.register(crac.register_check, lambda: os.write(w, b"%d\n" % os.getpid()))
        go_r, go_w = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(go_w)
            os._exit(len(os.read(go_r, 1)))
        self.assertEqual(tell_soon("check", pid), {"ok": True})
        self.assertEqual(tell("check"), {"ok": True})
        self.assertEqual(os.read(r, 100), b"%d\n%d\n" % (pid, os.getpid()))
        os.close(go_w)
        self.wait(pid)
        # Nobody is at its socket any more, and the next one to start clears it away.
        left = os.path.join(directory.name, f"python-{pid}.sock")
        self.assertTrue(os.path.exists(left))
        with self.assertRaises(ConnectionRefusedError):
            tell("check", pid)
        code = "import crac; assert crac.available()"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
        self.assertFalse(os.path.exists(left))

    def test_a_parent_that_ends_leaves_nobody_at_its_socket(self):
        code = "import crac, os, sys; print(os.getpid(), flush=True); pid = os.fork(); sys.stdin.read() if pid == 0 else os._exit(0)"
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as p:
            pid = int(p.stdout.readline())
            self.assertEqual(p.wait(60), 0)  # its child still runs
            with self.assertRaises((ConnectionRefusedError, FileNotFoundError)):
                while True:  # until the child has let go
                    try:
                        tell("check", pid)
                    except ConnectionResetError:
                        pass
            p.stdin.close()
            p.stdout.read()

    def test_a_daemon_that_closes_all_descriptors_still_takes_part(self):
        code = """if True:
            import crac, os, sys
            crac.register_check(lambda: None)
            os.closerange(3, 256)
            os.open("/dev/null", os.O_RDONLY)  # takes a number that was closed
            print("ready", flush=True)
            sys.stdin.read()"""
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as p:
            self.assertEqual(p.stdout.readline(), "ready\n")
            for _ in range(3):
                self.assertEqual(tell_soon("check", p.pid), {"ok": True})
            p.communicate(timeout=60)
            self.assertEqual(p.returncode, 0)


class Randomness(Case):
    def test_after_a_restore_seeds_are_new(self):
        drawn = []
        for _ in range(2):
            random.seed(1)
            tell("after-restore")
            drawn.append(random.random())
        self.assertNotEqual(*drawn)

    def test_a_program_may_keep_its_seeds(self):
        crac.settings.reseed = False
        self.addCleanup(setattr, crac.settings, "reseed", True)
        drawn = []
        for _ in range(2):
            random.seed(1)
            tell("after-restore")
            drawn.append(random.random())
        self.assertEqual(*drawn)

    def test_what_is_loaded_is_reseeded(self):
        seeded = []

        class Binding:
            class lib:
                @staticmethod
                def RAND_add(data, size, entropy):
                    seeded.append(("cryptography", len(data) == size == entropy == 64))

        for name, func in (
            ("numpy.random", {"seed": lambda: seeded.append("numpy")}),
            ("_ssl", {"RAND_add": lambda data, entropy: seeded.append(("ssl", len(data) == entropy == 64))}),
            ("cryptography.hazmat.bindings._rust", {}),
            ("cryptography.hazmat.bindings.openssl.binding", {"Binding": Binding}),
        ):
            module = types.ModuleType(name)
            vars(module).update(func)
            self.addCleanup(
                lambda name=name, old=sys.modules.get(name): sys.modules.update({name: old}) if old else sys.modules.pop(name)
            )
            sys.modules[name] = module
        self.assertEqual(tell("after-restore"), {"ok": True})
        self.assertEqual(seeded, ["numpy", ("ssl", True), ("cryptography", True)])

    def test_openssl_in_any_library(self):
        import hashlib

        hashlib.sha256(b"")  # loads libcrypto where it is shared
        crac.reseed()

    def test_a_library_is_found_where_its_path_leads_elsewhere(self):
        import ssl  # noqa: F401

        from crac import _reseed

        shared = [p for p in _reseed._libcryptos() if p.endswith(".so.3")]
        if not shared:
            self.skipTest("this Python has OpenSSL 3 built in, or an older one")
        for name in ("libcrypto.so.3", "libcrypto.so.3.0.7"):
            self.assertEqual(_reseed._loaded("/elsewhere/" + name).RAND_poll(), 1)
        with self.assertRaisesRegex(OSError, "cannot be found"):
            _reseed._loaded("/elsewhere/libcrypto-not-loaded.so.3")

    def test_a_failure_is_told_and_the_hooks_run(self):
        def broken():
            raise OSError("no entropy")

        module = types.ModuleType("numpy.random")
        module.seed = broken
        self.addCleanup(sys.modules.pop, "numpy.random")
        sys.modules["numpy.random"] = module
        self.register(crac.register_after_restore, self.calls.append, 1)
        with self.assertLogs("crac", "ERROR"):
            self.assertEqual(tell("after-restore"), {"ok": False, "error": "reseed: OSError: no entropy"})
        self.assertEqual(self.calls, [1])


if __name__ == "__main__":
    unittest.main()
