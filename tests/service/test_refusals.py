"""Requests that are refused: each gets a status from 400 and one sentence, and costs the others nothing."""

import io
import json
import os
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from client import form, serving
from command_line import call, fails
from PIL import Image

from recontrast.service import connection
from recontrast.service.access import check_token
from recontrast.service.detectors import parse_names
from recontrast.service.limits import Limits
from recontrast.service.messages import RequestError
from recontrast.service.uploads import find_image

LIMITS = Limits(body_bytes=200_000, pixels=1_000_000, body_seconds=1.0, head_seconds=1.0, idle_seconds=2.0)


@pytest.fixture(scope="module")
def client(plain):
    with serving({"main": plain}, limits=LIMITS) as client:
        yield client


@pytest.fixture(autouse=True)
def _works_afterwards(client, images):
    """Whatever a test sends, the next good request is answered rightly."""
    yield
    answer = client.predict(images[0].read_bytes())
    assert answer["score"] == client.__dict__.setdefault("score", answer["score"])
    assert client.service._server.account.used == 0


def bomb(width, height):
    """A PNG file of a few kilobytes whose header states that size."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1 << 20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def animation():
    frames = [Image.fromarray(np.full((20, 30, 3), value, np.uint8)) for value in (0, 200)]
    content = io.BytesIO()
    frames[0].save(content, "GIF", save_all=True, append_images=frames[1:])
    return content.getvalue()


CASES = {
    "empty": (b"", {}, 400, "empty body"),
    "text": (b"hello", {"Content_Type": "text/plain"}, 415, "Content-Type: wanted image/"),
    "json": (b"{}", {"Content_Type": "application/json"}, 415, "got application/json"),
    "no image": (b"hello, no image", {}, 415, "got a file that starts with b'hello, n'"),
    "svg": (b"<svg/>", {"Content_Type": "image/svg+xml"}, 415, "got a file that starts with"),
    "65,000 x 65,000": (bomb(65_000, 65_000), {}, 413, "wanted at most 1,000,000 pixels, got 65000 x 65000"),
    "more pixels than data": (bomb(900, 900), {}, 422, "cannot be decoded"),
    "animation": (animation(), {"Content_Type": "image/gif"}, 422, "wanted one image, got a file with several"),
    "too many bytes": (bytes(200_001), {}, 413, "wanted at most 200,000 bytes, got 200,001"),
    "far too many bytes": (bytes(100_000_000), {}, 413, "got 100,000,000"),
    "form without a boundary": (b"x", {"Content_Type": "multipart/form-data"}, 400, "wanted a boundary"),
    "form that is cut off": (form(b"x" * 100)[0][:-30], {"Content_Type": form(b"")[1]}, 400, "wanted a complete form"),
    "form of text": (
        b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n--b--\r\n',
        {"Content_Type": "multipart/form-data; boundary=b"}, 400, "wanted one file, got none",
    ),
    "other origin": (b"x", {"Origin": "http://example.com"}, 403, "got one of another origin"),
    "other host": (b"x", {"Host": "example.com"}, 403, "Host: wanted localhost"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_refused(client, name):
    content, headers, status, text = CASES[name]
    got, sentence = client.refused("POST", "/predict", content, **headers)
    assert got == status and text in sentence, (got, sentence)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.99])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP"])
def test_truncated_image(client, images, kind, share):
    content = io.BytesIO()
    Image.open(images[0]).save(content, kind)
    whole = content.getvalue()
    status, text = client.refused("POST", "/predict", whole[: max(int(len(whole) * share), 20)])
    assert status == 422 and text.startswith("image: wanted"), text


@pytest.mark.parametrize("target, status", [
    ("/predict?image=video", 400), ("/predict?inline=perhaps", 400), ("/predict?side=1", 400),
    ("/predict?side=nan", 400), ("/predict?size=3", 400), ("/predict?inline=1&inline=0", 400),
    ("/predict/../../etc/passwd", 404), ("/predict/%2e%2e%2fmain.pt", 404), ("/other", 404),
    ("/predict?detector=/etc/passwd", 404), ("/predict?false_alarm_rate=2", 400), ("/health", 405),
])  # fmt: skip
def test_wrong_target(client, images, target, status):
    assert client.refused("POST", target, images[0].read_bytes())[0] == status


def test_wrong_method(client):
    assert client.refused("GET", "/predict")[0] == 405
    assert client.ask("DELETE", "/model")[0] == 405


@pytest.mark.parametrize("sent, status", [
    (b"hello\r\n\r\n", b"400"), (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9 + b"\r\n\r\n", b"400"),
    (b"GET / HTTP/1.1\r\n\r\n", b"400"), (b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n", b"404"),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 20_000, b"431"),
    (b"GET / HTTP/9.9\r\nHost: a\r\n\r\n", b"400"),
    (b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", b"400"),
    (b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"400"),
    (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", b"400"),
])  # fmt: skip
def test_garbage(client, sent, status):
    received = client.send(sent)
    assert received.startswith(b"HTTP/1.1 ") and (status in received[9:12] or received[9:10] == b"4"), received
    assert b"Traceback" not in received


def test_slow_headers_and_bodies_are_ended(client):
    begin = time.monotonic()
    assert client.send(b"POST /predict HTTP/1.1\r\nHost: loc").startswith(b"HTTP/1.1 408")
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    received = client.send(head + b"abc")
    assert received.startswith(b"HTTP/1.1 408") and b"body: wanted them within 1 s" in received
    assert client.send(b"") == b""  # a connection without a request
    assert time.monotonic() - begin < 30


def test_chunked_body_is_limited_and_read(client, images):
    def send(content):
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in content)
        head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nConnection: close\r\n"
        return client.send(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")

    whole = images[0].read_bytes()
    received = send([whole[:100], whole[100:]])
    assert received.startswith(b"HTTP/1.1 200") and b'"score"' in received
    assert send([bytes(50_000)] * 5).startswith(b"HTTP/1.1 413")


def test_several_requests_on_one_connection(client, images):
    content = images[0].read_bytes()
    one = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content)
    last = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    received = client.send(one + one + last)  # pipelined
    assert received.count(b"HTTP/1.1 200") == 3 and received.count(b'"score"') == 2


def test_client_that_asks_before_it_sends(client, images):
    content = images[0].read_bytes()
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nConnection: close\r\nContent-Length: "
    with client.connect() as open_connection:
        open_connection.sendall(head + b"%d\r\n\r\n" % len(content))
        assert open_connection.recv(1000).startswith(b"HTTP/1.1 100")
        open_connection.sendall(content)
        assert open_connection.recv(1000).startswith(b"HTTP/1.1 200")
    with client.connect() as open_connection:  # refused without reading the body
        open_connection.sendall(head + b"100000000\r\n\r\n")
        assert open_connection.recv(1000).startswith(b"HTTP/1.1 413")


def test_too_many_connections(plain, monkeypatch):
    monkeypatch.setattr(connection, "LINGER_SECONDS", 0.5)
    with serving({"main": plain}, limits=Limits(connections=2, idle_seconds=30)) as client:
        held = [client.connect() for _ in range(2)]
        while client.service._server.connections < 2:
            time.sleep(0.01)
        assert client.send(b"").startswith(b"HTTP/1.1 503")
        for one in held:
            one.close()
        while client.service._server.connections:
            time.sleep(0.01)
        client.get("/health")


def test_memory_of_bodies_is_limited(client, images):
    client.service._server.account.used = LIMITS.total_bytes
    try:
        status, headers, body = client.ask("POST", "/predict", images[0].read_bytes())
        assert status == 429 and headers["Retry-After"] == "1" and "body" in json.loads(body)["error"]
    finally:
        client.service._server.account.used = 0


def test_bad_clients_beside_good_ones(client, images):
    """Garbage, bombs, half requests and disconnects at the same time: the answers of good clients stay right."""
    content = images[0].read_bytes()
    wanted = client.predict(content)
    bad = [content[:50], bomb(65_000, 65_000), animation(), b"", bytes(300_000)]

    def disturb(index):
        if index % 3 == 0:
            with client.connect() as gone:
                gone.sendall(
                    b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 90000\r\n\r\n" + content[:99]
                )
            return None
        if index % 3 == 1:
            return client.send(os.urandom(200) + b"\r\n\r\n")
        return client.refused("POST", "/predict", bad[index % len(bad)])

    with ThreadPoolExecutor(6) as pool:
        disturbing = [pool.submit(disturb, index) for index in range(45)]
        good = [pool.submit(client.predict, content) for _ in range(30)]
        assert all(future.result() == wanted for future in good)
        assert all(future.exception() is None for future in disturbing)
    assert not [event for event in client.events if "internal error" in event]


def test_token(plain, images):
    token = "0123456789-secret"
    content = images[0].read_bytes()
    with serving({"main": plain}, token=token) as client:
        client.predict(content)
        client.get("/model", Host="inspection.example")
        client.token = None
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": token},
                      {"Authorization": f"Basic {token}"}, {"Authorization": f"Bearer {token}x"}):  # fmt: skip
            status, headers, body = client.ask("POST", "/predict", content, **given)
            assert status == 401 and headers["WWW-Authenticate"].startswith("Bearer")
            assert "wanted Bearer and the token" in json.loads(body)["error"] and token not in body.decode()
        for path in ("/model", "/metrics"):
            assert client.refused("GET", path)[0] == 401
        assert client.ask("GET", "/health")[0] == client.ask("GET", "/")[0] == 200


def test_other_machines_need_a_token(plain):
    for host in ("0.0.0.0", "::", "192.0.2.1", "inspection.example"):
        message = fails("serve", plain, "--host", host, "--port", "0")
        assert "--token: wanted a token" in message and host in message
    with pytest.raises(ValueError, match="wanted at least 16 printable"):
        check_token("short", "127.0.0.1")
    for host in ("127.0.0.1", "localhost", "::1"):
        check_token(None, host)
    assert "wanted at least 16" in fails("serve", plain, "--token", "short")


@pytest.mark.parametrize("arguments, text", [
    (["nowhere"], "nowhere"), (["a b=x"], "wanted a name of 1 to 64"), (["--port", "70000"], "--port"),
    (["--queue", "0"], "--queue: wanted a number above 0"), (["--batch", "0"], "--batch: wanted at least 1"),
    (["--window", "-1"], "--window"), (["--decide"], "recontrast calibrate"), (["--max-bytes", "0"], "--max-bytes"),
])  # fmt: skip
def test_command_refuses(plain, arguments, text):
    words = arguments if not arguments[0].startswith("--") else [plain, *arguments]
    assert text in fails("serve", *words)


def test_missing_package_is_named(plain, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "h11", None)
    message = fails("serve", plain)
    assert message == ("recontrast: serve: wanted the package h11, got none installed: pip install 'recontrast[serve]'")


def test_port_in_use(client, plain):
    message = fails("serve", plain, "--port", client.port)
    assert f"cannot listen on 127.0.0.1:{client.port}" in message and "in use" in message
    assert call("serve", "--help").exit_code == 0


def test_names(tmp_path):
    (tmp_path / "a=b").mkdir()
    run = tmp_path / "a=b"
    assert parse_names(["runs/mine", "x=runs/mine"]) == {"mine": type(run)("runs/mine"), "x": type(run)("runs/mine")}
    assert parse_names([str(run)]) == {"a-b": run}
    with pytest.raises(ValueError, match="wanted a name for each detector, got mine twice"):
        parse_names(["runs/mine", "other/mine"])


@pytest.mark.parametrize("seed", range(5))
def test_damaged_forms_raise_nothing_else(seed):
    random = np.random.default_rng(seed)
    whole, kind = form(bytes(random.integers(0, 256, 300, dtype=np.uint8)))
    for _ in range(100):
        damaged = bytearray(whole)
        for position in random.integers(0, len(whole), 3):
            damaged[position] = random.integers(0, 256)
        try:
            find_image(bytes(damaged[: random.integers(1, len(whole) + 1)]), kind)
        except RequestError as error:
            assert 400 <= error.status < 500 and error.text
    assert find_image(whole, kind) == whole.partition(b"\r\n\r\n")[2].rpartition(b"\r\n--")[0]
