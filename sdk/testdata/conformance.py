"""Uses all of the Python SDK, as conformance_test.go asks for."""

import os
import sys

import crac

failing = set()


def hook(event, name):
    print(event, name, flush=True)
    if (event, name) in failing:
        raise RuntimeError(f"{name} says no")


for name in ("one", "two", "three"):
    crac.register_check(hook, "check", name)
    crac.register_before_snapshot(hook, "before-checkpoint", name)
    crac.register_after_resume(hook, "after-resume", name=name)
    crac.register_after_restore(hook, "after-restore", name=name)


def do(command, *args):
    if command == "fail":
        failing.add(args)
        return "failing"
    if command == "status":
        return "status", crac.status()["start"]
    if command == "checkpoint":
        return "checkpoint", crac.checkpoint()
    if command == "env":
        return ("env", os.environ[args[0]]) if args[0] in os.environ else ("env",)
    if command == "restore":
        r = crac.last_restore()
        return ("restore", r.generation, r.container, r.hostname, r.frozen_ns, *r.args)
    raise ValueError(command)


print("ready", flush=True)
for line in sys.stdin:
    words = line.split()
    try:
        result = do(*words)
    except crac.CheckpointError as e:
        result = words[0], "error:", e
    print(*((result,) if isinstance(result, str) else result), flush=True)
