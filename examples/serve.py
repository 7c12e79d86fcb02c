"""Serves a program that `deit-jax export` wrote: an image goes in by HTTP, its classes come out.

python examples/serve.py digits --port 8000
curl --data-binary @digit.png 'http://127.0.0.1:8000/predict?top=3'
curl http://127.0.0.1:8000/health

Needs `pip install jax flatbuffers numpy pillow`, not deit-jax. Images that arrive together are
computed together. What is no good image is answered with a status of 400 to 499 and one line in
JSON. SIGTERM and Ctrl-C end it once all that has been asked is answered.

It has neither TLS nor passwords: put it behind a proxy that has.
"""

import argparse
import contextlib
import json
import math
import os
import queue
import signal
import socket
import sys
import threading
import time
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import jax
import numpy as np
from jax import export
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
LINGER_SECONDS = 5  # for a client that goes on sending what has been refused
MOST_RESIZED = 2**25  # pixels: a picture that is nearly a line would become gigabytes
Image.MAX_IMAGE_PIXELS = None  # --max-pixels is the limit


class Refused(Exception):
    """A request that is answered with an error: the status, and the reason."""


class Program:
    """An exported program, its weights and their description."""

    def __init__(self, folder: Path):
        self.about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        self.size, self.crop = self.about["image_size"], self.about["crop_ratio"]
        if not isinstance(self.size, int):
            sys.exit(f"error: {folder} takes images of {self.size}; only square ones are prepared")
        if "probabilities" not in self.about["outputs"]:
            sys.exit(f"error: {folder} has no classes, only {self.about['outputs']}")
        count = self.about["num_classes"]
        self.names = self.about["class_names"] or [f"class {i}" for i in range(count)]
        self.resample = Image.Resampling[self.about["interpolation"].upper()]
        weights = jax.device_put(read_safetensors(folder / "weights.safetensors"))
        program = export.deserialize(bytearray((folder / "program.stablehlo").read_bytes()))
        run = jax.jit(program.call)
        self.run = lambda images: np.asarray(run(weights, images)["probabilities"])

    def prepare(self, body: bytes, most_pixels: int) -> np.ndarray:
        """Returns the image of a request as uint8 [H,W,3], as evaluation prepares it."""
        try:
            with Image.open(BytesIO(body), formats=FORMATS) as image:
                width, height = image.size
                if width * height > most_pixels:
                    raise Refused(413, f"{width}×{height} pixels, expected at most {most_pixels:,}")
                if image.mode.partition(";")[0] in ("I", "F"):
                    raise Refused(422, f"a grey picture of more than 8 bits (mode {image.mode})")
                image = image.convert("RGB")
        except Refused:
            raise
        except Image.UnidentifiedImageError:
            raise Refused(415, f"no image: expected one of {', '.join(FORMATS)}") from None
        except Exception as error:  # Pillow's decoders raise all sorts for damaged files
            raise Refused(422, f"a damaged image ({str(error)[:100]})") from error
        if self.crop is None:
            return np.asarray(image.resize((self.size, self.size), self.resample))
        short = int(self.size / self.crop)
        if width <= height:
            resized = short, int(short * height / width)
        else:
            resized = int(short * width / height), short
        if math.prod(resized) > max(MOST_RESIZED, 16 * short**2):
            raise Refused(422, f"{width}×{height} pixels are nearly a line; cut the picture")
        left, top = (round((side - self.size) / 2) for side in resized)
        image = image.resize(resized, self.resample)
        return np.asarray(image.crop((left, top, left + self.size, top + self.size)))

    def answer(self, likely: np.ndarray, top: int) -> list[dict]:
        """Returns the `top` likeliest classes."""
        return [
            {"class": self.names[i], "index": int(i), "probability": float(f"{likely[i]:.6g}")}
            for i in np.argsort(-likely, kind="stable")[:top]
        ]


def read_safetensors(file: Path) -> dict[str, np.ndarray]:
    """Reads float32 arrays: eight bytes of the header's length, the header in JSON, the data."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        data = opened.read()
    header.pop("__metadata__", None)
    if other := {about["dtype"] for about in header.values()} - {"F32"}:
        sys.exit(f"error: {file} has weights of type {', '.join(other)}, expected F32")
    return {
        name: np.frombuffer(data[slice(*about["data_offsets"])], "<f4").reshape(about["shape"])
        for name, about in header.items()
    }


class Batcher:
    """Computes images together that come together, in a thread of its own."""

    def __init__(self, program: Program, most: int, wait: float):
        self.program, self.most, self.wait = program, most, wait
        self.waiting: queue.Queue = queue.Queue()  # at most one image a connection
        self.images = self.batches = 0
        # One compilation for each of these sizes, before the first request.
        self.sizes = [2**i for i in range(most.bit_length()) if 2**i < most] + [most]
        for size in self.sizes:
            program.run(np.zeros((size, program.size, program.size, 3), np.uint8))
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def submit(self, image: np.ndarray) -> Future:
        """Returns what will hold the probabilities [K] of an image [H,W,3]."""
        future: Future = Future()
        self.waiting.put((image, future))
        return future

    def stop(self) -> None:
        """Computes what is waiting, and ends the thread."""
        self.waiting.put(None)
        self.thread.join()

    def _work(self) -> None:
        while (first := self.waiting.get()) is not None:
            batch, until = [first], time.monotonic() + self.wait
            while len(batch) < self.most:
                try:
                    one = self.waiting.get(timeout=max(0, until - time.monotonic()))
                except queue.Empty:
                    break
                if one is None:
                    self.waiting.put(None)
                    break
                batch.append(one)
            images, futures = zip(*batch, strict=True)
            size = next(size for size in self.sizes if size >= len(batch))
            try:
                likely = self.program.run(np.stack([*images, *[images[0]] * (size - len(batch))]))
                for future, row in zip(futures, likely[: len(batch)], strict=True):
                    future.set_result(row)
            except Exception as error:  # to whoever waits: the thread goes on
                for future in futures:
                    future.set_exception(error)
            self.images += len(batch)
            self.batches += 1


class Server(ThreadingHTTPServer):
    """Takes connections, and ends once all that has been asked is answered."""

    daemon_threads, request_queue_size = False, 128

    def __init__(self, place: tuple[str, int], program: Program, options: argparse.Namespace):
        self.program, self.options = program, options
        self.batcher = Batcher(program, options.batch, options.wait_ms / 1000)
        self.decoding = threading.Semaphore(os.cpu_count() or 1)  # a picture may take 100 MB
        self.connections: set[socket.socket] = set()
        self.idle: set[socket.socket] = set()  # those that wait for their next request
        self.stopping, self.lock = False, threading.Lock()
        super().__init__(place, Handler)

    def process_request(self, request: socket.socket, client: tuple) -> None:
        """Starts a thread for a connection, unless there are too many."""
        with self.lock:
            if len(self.connections) < self.options.connections:
                self.connections.add(request)
                return super().process_request(request, client)
        request.sendall(b"HTTP/1.1 503 Busy\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        self.shutdown_request(request)

    def shutdown_request(self, request: socket.socket) -> None:
        """Forgets a connection."""
        with self.lock:
            self.connections.discard(request)
            self.idle.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: socket.socket, client: tuple) -> None:
        """Reports bugs, but not that a client has gone."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client)

    def stop(self) -> None:
        """Takes no more requests, and answers those that have come."""
        self.shutdown()
        with self.lock:
            self.stopping = True
            for connection in self.idle:
                with contextlib.suppress(OSError):  # it has gone
                    connection.shutdown(socket.SHUT_RD)
        self.server_close()  # waits for the threads
        self.batcher.stop()


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    server: Server
    server_version, sys_version = "deit-serve", ""
    protocol_version = "HTTP/1.1"  # a connection serves many requests
    timeout = 30  # seconds without a byte
    wbufsize = -1  # headers and body leave together
    disable_nagle_algorithm = True

    def handle_one_request(self) -> None:
        """Answers one request, unless the server has been told to stop."""
        with self.server.lock:
            self.close_connection = self.server.stopping
            if self.close_connection:
                return
            self.server.idle.add(self.connection)
        super().handle_one_request()

    def parse_request(self) -> bool:
        """Reads the headers of a request that has begun."""
        with self.server.lock:
            self.server.idle.discard(self.connection)
        return super().parse_request()

    def finish(self) -> None:
        """Ends a connection when its client has stopped sending, which reads no answer before."""
        super().finish()
        end = time.monotonic() + LINGER_SECONDS
        with contextlib.suppress(OSError):  # it has gone, or waits
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(LINGER_SECONDS)
            while time.monotonic() < end and self.connection.recv(2**16):
                pass

    def do_GET(self) -> None:
        """Answers /health."""
        path = urlsplit(self.path).path
        if path != "/health":
            wrong = 405 if path == "/predict" else 404
            return self._send(wrong, {"error": "POST an image to /predict, or GET /health"})
        batcher = self.server.batcher
        about = {"model": self.server.program.about["name"], "images": batcher.images}
        self._send(200, {"status": "ok", **about, "batches": batcher.batches})

    def do_POST(self) -> None:
        """Answers /predict."""
        try:
            self._send(200, self._predict())
        except Refused as refused:
            status, reason = refused.args
            self._send(status, {"error": reason})
        except OSError:  # the client has gone
            self.close_connection = True
        except Exception as error:
            self._send(500, {"error": f"the model failed: {type(error).__name__}"})
            raise

    def _predict(self) -> dict:
        begin, options = time.monotonic(), self.server.options
        body = self._body(options.max_bytes)  # first: else its bytes are taken for a request
        address = urlsplit(self.path)
        if address.path != "/predict":
            raise Refused(404, "POST an image to /predict, or GET /health")
        query = parse_qs(address.query, keep_blank_values=True)
        if unknown := [name for name in query if name != "top"]:
            raise Refused(400, f"no parameter {unknown[0][:20]!r}, expected top, as in ?top=5")
        if self.headers.get_content_maintype() == "multipart":
            form = "as the body (--data-binary @FILE), not as a form"
            raise Refused(415, f"send the file itself {form}")
        text = query.get("top", ["5"])[0][:9]
        if not (text.isascii() and text.isdecimal() and int(text)):
            raise Refused(400, f"top is {text!r}, expected a whole number from 1")
        with self.server.decoding:
            image = self.server.program.prepare(body, options.max_pixels)
        likely = self.server.batcher.submit(image).result()
        if not np.isfinite(likely).all():
            raise Refused(500, "the model's output is not finite")
        answer = self.server.program.answer(likely, int(text))
        return {"predictions": answer, "ms": round(1000 * (time.monotonic() - begin), 1)}

    def _body(self, most: int) -> bytes:
        text = self.headers.get("Content-Length", "")[:18]
        if not (text.isascii() and text.isdecimal()) or "Transfer-Encoding" in self.headers:
            self.close_connection = True
            raise Refused(411, "the request has no Content-Length")
        length = int(text)
        if length > most:
            self.close_connection = True
            raise Refused(413, f"{length:,} bytes, expected at most {most:,}")
        if not length:
            raise Refused(400, "the body is empty; send the bytes of an image")
        body = self.rfile.read(length)
        if len(body) < length:
            self.close_connection = True
            raise Refused(400, f"the body has {len(body)} bytes of {length}")
        return body

    def _send(self, status: int, content: dict) -> None:
        body = json.dumps(content, ensure_ascii=False).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection or self.server.stopping:
            self.close_connection = True
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        """Logs nothing."""


def main() -> None:
    """Serves until it is told to stop."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("folder", type=Path, help="what deit-jax export wrote")
    add("--host", default="127.0.0.1", help="where to listen (default: this machine alone)")
    add("--port", type=int, default=8000, help="0: any that is free")
    add("--batch", type=int, default=32, help="most images that are computed at once")
    add("--wait-ms", type=float, default=2, help="how long an image waits for others")
    add("--connections", type=int, default=256, help="most connections; more are answered 503")
    add("--max-bytes", type=int, default=2**23, help="of a request")
    add("--max-pixels", type=int, default=25_000_000, help="of an image")
    options = parser.parse_args()
    if not (options.folder / "about.json").is_file():
        sys.exit(f"error: {options.folder} has no about.json; write it by deit-jax export")
    program = Program(options.folder)
    try:
        server = Server((options.host, options.port), program, options)
    except OSError as error:
        sys.exit(f"error: cannot listen on {options.host}:{options.port} ({error.strerror})")
    stop = threading.Event()
    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        signal.signal(number, lambda *_: stop.set())
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    host, port = server.server_address[:2]
    print(f"serving {program.about['name']} on http://{host}:{port}", flush=True)
    stop.wait()
    for number in signals:
        signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
    server.stop()
    done = server.batcher
    print(f"stopped after {done.images} images in {done.batches} batches", flush=True)


if __name__ == "__main__":
    main()
