"""The service over HTTP: scores as predict's, pictures, several detectors, batches, the queue, reloading, stopping."""

import base64
import csv
import io
import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import small_detectors
import torch
from client import form, serving
from command_line import works
from PIL import Image
from saved_model import RECIPE, save

import recontrast
from recontrast.data.roi import encode_mask
from recontrast.export.export import export
from recontrast.inference.detector import open_detector
from recontrast.runtime import threads
from recontrast.service import application
from recontrast.service.limits import Limits


@pytest.fixture(scope="module")
def client(calibrated, plain):
    with serving({"main": calibrated, "other": plain}) as client:
        yield client


@pytest.fixture(scope="module")
def rows(calibrated, images, tmp_path_factory):
    """What `predict` says of each image, by name, with batch 1."""
    out = tmp_path_factory.mktemp("predict") / "out"
    works("predict", calibrated, images[0].parent, "--out", out, "--batch", "1", "--device", "cpu", "--no-overlays")
    with (out / "scores.csv").open() as file:
        rows = {os.path.basename(row["path"]): row for row in csv.DictReader(file)}
    entries = json.loads((out / "scores.json").read_text())["images"]
    return {
        os.path.basename(entry["path"]): {**entry, "row": rows[os.path.basename(entry["path"])]} for entry in entries
    }


def test_scores_and_decisions_are_those_of_predict(client, images, rows):
    decisions = set()
    for path in images:
        answer = client.predict(path.read_bytes(), "/predict/main")
        wanted = rows[path.name]
        assert answer["score"] == wanted["score"] and f"{answer['score']:.9g}" == wanted["row"]["score"]
        assert (answer["p_value"], answer["decision"]) == (wanted["p_value"], wanted["decision"])
        assert answer["regions"] == (wanted.get("regions") or [])
        assert (answer["height"], answer["width"]) == (64, 64)
        decisions.add(answer["decision"])
    assert decisions == {"good", "defect"}


def test_scores_of_batches_are_equal(calibrated, images, rows):
    """Many requests at once share batches; their scores are equal up to rounding."""
    with serving({"main": calibrated}, batch=4, window=0.2) as client, ThreadPoolExecutor(8) as pool:
        chosen = [images[index % len(images)] for index in range(24)]
        answers = list(pool.map(lambda path: client.predict(path.read_bytes()), chosen))
        sizes = client.service._batches.sizes
        assert max(sizes) > 1 and sum(size * count for size, count in sizes.items()) == 24
    for path, answer in zip(chosen, answers, strict=True):
        assert answer["score"] == pytest.approx(rows[path.name]["score"], rel=1e-5)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "WEBP", "PPM", "JPEG 2000", "L", "16 bits", "turned"])
def test_formats_are_read_as_predict_reads_them(client, tmp_path, kind):
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (70, 90, 3), dtype=np.uint8))
    options = {"format": kind}
    if kind in ("L", "16 bits", "turned"):
        options["format"] = "PNG"
    if kind == "L":
        image = image.convert("L")
    elif kind == "16 bits":
        image = Image.fromarray(random.integers(0, 65536, (70, 90)).astype(np.uint16))
    elif kind == "turned":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    elif kind == "JPEG 2000":
        options["format"] = "JPEG2000"
    elif kind == "WEBP":
        options["lossless"] = True
    path = tmp_path / f"image.{'jp2' if kind == 'JPEG 2000' else kind.lower().split()[0]}"
    image.save(path, **options)
    answer = client.predict(path.read_bytes(), "/predict/main", Content_Type="application/octet-stream")
    (wanted,) = client.served["main"].current.detector.predict([path], batch=1)
    assert answer["score"] == float(f"{wanted.score:.9g}")
    assert (answer["height"], answer["width"]) == ((90, 70) if kind == "turned" else (70, 90))


@pytest.mark.parametrize("kind", ["onnx", "tiles"])
def test_other_detectors_give_their_scores(images, tmp_path, kind):
    if kind == "onnx":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
        path = small_detectors.export_onnx(tmp_path / "detector.onnx")
    else:
        path = save(tmp_path / "tiles.pt", RECIPE.replace(tile=64))
    large = tmp_path / "large.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 150, 3), dtype=np.uint8)).save(large)
    with serving({"main": path}) as client, ThreadPoolExecutor(4) as pool:
        chosen = [*images[:3], large]
        answers = list(pool.map(lambda one: client.predict(one.read_bytes()), chosen))
        overlay = client.ask("POST", "/predict?image=overlay", large.read_bytes())[2]
        wanted = client.served["main"].current.detector.predict(chosen, batch=1)
    for answer, prediction in zip(answers, wanted, strict=True):
        assert answer["score"] == pytest.approx(prediction.score, rel=1e-5)
    assert Image.open(io.BytesIO(overlay)).size == (150, 90)


@pytest.mark.filterwarnings("ignore:roi. the mask of")  # of another size than the second image
def test_exported_tiles_with_a_region_give_the_scores_of_the_checkpoint(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    region = np.zeros((75, 50), bool)
    region[5:30, 20:47] = True
    recipe = RECIPE.replace(size=32, tile=32, levels=2, roi=encode_mask(region))
    export(save(tmp_path / "checkpoint.pt", recipe), "onnx", tmp_path / "tiles.onnx")
    for shape in ((75, 50), (45, 30)):
        picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{shape[0]}.png")
    paths = [tmp_path / "75.png", tmp_path / "45.png"]
    with serving({"main": tmp_path / "tiles.onnx"}) as client:
        scores = [client.predict(path.read_bytes())["score"] for path in paths]
    assert scores == pytest.approx(recontrast.load(tmp_path / "checkpoint.pt", "cpu").predict(paths).scores, rel=1e-4)


def test_form_and_raw_body_are_the_same(client, images):
    content = images[0].read_bytes()
    raw = client.predict(content, "/predict?detector=main")
    body, kind = form(content, filename="../../../etc/passwd")
    assert client.predict(body, "/predict?detector=main", Content_Type=kind) == raw
    tricky = content + b"\r\n--not the boundary\r\n"
    body, kind = form(tricky, boundary="not the boundary ")
    assert client.refused("POST", "/predict/main", body, Content_Type=kind)[0] == 400


def test_map_and_overlay(client, images, calibrated):
    defect = next(path for path in images if path.stem == "defect")
    detector = client.served["main"].current.detector
    (wanted,) = detector.predict([defect], batch=1)
    status, headers, body = client.ask("POST", "/predict/main?image=map", defect.read_bytes())
    stored = np.asarray(Image.open(io.BytesIO(body)))
    assert status == 200 and headers["Content-Type"] == "image/png" and stored.shape == wanted.anomaly_map.shape
    scale = float(headers["X-Recontrast-Map-Scale"])
    assert np.abs(stored * scale - wanted.anomaly_map).max() <= scale
    assert headers["X-Recontrast-Decision"] == "defect" and float(headers["X-Recontrast-Score"]) > 0
    answer = client.predict(defect.read_bytes(), "/predict/main?image=overlay&inline=true")
    kind, _, text = answer["image"].partition(",")
    picture = Image.open(io.BytesIO(base64.b64decode(text)))
    assert kind == "data:image/png;base64" and picture.size == (64, 64)
    green = (np.asarray(picture) == (0, 220, 120)).all(-1)
    assert green.any() and answer["regions"]  # outlined
    small = client.ask("POST", "/predict/main?image=overlay&side=16", defect.read_bytes())[2]
    assert Image.open(io.BytesIO(small)).size == (16, 16)


def test_detectors_by_name(client, images):
    content = images[0].read_bytes()
    assert client.predict(content, "/predict/other")["decision"] is None
    assert client.predict(content, "/predict?detector=other")["regions"] is None
    assert client.refused("POST", "/predict", content) == (
        400, "detector: wanted ?detector= with one of main, other, got none"
    )  # fmt: skip
    status, text = client.refused("POST", "/predict/third", content)
    assert status == 404 and "one of main, other, got 'third'" in text
    assert client.refused("POST", "/predict/main?detector=other", content)[0] == 400


def test_decisions_need_a_calibration(client, images):
    content = images[0].read_bytes()
    for query in ("decide=true", "false_alarm_rate=0.1"):
        status, text = client.refused("POST", f"/predict/other?{query}", content)
        assert status == 409 and "wanted a detector with a calibration" in text
    assert client.predict(content, "/predict/main?false_alarm_rate=0.5")["false_alarm_rate"] == 0.5
    assert client.refused("POST", "/predict/main?false_alarm_rate=0.001", content)[0] == 400


def test_model_health_and_metrics(client, images):
    client.predict(images[0].read_bytes(), "/predict/main")
    assert json.loads(client.get("/health")) == {"status": "ok"}
    model = json.loads(client.get("/model"))
    main, other = model["detectors"]
    assert main["calibration"]["images"] == 39 and other["calibration"] is None
    assert "at most 2/40" in main["calibration"]["promise"][0]
    assert str(client.served["main"].file.parent) not in json.dumps(model)  # no path of the server
    assert model["versions"]["torch"] and model["limits"]["queue"] == 64
    text = client.get("/metrics")
    for line in text.splitlines():
        assert line.startswith("#") or (len(line.rpartition(" ")[2]) and float(line.rpartition(" ")[2]) >= 0)
    assert 'recontrast_images_total{detector="main",decision=' in text
    assert client.count("accepted_total") == client.count("answered_total") > 0


def test_description_and_page_load_nothing_from_elsewhere(client):
    described = json.loads(client.get("/openapi.json"))
    assert described["openapi"].startswith("3.") and "/predict/{detector}" in described["paths"]
    for path in ("/", "/docs", "/page.css", "/page.js"):
        status, headers, body = client.ask("GET", path)
        assert status == 200 and "default-src 'none'" in headers["Content-Security-Policy"]
        assert b"http://" not in body and b"https://" not in body and b"//cdn" not in body
    assert client.ask("HEAD", "/")[2] == b""


# ---- the queue ---------------------------------------------------------------


class Gate:
    """Detector that waits until it may go on."""

    def __init__(self, path):
        self._inner = open_detector(path, "cpu")
        self.opened, self.entered = threading.Event(), threading.Event()
        self.opened.set()

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def run(self, files, batch):
        self.entered.set()
        assert self.opened.wait(60)
        yield from self._inner.run(files, batch)


def close_gate(client):
    gate = client.served["main"].current.detector
    gate.opened.clear()
    gate.entered.clear()
    return gate


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_full_queue_is_answered_429(plain, images):
    content = images[0].read_bytes()
    with serving({"main": plain}, open_file=Gate, limits=Limits(queue=3)) as client, ThreadPoolExecutor(3) as pool:
        gate = close_gate(client)
        waiting = [pool.submit(client.predict, content) for _ in range(3)]
        wait_until(lambda: client.count("active_images") == 3)
        status, headers, body = client.ask("POST", "/predict", content)
        assert status == 429 and int(headers["Retry-After"]) >= 1 and "at most 3 images" in json.loads(body)["error"]
        gate.opened.set()
        assert len({future.result()["score"] for future in waiting}) == 1
        client.predict(content)


def test_stop_answers_what_was_accepted(plain, images):
    content = images[0].read_bytes()
    with serving({"main": plain}, open_file=Gate) as client, ThreadPoolExecutor(6) as pool:
        score = client.predict(content)["score"]
        gate = close_gate(client)
        waiting = [pool.submit(client.ask, "POST", "/predict", content) for _ in range(5)]
        with client.connect() as slow:  # its headers are accepted, its body is still on the way
            head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
            slow.sendall(head.encode() + content[:10])
            wait_until(lambda: client.count("active_images") == 5)
            client.service.stop()
            assert not client.service.wait(0.5)
            slow.sendall(content[10:])
            gate.opened.set()
            received = b""
            while data := slow.recv(1 << 16):
                received += data
        answers = [future.result() for future in waiting]
        assert [json.loads(body)["score"] for _, _, body in answers] == [score] * 5
        assert received.startswith(b"HTTP/1.1 200") and json.loads(received.partition(b"\r\n\r\n")[2])["score"] == score
        assert client.service.wait(30)
        with pytest.raises(ConnectionRefusedError):
            client.connect()
    assert client.events[-1] == "stopped: 7 images accepted, 7 answered"


def test_a_client_that_leaves_costs_no_inference(plain, images, monkeypatch):
    """An image counts as active before it is decoded; only then does it wait for the detector."""
    content, decode = images[0].read_bytes(), application.decode_upload

    def decode_slowly(*arguments):
        time.sleep(0.3)
        return decode(*arguments)

    monkeypatch.setattr(application, "decode_upload", decode_slowly)
    with serving({"main": plain}, open_file=Gate) as client:
        gate = close_gate(client)
        first = threading.Thread(target=client.predict, args=[content])
        first.start()
        assert gate.entered.wait(30)
        with client.connect() as gone:
            gone.sendall(
                f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n".encode()
            )
            gone.sendall(content)
            wait_until(lambda: client.count("active_images") == 2)
            wait_until(lambda: client.service._batches._waiting)
            gone.setsockopt(1, 13, b"\x01\0\0\0\0\0\0\0")  # SO_LINGER of 0 seconds: closing resets the connection
        (job,) = client.service._batches._waiting
        wait_until(lambda: not job.is_wanted())
        gate.opened.set()
        first.join()
        wait_until(lambda: client.count("active_images") == 0)
        assert client.service._batches.sizes == {1: 1}


def test_threads_are_measured_after_the_answers(plain, images, monkeypatch, tmp_path):
    """Neither within a request nor in the thread that loads a changed file, which other batches would slow down."""
    content, probes = images[0].read_bytes(), []
    for name in threads.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "FIRST_LOOK", 0.0)
    monkeypatch.setattr(threads, "count_cpus", lambda: 2)
    monkeypatch.setattr(threads.ProcessorUse, "measure_others", lambda self: 0.0)
    path = shutil.copy(plain, tmp_path / "checkpoint.pt")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with threads.choose_threads(None, lambda line: None), serving({"main": path}, reload_seconds=0.05) as client:

            def probe():
                probes.append((threading.current_thread().name, sum(client.service._batches.sizes.values())))

            tuner = threads._choice.tuner
            assert tuner.most == 2  # chosen as the detector was tried
            tuner._probe = probe
            shutil.copy(plain, tmp_path / "new.pt")
            os.replace(tmp_path / "new.pt", path)
            wait_until(lambda: client.served["main"].reloads["loaded"] == 1)
            assert not probes
            client.predict(content)
            wait_until(lambda: len(probes) >= 2)
            assert set(probes) == {("recontrast-inference", 1)}  # after the first batch
    finally:
        torch.set_num_threads(before)


# ---- reloading ---------------------------------------------------------------


def test_changed_file_is_loaded_and_a_broken_one_is_not(plain, images, tmp_path):
    path = tmp_path / "checkpoint.pt"
    shutil.copy(plain, path)
    other = save(tmp_path / "other.pt", RECIPE.replace(size=96))
    content = images[0].read_bytes()
    with serving({"main": path}) as client:
        served = client.served["main"]
        first = client.predict(content)
        assert not served.reload_if_changed()
        for damaged in (b"", b"no checkpoint", plain.read_bytes()[:-1000]):
            path.write_bytes(damaged)
            assert not served.reload_if_changed() and not served.reload_if_changed()
            assert client.predict(content) == first
        assert len(client.events) == 3 and all("the former detector stays" in event for event in client.events)
        assert not served.reload_if_changed() and len(client.events) == 3  # reported once
        path.unlink()
        assert not served.reload_if_changed() and client.predict(content) == first
        os.replace(other, path)
        assert not served.reload_if_changed()  # the file may still be being written
        assert served.reload_if_changed()
        second = client.predict(content)
        (wanted,) = open_detector(path, "cpu").predict([images[0]], batch=1)
        assert second["score"] == float(f"{wanted.score:.9g}") != first["score"]
        assert second["sha256"] != first["sha256"]
        assert served.reloads == {"loaded": 1, "failed": 3}


def test_file_is_loaded_again_while_requests_come(plain, images, tmp_path):
    path = tmp_path / "checkpoint.pt"
    shutil.copy(plain, path)
    other = save(tmp_path / "other.pt", RECIPE.replace(size=96))
    content = images[0].read_bytes()
    with serving({"main": path}, reload_seconds=0.05) as client:
        scores = {client.predict(content)["sha256"]: client.predict(content)["score"]}
        os.replace(other, path)
        end = time.monotonic() + 60
        while len(scores) == 1 and time.monotonic() < end:
            answer = client.predict(content)
            assert scores.setdefault(answer["sha256"], answer["score"]) == answer["score"]
        assert len(scores) == 2


@pytest.mark.parametrize("tile", [None, 32])
def test_detector_with_a_region_of_interest(tmp_path, tile):
    """Its images have the aspect ratio of the region, which is not that of the network's input."""
    mask = np.zeros((48, 96), bool)
    mask[:, :40] = True
    path = save(tmp_path / "wide.pt", RECIPE.replace(roi=encode_mask(mask), tile=tile))
    pixels = np.random.default_rng(0).integers(0, 256, (48, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    (wanted,) = open_detector(path, "cpu").predict(tmp_path / "image.png")
    with serving({"wide": path}) as client:
        answer = client.predict((tmp_path / "image.png").read_bytes())
        assert answer["score"] == pytest.approx(wanted.score, rel=1e-6)
        Image.fromarray(pixels[:, :48]).save(tmp_path / "square.png")
        status, _, body = client.ask("POST", "/predict", (tmp_path / "square.png").read_bytes())
        assert status == 422 and "aspect" in json.loads(body)["error"]
