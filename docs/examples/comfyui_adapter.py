#!/usr/bin/env python3
"""A Rungate service in front of ComfyUI: takes jobs at POST /process and has ComfyUI work on them.

    rungate service register comfyui --type image-generation --vram-gb 12 --cancel-path /cancel \
        --env COMFYUI_URL=http://127.0.0.1:8188 -- python3 comfyui_adapter.py

A job's payload is {"workflow": {...}}, a workflow as ComfyUI's "Save (API format)" writes it. The result names the images:
{"prompt_id": ..., "images": [{"node", "filename", "subfolder", "type", "url"}]}.

Python's standard library alone. ComfyUI works on one prompt at a time, so register it with a concurrency of 1 (the default).
"""

import http.client
import json
import os
import signal
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMFYUI = os.environ.get("COMFYUI_URL", "http://127.0.0.1:8188").rstrip("/")
PORT = int(os.environ.get("PORT", "8189"))
POLL_S = float(os.environ.get("POLL_S", "0.5"))
CALL_TIMEOUT_S = 30
# ComfyUI may be busy loading a model: so many questions in a row may go unanswered.
FAILURES_ALLOWED = 20
MAX_BODY_BYTES = 16 << 20


class Refused(Exception):
    """What the caller is told, and with which status."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


def ask(method, path, body=None):
    """One call of ComfyUI; its JSON, or None where it answers nothing."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(COMFYUI + path, data=data, method=method)
    if data is not None:
        request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=CALL_TIMEOUT_S) as answer:
        text = answer.read()
    return json.loads(text) if text.strip() else None


class Job:
    """One attempt of a run, from its prompt to its images."""

    def __init__(self, headers):
        self.run = headers.get("X-Rungate-Run-Id", "")
        self.attempt = headers.get("X-Rungate-Attempt", "")
        self.progress_url = headers.get("X-Rungate-Progress")
        self.token = headers.get("X-Rungate-Token")
        self.prompt = None
        self.told = None
        self.is_cancelled = threading.Event()
        self.has_ended = threading.Event()

    def tell(self, progress):
        """Reports progress, once per change. That it cannot be reported is no reason to stop working."""
        if not self.progress_url or progress == self.told:
            return
        self.told = progress
        request = urllib.request.Request(self.progress_url, data=json.dumps(progress).encode(), method="POST")
        request.add_header("Content-Type", "application/json")
        request.add_header("X-Rungate-Attempt", self.attempt)
        if self.token:
            request.add_header("Authorization", "Bearer " + self.token)
        try:
            urllib.request.urlopen(request, timeout=CALL_TIMEOUT_S).close()
        except OSError as error:
            print(f"progress of run {self.run} was not taken: {error}", file=sys.stderr)

    def submit(self, workflow):
        """Queues the workflow, unless an earlier attempt of this run has done so and it is still there."""
        self.prompt = self.earlier()
        if self.prompt:
            return
        try:
            answer = ask("POST", "/prompt", {"prompt": workflow, "client_id": self.run})
        except urllib.error.HTTPError as error:
            raise Refused(422 if error.code == 400 else 502, f"ComfyUI refused the workflow: {explained(error)}")
        except OSError as error:
            raise Refused(502, f"ComfyUI does not answer: {error}")
        self.prompt = answer["prompt_id"]

    def earlier(self):
        """The prompt of an attempt that was cut off: ComfyUI's queue says who asked for each."""
        if not self.run:
            return None
        try:
            queue = ask("GET", "/queue")
        except OSError:
            return None
        for item in queue.get("queue_running", []) + queue.get("queue_pending", []):
            if len(item) > 3 and isinstance(item[3], dict) and item[3].get("client_id") == self.run:
                return item[1]
        return None

    def follow(self):
        """Waits for the prompt's end; its entry in ComfyUI's history."""
        failures = 0
        while not self.is_cancelled.wait(POLL_S):
            try:
                entry = (ask("GET", "/history/" + urllib.parse.quote(self.prompt)) or {}).get(self.prompt)
                if entry:
                    return entry
                self.tell(self.place())
                failures = 0
            except (OSError, ValueError, http.client.HTTPException) as error:
                failures += 1
                if failures > FAILURES_ALLOWED:
                    raise Refused(502, f"ComfyUI does not answer any more: {error}")
        raise Refused(409, "the job was cancelled")

    def place(self):
        """Where the prompt is in ComfyUI's queue."""
        queue = ask("GET", "/queue")
        if any(item[1] == self.prompt for item in queue.get("queue_running", [])):
            return {"state": "running"}
        pending = sorted(queue.get("queue_pending", []), key=lambda item: item[0])
        ahead = [item[1] for item in pending]
        return {"state": "queued", "ahead": ahead.index(self.prompt)} if self.prompt in ahead else {"state": "ending"}

    def cancel(self):
        """Takes the prompt out of the queue, and interrupts it if it is the one that runs."""
        self.is_cancelled.set()
        if not self.prompt:
            return
        ask("POST", "/queue", {"delete": [self.prompt]})
        running = ask("GET", "/queue").get("queue_running", [])
        if any(item[1] == self.prompt for item in running):
            ask("POST", "/interrupt", {"prompt_id": self.prompt})


def explained(error):
    """What ComfyUI says is wrong with a workflow."""
    try:
        body = json.loads(error.read())
        reasons = [body.get("error", {}).get("message", "")]
        for node, wrong in (body.get("node_errors") or {}).items():
            reasons += [f"node {node}: {each.get('message')} {each.get('details', '')}".strip() for each in wrong["errors"]]
        return "; ".join(filter(None, reasons)) or str(error)
    except (ValueError, KeyError, AttributeError):
        return str(error)


def result_of(prompt, entry):
    """The images of a history entry, or a refusal with the reason why there are none."""
    status = entry.get("status") or {}
    if status.get("status_str") == "error":
        messages = [data for kind, data in status.get("messages", []) if kind == "execution_error"]
        reason = messages[0].get("exception_message", "").strip() if messages else "it does not say why"
        raise Refused(500, f"ComfyUI could not execute the workflow: {reason}")
    images = []
    for node, output in sorted((entry.get("outputs") or {}).items()):
        for image in output.get("images", []):
            name = {key: image.get(key, "") for key in ("filename", "subfolder", "type")}
            images.append({"node": node, **name, "url": f"{COMFYUI}/view?{urllib.parse.urlencode(name)}"})
    return {"prompt_id": prompt, "images": images}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    jobs = {}
    lock = threading.Lock()

    def do_GET(self):
        if self.path != "/health":
            return self.answer(404, {"error": "not found"})
        try:
            ask("GET", "/system_stats")
            self.answer(200, {"status": "ok"})
        except (OSError, ValueError) as error:
            self.answer(503, {"status": "unavailable", "error": f"ComfyUI does not answer: {error}"})

    def do_POST(self):
        try:
            body = self.body()
            if self.path == "/process":
                self.answer(200, self.process(body))
            elif self.path == "/cancel":
                self.answer(200, self.cancel(body))
            else:
                self.answer(404, {"error": "not found"})
        except Refused as refused:
            self.answer(refused.status, {"error": str(refused)})
        except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException) as error:
            self.answer(502, {"error": f"ComfyUI answers what was not expected: {error!r}"})

    def body(self):
        length = int(self.headers.get("Content-Length") or 0)
        if length > MAX_BODY_BYTES:
            self.close_connection = True
            raise Refused(413, "the body is too large")
        try:
            body = json.loads(self.rfile.read(length) or b"{}")
        except ValueError as error:
            raise Refused(422, f"the body is not JSON: {error}")
        if not isinstance(body, dict):
            raise Refused(422, "the body is no JSON object")
        return body

    def process(self, payload):
        workflow = payload.get("workflow")
        if not isinstance(workflow, dict) or not workflow:
            raise Refused(422, "the payload needs a 'workflow' in ComfyUI's API format")
        job = Job(self.headers)
        with self.lock:
            self.jobs[job.run] = job
        try:
            job.submit(workflow)
            return result_of(job.prompt, job.follow())
        finally:
            job.has_ended.set()
            with self.lock:
                if self.jobs.get(job.run) is job:
                    del self.jobs[job.run]

    def cancel(self, asked):
        """Rungate asks with {run_id, attempt, reason, grace_ms}; it is answered when the job has come to rest."""
        with self.lock:
            job = self.jobs.get(asked.get("run_id"))
        if not job:
            return {"stopped": True, "known": False}
        job.cancel()
        job.has_ended.wait(asked.get("grace_ms", 10_000) / 1000)
        return {"stopped": job.has_ended.is_set(), "known": True}

    def answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        """Requests are in Rungate's ledger."""


def main():
    server = ThreadingHTTPServer(("127.0.0.1", PORT), Handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print(f"in front of {COMFYUI}, at http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
