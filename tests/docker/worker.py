"""A service for the Docker tests: answers on $PORT, and misbehaves as its environment says.

POST /process {"op": "echo"|"sleep"|"crash"|"say"|"allocate", ...}   POST /cancel   GET /health
"""

import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ENV = os.environ
cancelled = set()


def say(text):
    print(text, flush=True)


def on_term(_signal, _frame):
    say("TERM")
    if ENV.get("IGNORE_TERM"):
        return
    os._exit(int(ENV.get("TERM_EXIT", "0")))


def work(job, run):
    op = job.get("op", "echo")
    if op == "echo":
        return {"echo": job, "generation": ENV.get("RUNGATE_GENERATION"), "uid": os.getuid()}
    if op == "sleep":
        end = time.monotonic() + job["ms"] / 1000
        while time.monotonic() < end:
            if run in cancelled:
                return None
            time.sleep(0.01)
        return {"slept_ms": job["ms"]}
    if op == "crash":
        os._exit(job.get("code", 1))
    if op == "signal":
        os.kill(os.getpid(), job["signal"])
        time.sleep(10)
    if op == "say":
        line = "x" * 1023 + "\n"
        for _ in range(job["kib"]):
            sys.stdout.write(line)
        sys.stdout.flush()
        return {"said_kib": job["kib"]}
    if op == "allocate":
        block = bytearray(job["mib"] << 20)
        for i in range(0, len(block), 4096):
            block[i] = 1
        return {"allocated_mib": job["mib"]}
    if op == "write":
        with open(job["path"], "w") as file:
            file.write("x")
        return {"written": job["path"]}
    raise ValueError(f"no such op: {op}")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        healthy = ENV.get("HEALTH") != "never"
        self.answer(200 if healthy else 503, {"healthy": healthy})

    def do_POST(self):
        received_at = time.time()
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        job = json.loads(body or b"{}")
        if self.path == "/cancel":
            cancelled.add(job["run_id"])
            return self.answer(200, {"cancelled": True})
        try:
            result = work(job, self.headers.get("X-Rungate-Run-Id"))
        except Exception as error:
            return self.answer(500, {"error": str(error)})
        if result is not None:
            result["received_at"] = received_at
        if result is None:
            return self.answer(409, {"error": "cancelled"})
        self.answer(200, result)


if "EXIT_AT_ONCE" in ENV:
    say("not today")
    sys.exit(int(ENV["EXIT_AT_ONCE"]))
signal.signal(signal.SIGTERM, on_term)
server = ThreadingHTTPServer(("", int(ENV.get("PORT", "8080"))), Handler)
say(f"listening on {server.server_port} as uid {os.getuid()}")
threading.Thread(target=server.serve_forever).start()
