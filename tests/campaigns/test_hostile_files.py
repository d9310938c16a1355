"""Files from strangers: no code is run, nothing hangs, and the answer is one sentence."""

import copy
import os
import signal
import socket
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hostile import WRONG, payloads, pickle_containers, pt2_files, wrong_descriptions, zipped
from small_detectors import RECIPE, build_onnx, export_onnx, export_openvino, export_pt2, save_checkpoint, save_onnx

from recontrast import checkpoint as checkpoints
from recontrast.app.errors import describe_error
from recontrast.calibration.conformal import Calibration
from recontrast.checkpoint import digest
from recontrast.inference.detector import open_detector
from recontrast.models.weights import read_weights
from recontrast.recipes.recipe import Recipe
from recontrast.recipes.yaml_file import load_recipe, read_recipe, write_recipe
from recontrast.training.json_log import read_log

SECONDS = 30  # until a trial counts as hanging
SELECTION = 40  # trials of a test in an ordinary run
IMAGE = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning:(onnx|onnxscript|onnx_ir|openvino).*")]


class HangError(BaseException):
    """A trial took too long."""


@contextmanager
def limited():
    def stop(*_):
        raise HangError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def score(path):
    return open_detector(path, "cpu").predict([IMAGE])[0].score


def refuses(campaign, about, read, path, *, marker=None, may_work=False):
    """Count one trial: ``read(path)`` must refuse the file in one sentence that names it."""
    try:
        with limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(path)
        failure = None if may_work else "it was not refused"
    except (ValueError, OSError) as error:
        message = describe_error(error)
        is_named = os.path.basename(path)[:20] in message or not os.path.basename(path).isprintable()
        failure = None if is_named and len(message) < 1500 else f"message {message[:1500]!r}"
    except HangError:
        failure = f"more than {SECONDS} s"
    except Exception as error:
        failure = f"{type(error).__name__}: {str(error)[:300]}"
    if marker is not None and marker.exists():
        marker.rmdir()
        failure = "it ran code"
    campaign.passed() if failure is None else campaign.failed(f"{about}: {failure}")


def select(campaign, cases, selection=SELECTION):
    """All cases in a whole campaign, else some of them, spread evenly."""
    cases = list(cases)
    count = campaign.tries(min(selection, len(cases)), len(cases))
    return [cases[index] for index in np.linspace(0, len(cases) - 1, count).astype(int)]


def test_pickles(campaign, tmp_path):
    """Pickles that create a folder, in every kind of file and for every function that reads it."""
    marker = tmp_path / "ran"
    cases = [
        (f"{name} in {file}", file, data)
        for name, content in payloads(marker)
        for file, data in pickle_containers(content)
    ]
    for about, file, data in select(campaign, cases):
        path = tmp_path / file
        path.write_bytes(data)
        read = read_weights if file.endswith(("pth", "safetensors")) else score
        refuses(campaign, about, read, path, marker=marker)


def test_files_of_torch_export(campaign, tmp_path):
    marker = tmp_path / "ran"
    whole = export_pt2(tmp_path / "whole.pt2")
    path = tmp_path / "hostile.pt2"
    contents = dict(list(payloads(marker))[::7])
    cases = [(f"{place}, {name}", data) for name, content in contents.items()
             for place, data in pt2_files(whole, content, marker)]  # fmt: skip
    for about, data in select(campaign, cases):
        path.write_bytes(data)
        # Parts that are never read, such as the pickle of the sample inputs, may be anything.
        refuses(campaign, about, score, path, marker=marker, may_work=about.startswith("sample inputs"))


def test_pipes_devices_and_links(campaign, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    server = socket.socket(socket.AF_UNIX)
    server.bind("socket")
    readers = {".pt": score, ".onnx": score, ".pt2": score, ".xml": score, ".yaml": load_recipe, ".pth": read_weights,
               ".safetensors": read_weights, ".jsonl": read_log}  # fmt: skip
    sources = ("pipe", "socket", "/dev/zero", "/dev/null", "/dev/urandom", "/dev/full", "/dev/tty", ".", "gone", "LOOP")
    for source in sources:
        for suffix, read in readers.items():
            path = tmp_path / f"link{suffix}"
            path.unlink(missing_ok=True)
            path.symlink_to(path if source == "LOOP" else source)
            argument = str(path) if suffix == ".yaml" else path
            refuses(campaign, f"{source} as {suffix}", read, argument, may_work=(source, suffix) == ("gone", ".jsonl"))
    network = export_openvino(tmp_path / "d.xml")
    for source in sources:
        weights = network.with_suffix(".bin")
        weights.unlink()
        weights.symlink_to(weights if source == "LOOP" else source)
        refuses(campaign, f"{source} as weights of OpenVINO", score, network)
    server.close()


def test_wrong_values_in_checkpoints(campaign, tmp_path):
    """Every field of a checkpoint, and every nested one, holds every wrong value."""
    content = torch.load(save_checkpoint(tmp_path / "whole.pt"), weights_only=True)
    calibration = Calibration((1.0, 2.0), 0.5, 2.0, None, 0.5, False, "", digest(content["model"], RECIPE))
    content["calibration"] = calibration.to_dict()
    small = {"model": dict(list(content["model"].items())[:2]), "optimisers": []}
    places = [(name,) for name in content]
    places += [
        (n, k) for n in ("model_config", "preprocessing", "images", "rng", "calibration", "recipe") for k in content[n]
    ]
    places += [("rng", "batches", "generator"), ("rng", "batches", "place"), ("optimisers", 0),
               ("optimisers", 0, "state"), ("optimisers", 0, "param_groups"), ("optimisers", 0, "state", 0),
               ("optimisers", 0, "param_groups", 0),
               ("model", "encoder.extractor.conv1.0.weight")]  # fmt: skip
    cases = [(place, index) for place in places for index in range(len(WRONG))]
    path = tmp_path / "wrong.pt"
    for place, index in select(campaign, cases, 100):
        changed = {**content, **(small if place[0] not in ("model", "optimisers") else {})}
        target = changed[place[0]] = copy.deepcopy(changed[place[0]]) if len(place) > 1 else None
        for key in place[1:-1]:
            target = target[key]
        if len(place) == 1:
            changed[place[0]] = WRONG[index]
        else:
            target[place[-1]] = WRONG[index]
        try:
            torch.save(changed, path)
        except (RuntimeError, OverflowError, RecursionError):  # a value that cannot be stored
            campaign.passed()
            continue
        refuses(campaign, f"{place} is value {index}", lambda path: vars(checkpoints.load(path)), path, may_work=True)
        refuses(campaign, f"{place} is value {index}", score, path, may_work=True)


def test_wrong_descriptions(campaign, tmp_path):
    model, path = build_onnx(), tmp_path / "wrong.onnx"
    for about, text in select(campaign, wrong_descriptions()):
        try:
            save_onnx(path, model, text or " ")
        except (ValueError, UnicodeEncodeError):
            campaign.passed()
            continue
        refuses(campaign, about, score, path, may_work=True)


def onnx_models():
    """Yield (name, model) of ONNX files that no detector is."""
    from onnx import AttributeProto, TensorProto, helper

    for location in ("/etc/passwd", "../../etc/passwd", "pipe", "/dev/zero", "weights.bin", ""):
        model = build_onnx()
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
        yield f"weights in {location!r}", model
        model = build_onnx()
        value = helper.make_tensor("value", TensorProto.FLOAT, [1], [1.0])
        value.external_data.add(key="location", value=location)
        model.graph.node.insert(0, helper.make_node("Constant", [], ["unused"], value=value))
        yield f"a constant in {location!r}", model
    for domain in ("com.microsoft", "mydomain", "ai.onnx.ml", "ai.onnx.training", "com.microsoft.extensions"):
        model = build_onnx()
        model.graph.node[4].domain = domain
        yield f"a node of {domain}", model
        model = build_onnx()
        model.opset_import.add(domain=domain, version=1)
        yield f"operators of {domain}", model
    for kind in ("Loop", "If", "Scan"):
        model = build_onnx()
        attribute = AttributeProto(name="body", type=AttributeProto.GRAPH)
        attribute.g.CopyFrom(model.graph)
        model.graph.node[4].op_type = kind
        model.graph.node[4].attribute.append(attribute)
        yield kind, model
    model = build_onnx()
    model.functions.add(name="f", domain="")
    yield "a function", model
    model = build_onnx()
    model.graph.node[4].op_type = "NoSuchOperator"
    yield "an unknown operator", model
    for index in (0, 1):
        model = build_onnx()
        del model.graph.output[index]
        yield f"no output {index}", model


def test_onnx_networks(campaign, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "weights.bin").write_bytes(bytes(1000))
    for about, model in select(campaign, onnx_models()):
        refuses(campaign, about, score, save_onnx(tmp_path / "hostile.onnx", model))


def test_openvino_networks(campaign, tmp_path):
    path = export_openvino(tmp_path / "whole.xml")
    text, weights = path.read_text(), path.with_suffix(".bin").read_bytes()
    name = text[text.index("<layers>") :]
    entities = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10 if i else "x"}">' for i in range(12))
    hostile = tmp_path / "hostile.xml"
    cases = {
        "an entity bomb": text.replace('<?xml version="1.0"?>', f'<?xml version="1.0"?><!DOCTYPE net [{entities}]>'),
        "an external entity": text.replace(
            '<?xml version="1.0"?>', '<?xml version="1.0"?><!DOCTYPE net [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
        ),
        "operators of an extension": text.replace('version="opset', 'version="extension', 1),
        "a loop": text.replace("<layers>", "<layers><body></body>"),
        "another root": text.replace("<net ", "<html ").replace("</net>", "</html>"),
        "a nested element": text.replace("<layers>", "<layers>" + "<a>" * 50_000),
        "no layers": text.replace(name, "</net>"),
        "sizes beyond the weights": text.replace('offset="0"', 'offset="99999999999"'),
        "no checksum": text.replace("recontrast_sha256", "recontrast_sha255"),
        "no description": text.replace("<recontrast ", "<recontrasf "),
        "no digest of the weights": text.replace("<recontrast_weights ", "<recontrast_weightz "),
        "an ONNX file": "onnx",
        "nothing": "",
    }
    for about, content in cases.items():
        hostile.write_text(content)
        hostile.with_suffix(".bin").write_bytes(weights)
        refuses(campaign, about, score, hostile)


def test_tensors_by_name(campaign, tmp_path):
    """Weight files that hold anything but weights."""
    path = tmp_path / "hostile.pth"
    itself = {"model": {}}
    itself["model"]["model"] = itself["model"]
    huge = torch.zeros(1).expand(10**15)
    others = [
        itself,
        {"state_dict": itself},
        {"x": huge},
        *WRONG,
        *({"w": value} for value in WRONG),
        {1: torch.zeros(1)},
    ]
    for index, value in enumerate(others):
        for suffix in (".pth", ".safetensors"):
            target = path.with_suffix(suffix)
            try:
                torch.save(value, target)
            except (RuntimeError, OverflowError, RecursionError):
                continue
            refuses(campaign, f"value {index} in {suffix}", read_weights, target, may_work=suffix == ".pth")
    for header in (2**63, 2**40, 10, 0):
        target = path.with_suffix(".safetensors")
        target.write_bytes(header.to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,9]}}')
        refuses(campaign, f"a header of {header} bytes", read_weights, target)
    bomb = zipped({"data.pkl": b"\0" * 10**7, "version": "3\n"}, compression=8)
    (tmp_path / "bomb.pth").write_bytes(bomb)
    refuses(campaign, "a compressed archive", read_weights, tmp_path / "bomb.pth")


def test_wrong_values_in_recipes(campaign, tmp_path):
    import dataclasses

    cases = [(field.name, index) for field in dataclasses.fields(Recipe) for index in range(len(WRONG))]
    for name, index in select(campaign, cases, 200):
        try:
            Recipe.from_dict({name: WRONG[index]})
        except ValueError as error:
            text = str(error)
            if name not in text or len(text) > 1000 or "\n" in text:
                campaign.failed(f"{name} is value {index}: {text[:1000]!r}")
                continue
        except Exception as error:
            campaign.failed(f"{name} is value {index}: {type(error).__name__}: {error}")
            continue
        campaign.passed()


def test_logs(campaign, tmp_path):
    path = tmp_path / "log.jsonl"
    whole = b'{"step": 1, "loss": 0.5}\n'
    for line in (b"[" * 100_000, b"\xff\xfe", b"\0" * 1000, b'{"step": 1e999}', b'{"step": true}', b'{"step": -1}',
                 b"{}",
                 b'{"step": 1, "loss": NaN}', b'{"step": 1, "loss": {"a": 1}}', b'{"step": ' + b"9" * 5000 + b"}",
                 b'{"step": 99999999999999999999}', b"null", b'"x"', b'{"step": 1, "loss": "x"', b"\r",
                 b"\x85"):  # fmt: skip
        path.write_bytes(whole + line + b"\n" + whole)
        refuses(campaign, f"line {line[:20]!r}", read_log, path, may_work=True)
        if len(read_log_quietly(path)) != 2:
            campaign.failed(f"line {line[:20]!r}: whole lines were lost")


def read_log_quietly(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_log(path)


NAMES = (b"a b", b"a\rb", b"a\nb", b"a'b", b'a"b', b"a<b>", b"=a", b"a,b", b"-a", b"a\xffb", b"\xe9", "ä€".encode(),
         b"%41",
         b"a;b|c&d", b"$HOME", b"~a", b"a\\b", b"a\tb", b"{a}", b"[a]*?", b"x" * 200, b".a", b"a\x1b[31m")  # fmt: skip


def test_names(campaign, tmp_path):
    """Whole files have the same scores under every name; the messages about damaged ones hold no line break."""
    small = {
        ".pt": save_checkpoint(tmp_path / "d.pt"),
        ".onnx": export_onnx(tmp_path / "d.onnx"),
        ".pt2": export_pt2(tmp_path / "d.pt2"),
        ".xml": export_openvino(tmp_path / "d.xml"),
    }
    contents = {suffix: (path.read_bytes(), score(path)) for suffix, path in small.items()}
    weights = small[".xml"].with_suffix(".bin").read_bytes()
    cases = [(name, suffix) for name in NAMES for suffix in contents]
    for name, suffix in select(campaign, cases, 12):
        content, expected = contents[suffix]
        path = tmp_path / os.fsdecode(name + suffix.encode())
        path.with_suffix(".bin").write_bytes(weights)
        path.write_bytes(content)
        try:
            got = score(path)
        except Exception as error:
            campaign.failed(f"{path.name!r}: {type(error).__name__}: {error}")
        else:
            campaign.passed() if got == expected else campaign.failed(f"{path.name!r}: score {got}, not {expected}")
        path.write_bytes(content[: len(content) // 2])
        refuses(campaign, f"{path.name!r}, damaged", score, path)
    for name in NAMES:
        path = tmp_path / os.fsdecode(name + b".yaml")
        write_recipe(path, RECIPE)
        campaign.passed() if read_recipe(path) == RECIPE else campaign.failed(f"{path.name!r}: another recipe")
        weights_path = path.with_suffix(".pth")
        torch.save({"weight": torch.ones(2)}, weights_path)
        refuses(campaign, f"{weights_path.name!r}", read_weights, weights_path, may_work=True)
