"""Reads from a bucket wait at the same time, as many as the pipeline has readers."""

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from deit_jax.data.source import read_threads

READERS = 100


@pytest.mark.parametrize(("cores", "reads"), [(1, 64), (2, 80), (8, 320), (224, 1024)])
def test_read_threads(cores, reads, monkeypatch):
    monkeypatch.setattr("deit_jax.parallel.cpus.available", lambda: cores)
    assert read_threads("gs://bucket/data") == reads
    assert read_threads("/data") == 0


class _Slow(BaseHTTPRequestHandler):
    """Answers when READERS requests wait, or fails after ten seconds."""

    everyone = threading.Barrier(READERS)

    def do_GET(self):
        try:
            self.everyone.wait(10)
        except threading.BrokenBarrierError:
            self.send_error(400, "too few came")
            return
        self.send_response(200)
        self.send_header("Content-Length", "3")
        self.end_headers()
        self.wfile.write(b"abc")

    def log_message(self, *args):
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 2 * READERS


READ = f"""
from concurrent.futures import ThreadPoolExecutor
from deit_jax.data import buckets

with ThreadPoolExecutor({READERS}) as pool:
    assert set(pool.map(buckets.read, ["gs://bucket/object"] * {READERS})) == {{b"abc"}}
"""


@pytest.mark.slow
def test_reads_wait_together():
    with _Server(("127.0.0.1", 0), _Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        env = {"TENSORSTORE_GCS_HTTP_URL": url, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x"}
        reading = subprocess.run(  # TensorStore finds its server once a process
            [sys.executable, "-c", READ], env=os.environ | env, capture_output=True, text=True
        )
        server.shutdown()
    assert reading.returncode == 0, reading.stderr[-2000:]
