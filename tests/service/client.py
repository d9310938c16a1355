"""A service in this process, and requests to it over sockets, also damaged ones."""

import http.client
import json
import socket
from contextlib import contextmanager

from recontrast.inference.detector import open_detector
from recontrast.service.detectors import ServedDetector
from recontrast.service.server import bind
from recontrast.service.service import Service


def open_on_cpu(path):
    return open_detector(path, "cpu")


@contextmanager
def serving(files, *, open_file=open_on_cpu, limits=None, **options):
    """Serve the detectors in files, by name; yield a client. Leaving the block stops the service."""
    events = []
    served = {name: ServedDetector(name, path, open_file, events.append) for name, path in files.items()}
    options = {"workers": 2, "reload_seconds": 0, **options}
    service = Service(served, bind("127.0.0.1", 0), limits, on_event=events.append, **options)
    client = Client(service.port, options.get("token"))
    client.service, client.served, client.events = service, served, events
    try:
        yield client
    finally:
        service.stop()
        assert service.wait(60)


class Client:
    """Requests to a port of this machine, each on a connection of its own."""

    def __init__(self, port, token=None):
        self.port, self.token = port, token

    def ask(self, method, path, body=None, **headers):
        """Return status, headers and body of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = {"Content-Type": "image/png"} if body is not None else {}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        if self.token is not None:
            sent.setdefault("Authorization", f"Bearer {self.token}")
        try:
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            return answer.status, dict(answer.headers), answer.read()
        finally:
            connection.close()

    def get(self, path, **headers):
        status, _, body = self.ask("GET", path, **headers)
        assert status == 200, body
        return body.decode()

    def predict(self, content, path="/predict", **headers):
        """Return the JSON of a successful prediction."""
        status, answered, body = self.ask("POST", path, content, **headers)
        assert status == 200 and answered["Content-Type"] == "application/json", body
        return json.loads(body)

    def refused(self, method, path, body=None, **headers):
        """Return the status of a refusal and its sentence."""
        status, answered, content = self.ask(method, path, body, **headers)
        assert status >= 400 and answered["Content-Type"] == "application/json", (status, content)
        text = json.loads(content)
        assert list(text) == ["error"] and "\n" not in text["error"] and "Traceback" not in text["error"]
        return status, text["error"]

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def send(self, *parts):
        """Send bytes as they are; return all that comes back until the service closes the connection."""
        with self.connect() as connection:
            for part in parts:
                connection.sendall(part)
            connection.settimeout(30)
            received = b""
            while data := connection.recv(1 << 16):
                received += data
            return received

    def count(self, name):
        """Return the value of a counter, summed over its labels."""
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(f"recontrast_{name}")]
        return sum(float(line.rpartition(" ")[2]) for line in lines)


def form(content, name="image", filename="photo.png", boundary="----boundary"):
    """Return the body of a form with one file, and its media type."""
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="{filename}"\r\n'
    body = head.encode() + b"Content-Type: image/png\r\n\r\n" + content + f"\r\n--{boundary}--\r\n".encode()
    return body, f"multipart/form-data; boundary={boundary}"
