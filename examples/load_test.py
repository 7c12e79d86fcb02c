"""Asks a server of examples/serve.py as fast as some clients can, and prints what it took.

python examples/load_test.py http://127.0.0.1:8000 digit.png --clients 16 --seconds 10

Every client has one connection, on which it sends the image again as soon as it is answered.
"""

import argparse
import http.client
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit


def main() -> None:
    """Runs the clients, and prints requests a second and percentiles of the latency."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url")
    parser.add_argument("image", type=Path)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=10)
    options = parser.parse_args()
    try:
        body, place = options.image.read_bytes(), urlsplit(options.url).netloc
    except OSError as error:
        sys.exit(f"error: {options.image} cannot be read ({error.strerror})")
    latencies: list[float] = []  # seconds
    failures: list[str] = []
    end = time.perf_counter() + options.seconds

    def client() -> None:
        connection = http.client.HTTPConnection(place, timeout=60)
        while time.perf_counter() < end:
            begin = time.perf_counter()
            try:
                connection.request("POST", "/predict", body)
                response = connection.getresponse()
                answer = response.read()
            except (OSError, http.client.HTTPException) as error:
                failures.append(repr(error))
                connection.close()
                continue
            if response.status == 200:
                latencies.append(time.perf_counter() - begin)
            else:
                failures.append(f"{response.status} {answer.decode().strip()}")
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(options.clients)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begin
    failed = f"{len(failures)} failed" + (f": {failures[0]}" if failures else "")
    if not latencies:
        sys.exit(f"error: nothing was answered, {failed}")
    ordered = sorted(latencies)
    shown = {name: ordered[int(len(ordered) * name / 100)] * 1000 for name in (50, 90, 99)}
    print(f"{options.clients} clients, {seconds:.1f} s: {len(latencies) / seconds:.1f} requests/s")
    print("latency " + ", ".join(f"p{name} {value:.1f} ms" for name, value in shown.items()))
    print(f"{len(latencies)} answered, {failed}")


if __name__ == "__main__":
    main()
