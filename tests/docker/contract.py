"""A service for the tests of the GPU contract: does work in steps, tells how far it is, and goes on from a checkpoint.

POST /process {"op": "echo"|"fail"|"steps", "n", "ms", "push"}   POST /cancel   GET /progress   GET /health
"""

import json
import os
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

running, cancelled = set(), set()
lock = threading.Lock()
now = {"percent": 0, "at_once": 0, "most_at_once": 0}


def ask(method, url, headers, body=None):
    request = urllib.request.Request(url, method=method, headers=headers, data=body and json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=5) as answer:
        return json.loads(answer.read())


def steps(job, headers):
    run, url = headers["X-Rungate-Run-Id"], headers["X-Rungate-Progress"]
    sent = {
        "Authorization": f"Bearer {headers['X-Rungate-Token']}",
        "X-Rungate-Attempt": headers["X-Rungate-Attempt"],
        "Content-Type": "application/json",
    }
    kept = headers.get("X-Rungate-Checkpoint")
    first = ask("GET", kept, sent)["step"] if kept else 0
    checkpoint = url.replace(f"/queue/{run}/progress", f"/api/gateway/runs/{run}/checkpoint")
    for step in range(first, job["n"]):
        if run in cancelled:
            cancelled.discard(run)
            return None
        time.sleep(job["ms"] / 1000)
        now["percent"] = 100 * (step + 1) // job["n"]
        if job.get("push"):
            ask("PUT", checkpoint, sent, {"step": step + 1})
            ask("POST", url, sent, {"percent": now["percent"], "step": step + 1})
    return {"steps": job["n"], "first": first, "most_at_once": now["most_at_once"]}


class Handler(BaseHTTPRequestHandler):
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
        self.answer(200, now if self.path == "/progress" else {"healthy": True})

    def do_POST(self):
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/cancel":
            # The answer says that it has stopped.
            cancelled.add(job["run_id"])
            while job["run_id"] in running:
                time.sleep(0.005)
            return self.answer(200, {})
        if job["op"] == "echo":
            return self.answer(200, {"echo": job})
        if job["op"] == "fail":
            return self.answer(500, {"error": "it was told to"})
        run = self.headers["X-Rungate-Run-Id"]
        with lock:
            running.add(run)
            now["at_once"] += 1
            now["most_at_once"] = max(now["most_at_once"], now["at_once"])
        try:
            done = steps(job, self.headers)
        except Exception as error:
            print(repr(error), flush=True)
            return self.answer(500, {"error": repr(error)})
        finally:
            with lock:
                running.discard(run)
                now["at_once"] -= 1
        self.answer(200 if done else 409, done or {"error": "cancelled"})


ThreadingHTTPServer(("", int(os.environ["PORT"])), Handler).serve_forever()
