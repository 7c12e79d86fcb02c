"""The server and its load test, as processes that cannot import deit-jax."""

import dataclasses
import http.client
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from deit_jax.inference.export import export_model
from deit_jax.inference.predict import predict
from tests.inference.test_export import alone, full_effect

# -c leaves itself in argv[0]: the script's path takes its place.
RUN = "import runpy; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"


def png(height, width, seed=0, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    pixels *= pixels.size < 90_000  # else black, in few bytes
    file = io.BytesIO()
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16))
    image = deep if mode == "I;16" else Image.fromarray(pixels).convert(mode)
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def model():
    model = full_effect("deit_testing_distilled")
    model.info = dataclasses.replace(model.info, crop_ratio=0.875)
    return model


@pytest.fixture
def server(model, tmp_path, repo_root):
    """A server that takes 100,000 bytes and pixels; `place` is its address."""
    export_model(tmp_path / "program", model, platforms=["cpu"])
    limits = ["--batch", "4", "--max-bytes", "100000", "--max-pixels", "100000", "--port", "0"]
    script = repo_root / "examples/serve.py"
    command = [sys.executable, "-c", alone(script.read_text()) + RUN, str(script)]
    command += [str(tmp_path / "program"), *limits, "--wait-ms", "20"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        line = process.stdout.readline()
        found = re.search(r"serving deit_testing_distilled on http://(.*)\n", line)
        assert found, process.stderr.read()
        process.place = found[1]
        yield process
        process.kill()


def ask(place, method="POST", path="/predict", body=b"", **headers):
    connection = http.client.HTTPConnection(place, timeout=60)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


@pytest.mark.slow
def test_answers_are_those_of_predict_also_in_batches(server, model, tmp_path, repo_root):
    """Also of those whose answer is awaited when it is told to stop."""
    sizes = ((50, 40), (40, 50), (33, 90), (32, 32))
    bodies = [png(*size, seed, "P" if seed == 2 else "RGB") for seed, size in enumerate(sizes)]
    files = [tmp_path / f"{seed}.png" for seed in range(len(bodies))]
    for file, body in zip(files, bodies, strict=True):
        file.write_bytes(body)
    want = [each["predictions"] for each in predict(model, files, topk=3)]
    got = {}

    def one(number):
        body = bodies[number % len(bodies)]
        got[number] = ask(server.place, path="/predict?top=3", body=body)

    def all_together(numbers):
        threads = [threading.Thread(target=one, args=(number,)) for number in numbers]
        for thread in threads:
            thread.start()
        return threads

    for thread in all_together(range(24)):
        thread.join()
    for number, (status, answer) in got.items():
        assert status == 200
        for mine, other in zip(answer["predictions"], want[number % 4], strict=True):
            assert (mine["class"], mine["index"]) == (other["class"], other["index"])
            assert mine["probability"] == pytest.approx(other["probability"], rel=1e-4)
    _, health = ask(server.place, "GET", "/health")
    assert (health["status"], health["images"]) == ("ok", 24)
    assert health["batches"] < 24
    load = [repo_root / "examples/load_test.py", f"http://{server.place}", files[0]]
    load += ["--clients", "4", "--seconds", "0.5"]
    done = subprocess.run([sys.executable, *load], capture_output=True, text=True)
    assert re.search(r"^4 clients, .*: [\d.]+ requests/s\nlatency p50 [\d.]+ ms", done.stdout)
    assert re.search(r"\n[1-9]\d* answered, 0 failed\n$", done.stdout)

    idle = socket.create_connection(server.place.split(":"))
    begun = socket.create_connection(server.place.split(":"))
    head = f"POST /predict HTTP/1.1\r\nContent-Length: {len(bodies[0])}\r\n\r\n".encode()
    begun.sendall(head + bodies[0][:100])
    ask(server.place, "GET", "/health")  # it has been read by now
    server.send_signal(signal.SIGTERM)
    assert idle.recv(1) == b""
    begun.sendall(bodies[0][100:])
    assert begun.makefile("rb").readline() == b"HTTP/1.1 200 OK\r\n"
    out, err = server.communicate(timeout=60)
    assert (server.returncode, err) == (0, "")
    assert re.fullmatch(r"stopped after \d+ images in \d+ batches\n", out)


def test_a_load_test_without_answers_fails(tmp_path, repo_root):
    image = tmp_path / "a.png"
    image.write_bytes(png(8, 8))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # listens to nobody
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        for file, words in (
            (image, "error: nothing was answered, "),
            (tmp_path / "b.png", f"error: {tmp_path / 'b.png'} cannot be read"),
        ):
            command = [sys.executable, repo_root / "examples/load_test.py", url, file]
            command += ["--clients", "1", "--seconds", "0.1"]
            done = subprocess.run(command, capture_output=True, text=True)
            assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
            assert done.stderr.startswith(words)


@pytest.mark.slow
def test_bad_requests_get_one_line(server):
    good = png(32, 32)
    for status, words, request in (
        (415, "no image: expected one of JPEG, PNG", {"body": b"GIF? no"}),
        (422, "a damaged image", {"body": good[: len(good) // 2]}),
        (422, "nearly a line", {"body": png(1, 90_000)}),
        (422, "more than 8 bits", {"body": png(32, 32, mode="I;16")}),
        (413, "101×1000 pixels, expected at most 100,000", {"body": png(1000, 101)}),
        (413, "300,000 bytes, expected at most 100,000", {"body": bytes(300_000)}),
        (400, "the body is empty", {}),
        (400, "top is '0', expected", {"body": good, "path": "/predict?top=0"}),
        (400, "top is 'x', expected", {"body": good, "path": "/predict?top=x"}),
        (400, "top is '', expected", {"body": good, "path": "/predict?top="}),
        (400, "no parameter 'topk', expected top", {"body": good, "path": "/predict?topk=1"}),
        (415, "not as a form", {"body": good, "Content-Type": "multipart/form-data; boundary=x"}),
        (411, "no Content-Length", {"body": iter([good])}),
        (404, "POST an image to /predict", {"body": good, "path": "/"}),
        (405, "POST an image to /predict", {"method": "GET"}),
    ):
        found, answer = ask(server.place, **request)
        assert (found, list(answer)) == (status, ["error"]), words
        assert words in answer["error"]
        assert "\n" not in answer["error"]
    late = socket.create_connection(server.place.split(":"))
    late.sendall(b"POST /predict HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
    assert late.recv(1, socket.MSG_PEEK)  # the answer is there
    for _ in range(3):
        late.sendall(bytes(50_000))  # to who no longer wants it, but has not gone
        time.sleep(0.05)
    assert late.makefile("rb").readline().startswith(b"HTTP/1.1 411")
    late.close()
    assert ask(server.place, body=good)[0] == 200  # it serves on
    server.send_signal(signal.SIGTERM)
    assert server.communicate(timeout=60) == ("stopped after 1 images in 1 batches\n", "")
