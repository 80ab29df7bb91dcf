"""A workload for checkpoints: an HTTP server whose state is only in memory: a
counter, a thread that ticks, and a child process, reached by two pipes, that every
count goes through."""

import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def spawn_child():
    """Starts the child, which answers every line with its own count of lines."""
    to_child, from_child = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(to_child[1])
        os.close(from_child[0])
        lines = 0
        with os.fdopen(to_child[0]) as requests, os.fdopen(from_child[1], "w") as answers:
            for _ in requests:
                lines += 1
                answers.write(f"{lines}\n")
                answers.flush()
        os._exit(0)
    os.close(to_child[0])
    os.close(from_child[1])
    return pid, os.fdopen(to_child[1], "w"), os.fdopen(from_child[0])


class State:
    """What a restored server must still know."""

    def __init__(self):
        self.lock = threading.Lock()
        self.count = 0
        self.ticks = 0
        self.child, self.requests, self.answers = spawn_child()

    def tick(self):
        while True:
            time.sleep(0.1)
            self.ticks += 1

    def next(self):
        with self.lock:
            self.count += 1
            self.requests.write("count\n")
            self.requests.flush()
            return self.count, int(self.answers.readline())


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/":
            body = f"ok\npid={os.getpid()}\n"
        elif self.path == "/count":
            count, echo = STATE.next()
            body = f"count={count}\necho={echo}\nticks={STATE.ticks}\npid={os.getpid()}\nchild={STATE.child}\n"
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


# As PID 1 there is no default action for signals.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
STATE = State()
threading.Thread(target=STATE.tick, daemon=True).start()
print("python: listening on 8080")
ThreadingHTTPServer(("0.0.0.0", 8080), Handler).serve_forever()
