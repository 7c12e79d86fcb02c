"""What the servers on loopback have in common, which stand for the network in tests."""

import http.server


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers, and logs nothing."""

    def answer(self, body, status=200, length=None, **headers):
        self.send_response(status)
        for key, value in ({"Content-Length": length or len(body)} | headers).items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass
