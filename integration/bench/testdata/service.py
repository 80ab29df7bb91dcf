import hashlib, os, secrets, signal, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

ID = secrets.token_hex(8)
ITEMS = [os.urandom(4096) for _ in range(50 * 256)]

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        text = ID
        if self.path == "/sum":
            digest = hashlib.sha1()
            for item in ITEMS:
                digest.update(item)
            text = digest.hexdigest()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass

# As PID 1 there is no default action for signals.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
HTTPServer(("0.0.0.0", 8080), Handler).serve_forever()
