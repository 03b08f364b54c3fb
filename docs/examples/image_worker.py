#!/usr/bin/env python3
"""A Rungate service that works on images: removes a background, enlarges, corrects colours. Python's standard library alone.

    rungate service register background-removal --type background-removal --env IMAGES=/srv/images -- python3 image_worker.py
    rungate service register upscale            --type upscale            --env IMAGES=/srv/images -- python3 image_worker.py
    rungate service register colour             --type colour             --env IMAGES=/srv/images -- python3 image_worker.py

A job's payload is {"image": "in.png", "output": "out.png", ...}: PNG files (8 bits, not interlaced) in the folder IMAGES,
and what the service's own operation takes; RUNGATE_SERVICE says which that is. The result names the new file:
{"image": "out.png", "width": 128, "height": 128}.
"""

import json
import os
import re
import signal
import struct
import sys
import urllib.request
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

IMAGES = os.path.realpath(os.environ.get("IMAGES", "."))
PORT = int(os.environ.get("PORT", "8190"))
SERVICE = os.environ.get("RUNGATE_SERVICE", "")
MAX_PIXELS = 16_000_000
SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Samples of a pixel by PNG's colour type: grey, RGB, grey and alpha, RGBA.
SAMPLES = {0: 1, 2: 3, 4: 2, 6: 4}


class Wrong(Exception):
    """What is wrong with a job."""


class Image:
    """Rows of RGBA pixels, four bytes each."""

    def __init__(self, width, height, rows):
        self.width, self.height, self.rows = width, height, rows

    def pixel(self, x, y):
        return self.rows[y][4 * x : 4 * x + 4]


def chunks(data):
    at = len(SIGNATURE)
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        body = data[at + 8 : at + 8 + length]
        (check,) = struct.unpack(">I", data[at + 8 + length : at + 12 + length].rjust(4, b"\0"))
        if zlib.crc32(data[at + 4 : at + 8 + length]) != check:
            raise Wrong("the PNG is damaged")
        yield data[at + 4 : at + 8], body
        at += 12 + length


def paeth(a, b, c):
    pa, pb, pc = abs(b - c), abs(a - c), abs(a + b - 2 * c)
    if pa <= pb and pa <= pc:
        return a
    return b if pb <= pc else c


def unfiltered(line, above, kind, size):
    """Undoes a row's filter (PNG specification, section 9)."""
    for i, byte in enumerate(line):
        left = line[i - size] if i >= size else 0
        up = above[i]
        corner = above[i - size] if i >= size else 0
        line[i] = (byte + (0, left, up, (left + up) // 2, paeth(left, up, corner))[kind]) & 0xFF
    return line


def read_png(path):
    with open(path, "rb") as file:
        data = file.read()
    if not data.startswith(SIGNATURE):
        raise Wrong("it is no PNG")
    header, packed = None, []
    for kind, body in chunks(data):
        if kind == b"IHDR":
            header = struct.unpack(">IIBBBBB", body)
        elif kind == b"IDAT":
            packed.append(body)
    if not header:
        raise Wrong("the PNG has no header")
    width, height, depth, colour, _, _, interlaced = header
    if depth != 8 or colour not in SAMPLES or interlaced:
        raise Wrong("only PNGs of 8 bits, without a palette and not interlaced, are read")
    if not 0 < width * height <= MAX_PIXELS:
        raise Wrong(f"it has more than {MAX_PIXELS} pixels, or none")
    size = SAMPLES[colour]
    stride = width * size + 1
    # No more than the header promises: a small file may unpack to a huge one.
    raw = zlib.decompressobj().decompress(b"".join(packed), stride * height)
    if len(raw) < stride * height:
        raise Wrong("the PNG ends too early")
    rows, above = [], bytearray(stride - 1)
    for y in range(height):
        line = raw[y * stride : (y + 1) * stride]
        if line[0] > 4:
            raise Wrong("the PNG has an unknown filter")
        above = unfiltered(bytearray(line[1:]), above, line[0], size)
        rows.append(as_rgba(above, colour, width))
    return Image(width, height, rows)


def as_rgba(line, colour, width):
    if colour == 6:
        return bytearray(line)
    row = bytearray(b"\xff" * (4 * width))
    for channel in range(3):
        row[channel::4] = line[channel::3] if colour == 2 else line[0 :: SAMPLES[colour]]
    if colour == 4:
        row[3::4] = line[1::2]
    return row


def write_png(path, image):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", image.width, image.height, 8, 6, 0, 0, 0)
    packed = zlib.compress(b"".join(b"\0" + bytes(row) for row in image.rows))
    draft = path + ".new"
    with open(draft, "wb") as file:
        file.write(SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b""))
    os.replace(draft, path)


def remove_background(image, options, tell):
    """Makes transparent what is reached from the border and looks like the corner."""
    tolerance = number(options, "tolerance", 40, 0, 441)
    corner = image.pixel(0, 0)

    def is_background(x, y):
        pixel = image.pixel(x, y)
        return sum((pixel[i] - corner[i]) ** 2 for i in range(3)) <= tolerance**2

    last_x, last_y = image.width - 1, image.height - 1
    open_ends = [(x, y) for x in range(image.width) for y in (0, last_y)]
    open_ends += [(x, y) for y in range(image.height) for x in (0, last_x)]
    seen = set()
    while open_ends:
        x, y = open_ends.pop()
        if (x, y) in seen or not (0 <= x <= last_x and 0 <= y <= last_y) or not is_background(x, y):
            continue
        seen.add((x, y))
        open_ends += [(x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)]
    for x, y in seen:
        image.rows[y][4 * x + 3] = 0
    tell(100)
    return image, {"removed_pixels": len(seen)}


def upscale(image, options, tell):
    """Enlarges by bilinear interpolation; colours count by their opacity, so that no removed background shines through."""
    factor = int(number(options, "factor", 2, 1, 8))
    width, height = image.width * factor, image.height * factor
    if width * height > MAX_PIXELS:
        raise Wrong(f"it would have more than {MAX_PIXELS} pixels")

    def nearest(i, limit):
        place = min(max((i + 0.5) / factor - 0.5, 0), limit - 1)
        low = int(place)
        return low, min(low + 1, limit - 1), place - low

    columns = [nearest(x, image.width) for x in range(width)]
    rows = []
    for y in range(height):
        top, bottom, down = nearest(y, image.height)
        row = bytearray(4 * width)
        for x, (left, right, across) in enumerate(columns):
            corners = (
                (image.pixel(left, top), (1 - across) * (1 - down)),
                (image.pixel(right, top), across * (1 - down)),
                (image.pixel(left, bottom), (1 - across) * down),
                (image.pixel(right, bottom), across * down),
            )
            alpha = sum(pixel[3] * weight for pixel, weight in corners)
            for i in range(3):
                colour = sum(pixel[i] * pixel[3] * weight for pixel, weight in corners)
                row[4 * x + i] = round(colour / alpha) if alpha else 0
            row[4 * x + 3] = round(alpha)
        rows.append(row)
        if y % 16 == 15:
            tell(100 * (y + 1) // height)
    return Image(width, height, rows), {}


def correct_colour(image, options, tell):
    """Stretches each channel over its whole range, by what is opaque, then changes the saturation."""
    saturation = number(options, "saturation", 1.0, 0, 4)
    tables = []
    for channel in range(3):
        counts = [0] * 256
        for row in image.rows:
            for value, alpha in zip(row[channel::4], row[3::4]):
                counts[value] += alpha > 0
        used = [value for value in range(256) if counts[value]]
        low, high = (used[0], used[-1]) if used else (0, 255)
        span = max(high - low, 1)
        tables.append([min(max(round((value - low) * 255 / span), 0), 255) for value in range(256)])
    for y, row in enumerate(image.rows):
        for at in range(0, len(row), 4):
            red, green, blue = (tables[i][row[at + i]] for i in range(3))
            grey = 0.299 * red + 0.587 * green + 0.114 * blue
            for i, value in enumerate((red, green, blue)):
                row[at + i] = min(max(round(grey + saturation * (value - grey)), 0), 255)
        if y % 16 == 15:
            tell(100 * (y + 1) // image.height)
    return image, {}


OPERATIONS = {"background-removal": remove_background, "upscale": upscale, "colour": correct_colour}


def number(options, name, default, low, high):
    value = options.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise Wrong(f"'{name}' must be a number from {low} to {high}")
    return value


def place(options, name):
    """A file of the folder, and of no other: jobs come from strangers."""
    text = options.get(name)
    if not isinstance(text, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,120}\.png", text):
        raise Wrong(f"'{name}' must be the name of a .png file")
    path = os.path.join(IMAGES, text)
    if os.path.realpath(path) != path:
        raise Wrong(f"'{name}' leads out of the folder")
    return path


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        ok = self.path == "/health" and SERVICE in OPERATIONS
        self.answer(200 if ok else 404, {"status": "ok"} if ok else {"error": f"no operation '{SERVICE}'"})

    def do_POST(self):
        try:
            length = int(self.headers.get("Content-Length") or 0)
            options = json.loads(self.rfile.read(length))
            if self.path != "/process" or not isinstance(options, dict):
                raise Wrong("POST a JSON object to /process")
            self.answer(200, self.process(options))
        except (Wrong, ValueError, OSError, zlib.error, struct.error) as error:
            self.answer(422, {"error": str(error)})

    def process(self, options):
        source, target = place(options, "image"), place(options, "output")
        image, more = OPERATIONS[SERVICE](read_png(source), options, self.tell)
        write_png(target, image)
        return {"image": options["output"], "width": image.width, "height": image.height, **more}

    def tell(self, percent):
        url, token = self.headers.get("X-Rungate-Progress"), self.headers.get("X-Rungate-Token")
        if not url or not token:
            return
        request = urllib.request.Request(url, data=json.dumps({"percent": percent}).encode(), method="POST")
        request.add_header("Content-Type", "application/json")
        request.add_header("Authorization", "Bearer " + token)
        try:
            urllib.request.urlopen(request, timeout=10).close()
        except OSError as error:
            print(f"progress was not taken: {error}", file=sys.stderr)

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
    # A job is worked on beside the questions for health.
    server = ThreadingHTTPServer(("127.0.0.1", PORT), Handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server.serve_forever()


if __name__ == "__main__":
    main()
