"""Commands check all arguments before they print, list, load, train or write anything."""

import pytest
from command_line import SMALL, call, works

from recontrast.data.synthetic import make_demo
from recontrast.models.backbone import Backbone


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_demo(tmp_path_factory.mktemp("data"), train=4, test=4, size=64)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "brick"
    works("train", data, "--category", "brick", "--out", out, *SMALL, "--no-evaluate")
    return out


TRAIN = ["train", "DATA/brick", "--out", "OUT", *SMALL]
EVALUATE = ["evaluate", "RUN", "DATA/brick", "--out", "OUT"]
CALIBRATE = ["calibrate", "RUN", "--good", "DATA/brick/test/good"]
PREDICT = ["predict", "RUN", "DATA/brick/test", "--out", "OUT"]
REPORT = ["report", "RUN", "DATA/brick", "--out", "OUT/page.html"]
REPRODUCE = ["reproduce", "mvtec", "--data", "DATA", "--out", "OUT"]
CASES = [
    ([*TRAIN, "--device", "cuda:99"], "device: wanted one of this machine's devices"),
    ([*TRAIN, "--device", "abacus"], "device: wanted"),
    ([*TRAIN, "--teacher-cache", "-1"], "--teacher-cache: wanted GiB of at least 0, got -1"),
    ([*TRAIN, "--cache", "/proc/none"], "--cache: wanted a folder that can be written, got /proc/none"),
    ([*TRAIN, "--weights", "none.pth"], "weights: wanted a file (.pth, .pt, .safetensors)"),
    ([*TRAIN, "--weights", "DATA/synthetic.json"], "weights: wanted a file that ends in .pth, .pt, .safetensors"),
    ([*TRAIN, "--batch", "0"], "batch: wanted"),
    ([*TRAIN, "--set", "colour=red"], "colour"),
    ([*EVALUATE, "--cache", "/proc/none"], "--cache: wanted a folder that can be written, got /proc/none"),
    ([*EVALUATE, "--device", "cuda:99"], "device: wanted one of this machine's devices"),
    ([*EVALUATE, "--batch", "0"], "--batch: wanted at least 1 image, got 0"),
    ([*EVALUATE, "--category", "tin"], "tin"),
    (["evaluate", "OUT/none.pt", "DATA/brick"], "none.pt: wanted a checkpoint file, got no such file"),
    (["evaluate", "DATA/synthetic.json", "DATA/brick"], "synthetic.json"),
    ([*CALIBRATE, "--false-alarm-rate", "2"], "false-alarm rate: wanted a share above 0 and below 1, got 2"),
    ([*CALIBRATE, "--pixel-rate", "0"], "pixel rate: wanted a share above 0 and below 1, got 0"),
    ([*CALIBRATE, "--device", "cuda:99"], "device: wanted one of this machine's devices"),
    ([*CALIBRATE, "--views", "all"], "--views: wanted both, trained or frozen, got 'all'"),
    ([*CALIBRATE, "--check", "DATA/brick/test/good"], "--check: wanted other images than those of --good"),
    (["calibrate", "OUT/none.pt", *CALIBRATE[2:], "--false-alarm-rate", "0.5"], "none.pt: wanted a checkpoint file"),
    ([*PREDICT, "--false-alarm-rate", "1.5"], "false-alarm rate: wanted a share above 0 and below 1, got 1.5"),
    ([*PREDICT, "--maps", "gif"], "--maps: wanted one of tiff16, tiff32, npy, none, got 'gif'"),
    ([*PREDICT, "--device", "cuda:99"], "device: wanted one of this machine's devices"),
    (["export", "RUN", "--format", "onx"], "export: format: wanted onnx, pt2, openvino, got 'onx'"),
    (["export", "RUN", "--format", "onx", "--out", "OUT/d.onnx"], "export: format: wanted onnx, pt2, openvino"),
    (["export", "RUN", "--format", "pt2", "--out", "OUT/d.onnx"], "export: wanted a file name that ends in .pt2"),
    (["export", "RUN", "--format", "pt2", "--out", "OUT/d.pt2", "--images", "none"], "none: wanted an image"),
    (["export", "RUN", "--format", "pt2", "--out", "OUT/d.pt2", "--views", "all"], "--views: wanted both"),
    (["export", "OUT/none.pt", "--format", "pt2", "--out", "OUT/d.pt2"], "none.pt: wanted a checkpoint file"),
    ([*REPORT, "--device", "cuda:99"], "device: wanted one of this machine's devices"),
    ([*REPORT, "--batch", "0"], "report: batch: wanted at least 1, got 0"),
    ([*REPORT, "--category", "tin"], "--category: wanted one of brick or all, got 'tin'"),
    (["report", "RUN", "none", "--out", "OUT/page.html"], "none: wanted"),
    (["demo", "--out", "OUT", "--device", "cuda:99"], "device: wanted one of this machine's devices"),
    (["demo", "--out", "OUT", "--steps", "-1"], "steps: wanted"),
    (["prepare", "mvtec", "--source", "none", "--out", "DATA"], "DATA: wanted a new or an empty folder"),
    ([*REPRODUCE, "--device", "cuda:99"], "device: wanted one of this machine's devices"),
    ([*REPRODUCE, "--cache", "/proc/none"], "--cache: wanted a folder that can be written, got /proc/none"),
    ([*REPRODUCE, "--set", "weights=none.pth"], "weights: wanted a file (.pth, .pt, .safetensors)"),
    ([*REPRODUCE, "--seeds", "one"], "--seeds: wanted comma-separated integers, got 'one'"),
    ([*REPRODUCE, "--entries", "B"], "reproduce: entry: wanted one of ours, patchcore, padim, got 'B'"),
]  # fmt: skip


@pytest.mark.parametrize("arguments, message", CASES, ids=lambda case: " ".join(case) if isinstance(case, list) else "")
def test_wrong_argument_is_refused_first(run, data, tmp_path, monkeypatch, arguments, message):
    def fail(*values, **options):
        raise RuntimeError("a network was built")

    monkeypatch.setattr(Backbone, "__init__", fail)
    places = {"RUN": run, "DATA": data, "OUT": tmp_path / "out"}

    def fill(text):
        for name, place in places.items():
            text = text.replace(name, str(place))
        return text

    result = call(*map(fill, arguments))
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and fill(message) in lines[0], result.output
    assert result.stdout == "" and not (tmp_path / "out").exists()
