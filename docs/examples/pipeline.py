#!/usr/bin/env python3
"""Three jobs, each with the former's result: removes an image's background, enlarges it, corrects its colours.

    GATEWAY_URL=http://127.0.0.1:8080 GATEWAY_API_TOKEN=... pipeline.py photo.png

It prints the last result. The services are those of image_worker.py, or others that take the same jobs. A job that is
started again under the same key is the same job: run it again after a crash, with the same --key, and it goes on.
"""

import argparse
import json
import os
import sys
import time
import urllib.error
import urllib.request
import uuid

GATEWAY = os.environ.get("GATEWAY_URL", "http://127.0.0.1:8080").rstrip("/").removesuffix("/api/gateway") + "/api/gateway"
TOKEN = os.environ.get("GATEWAY_API_TOKEN", "")
RECONNECT_S = 1


def call(method, path, body=None, headers=None, timeout_s=30):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(GATEWAY + path, data=data, method=method, headers=headers or {})
    request.add_header("Authorization", "Bearer " + TOKEN)
    if data is not None:
        request.add_header("Content-Type", "application/json")
    return urllib.request.urlopen(request, timeout=timeout_s)


def start(service_type, payload, key):
    job = {"job": {"service_type": service_type, "payload": payload}}
    with call("POST", "/runs/start", job, {"Idempotency-Key": key}) as answer:
        return json.load(answer)["run_id"]


def records(run):
    """A run's records as they come, until it has ended; reconnects where the stream broke off."""
    last = "0"
    while True:
        try:
            # More than the heartbeat of 5 s.
            with call("GET", f"/runs/{run}/ledger/stream", headers={"Last-Event-ID": last}, timeout_s=20) as stream:
                event, data = None, ""
                for line in stream:
                    field, _, value = line.decode().rstrip("\n").partition(":")
                    value = value.removeprefix(" ")
                    if field == "id":
                        last = value
                    elif field == "event":
                        event = value
                    elif field == "data":
                        data = value
                    elif not line.strip():
                        if event == "done":
                            return
                        if event == "step":
                            yield json.loads(data)["record"]
                        event, data = None, ""
        except urllib.error.HTTPError:
            raise
        except OSError as error:
            print(f"the stream broke off ({error}); again", file=sys.stderr)
        time.sleep(RECONNECT_S)


def finish(run):
    """Follows a run to its end; its result."""
    for record in records(run):
        effect = record.get("effect") or {}
        percent = ((effect.get("payload") or {}).get("progress") or {}).get("percent")
        print(f"{run} {effect.get('type')}" + (f" {percent} %" if percent is not None else ""), file=sys.stderr)
    with call("GET", f"/runs/{run}") as answer:
        ended = json.load(answer)
    if ended["status"] != "completed":
        sys.exit(f"run {run} is {ended['status']}: {ended.get('error')}")
    return ended["output"]


def main():
    parser = argparse.ArgumentParser(description="Background removal, enlargement, colours.")
    parser.add_argument("image", help="a .png file in the services' folder")
    parser.add_argument("--key", default=uuid.uuid4().hex, help="names this pipeline, to go on with it")
    options = parser.parse_args()
    steps = [
        ("background-removal", {"tolerance": 60}),
        ("upscale", {"factor": 2}),
        ("colour", {"saturation": 1.2}),
    ]
    result = {"image": options.image}
    for number, (service_type, more) in enumerate(steps, 1):
        payload = {"image": result["image"], "output": f"{options.key}-{number}.png", **more}
        result = finish(start(service_type, payload, f"{options.key}-{number}"))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
