"""Draws random numbers of every kind when asked to: for integration/random_test.go.

usage: draw.py [sdk]
"""

import os
import random
import secrets
import ssl
import sys
import time
import uuid

if "sdk" in sys.argv[1:]:
    import crac

kinds = {
    "ssl.RAND_bytes": lambda: ssl.RAND_bytes(16).hex(),
    "random": lambda: f"{random.getrandbits(128):032x}",
    "os.urandom": lambda: os.urandom(16).hex(),
    "secrets": lambda: secrets.token_hex(16),
    "uuid4": lambda: uuid.uuid4().hex,
}


def draw():
    for kind, one in kinds.items():
        for _ in range(64):
            print("drew", kind, one(), flush=True)


def do(command):
    if command == "draw":
        draw()
    elif command == "env":
        print("env", os.environ.get("CRAC_TEST_CLONE"), flush=True)
    elif command == "checkpoint":
        try:
            print("outcome", crac.checkpoint(), flush=True)
        except crac.CheckpointError as e:
            print("error", e, flush=True)


draw()  # every generator has a state by now
print("ready", flush=True)
while True:
    time.sleep(0.05)
    try:
        os.rename("/ask", "/asked")
    except FileNotFoundError:
        continue
    with open("/asked") as f:
        do(f.read().strip())
    print("done", flush=True)
