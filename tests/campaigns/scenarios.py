"""Commands that write, each with a folder that an earlier run of it filled, for the campaigns of faults."""

import csv
import hashlib
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from command_line import works
from downloads import DOWNLOADS
from faults import copy, list_hidden, read_folder, run_command, start, wait
from saved_model import RECIPE, draw, save
from tiny import tiny_set

from recontrast import checkpoint as checkpoints
from recontrast.recipes.yaml_file import read_recipe

TIMES = ("seconds", "since", "pid", "host", "images_per_second")  # differ from run to run, as the next ones
MEASURED = ("train_seconds", "image_seconds", "memory", "train_memory", "image_memory", "file_bytes")
TINY = ["--backbone", "test_resnet", "--weights", "random", "--size", "32", "--batch", "2", "--device", "cpu"]


@dataclass(frozen=True)
class Scenario:
    """A command, and the folder that it writes to.

    Attributes:
        arguments: Arguments of the command; OUT stands for the folder.
        former: Folder as an earlier run left it; None for a new folder.
        setup: Function that the forked process calls first, or None.
    """

    arguments: tuple[str, ...]
    former: Path | None = None
    setup: Any = None

    def fill(self, out):
        """Return the arguments with the folder."""
        return [argument.replace("OUT", str(out)) for argument in self.arguments]


def normalise(name, content):
    """Return the content of a result file without durations and times."""
    if name.endswith(".pt"):
        stored = checkpoints.read(io.BytesIO(content), name)
        calibration = None if stored.calibration is None else sorted(stored.calibration.to_dict().items())
        return stored.step, checkpoints.digest(stored.model, stored.recipe), stored.recipe, repr(calibration)
    if name.endswith("log.jsonl"):
        return [(line["step"], line.get("loss"), line.get("images")) for line in map(json.loads, content.splitlines())]
    if name.endswith(".json"):
        return json.dumps(_drop_times(json.loads(content)), sort_keys=True)
    if name.endswith(("results.csv", "compare.csv")):
        rows = csv.DictReader(content.decode().splitlines())
        measured = re.compile("seconds|memory|bytes")
        return [{key: value for key, value in row.items() if not measured.search(key)} for row in rows]
    if name.endswith(("results.md", "compare.md", ".html")):  # with times
        return re.sub(r"[0-9.]+", "0", content.decode())
    return hashlib.sha256(content).hexdigest()


def _drop_times(value):
    if isinstance(value, dict):
        return {key: _drop_times(entry) for key, entry in value.items() if key not in (*TIMES, *MEASURED)}
    return [_drop_times(entry) for entry in value] if isinstance(value, list) else value


def train(root, is_new):
    tiny_set(root / "data", train=6, good=2, defects=2)
    arguments = ["train", str(root / "data"), "--out", "OUT", *TINY, "--steps", "4", "--holdout", "0"]
    arguments += ["--set", "checkpoint_every=2", "--set", "log_every=1"]
    if is_new:
        return Scenario((*arguments, "--seed", "2"))
    works(*(argument.replace("OUT", str(root / "former")) for argument in arguments), "--seed", "1")
    return Scenario((*arguments, "--seed", "2", "--overwrite"), root / "former")


def train_only(root, is_new):
    """Training without the evaluation at its end, in a new folder."""
    scenario = train(root, is_new)
    return Scenario((*scenario.arguments, "--no-evaluate"), scenario.former)


def extend(root, is_new):
    """Extension of a fitted run, or of one that was evaluated, with a calibration."""
    tiny_set(root / "data", train=6, good=2, defects=2)
    tiny_set(root / "more", train=4, seed=1)
    options = ["--architecture", "patchcore", "--holdout", "0", *(["--no-evaluate"] if is_new else [])]
    works("train", root / "data", "--out", root / "former", *TINY, *options)
    arguments = ("train", "--extend", "OUT", "--good", str(root / "more/nut/train/good"), "--device", "cpu")
    return Scenario(arguments if is_new else (*arguments, "--holdout", "0.3"), root / "former")


def compare(root, is_new):
    tiny_set(root / "data", train=8, good=2, defects=2)
    arguments = ["compare", str(root / "data"), "--out", "OUT", *TINY, "--methods", "padim,recontrast"]
    arguments += ["--steps", "4", "--holdout", "0.25"]
    if is_new:
        return Scenario((*arguments, "--seed", "2"))
    works(*(argument.replace("OUT", str(root / "former")) for argument in arguments), "--seed", "1")
    return Scenario((*arguments, "--seed", "2", "--overwrite"), root / "former")


def predict(root, is_new):
    file = save(root / "checkpoint.pt", RECIPE)
    draw(root / "before", 5, seed=1)
    draw(root / "after", 3, seed=2)
    options = ["--maps", "npy", "--device", "cpu", "--threshold", "1"]
    arguments = ("predict", str(file), str(root / "after"), "--out", "OUT", *options)
    if is_new:
        return Scenario(arguments)
    works("predict", file, root / "before", "--out", root / "former", *options)
    return Scenario(arguments, root / "former")


def evaluate(root, is_new):
    file = save(root / "checkpoint.pt", RECIPE)
    tiny_set(root / "before", train=1, good=3, defects=2)
    tiny_set(root / "after", train=1, good=2, defects=2, seed=1)
    options = ["--save-maps", "--device", "cpu"]
    arguments = ("evaluate", str(file), str(root / "after"), "--out", "OUT", *options, "--cache", "OUT/cache")
    if is_new:
        return Scenario(arguments)
    works("evaluate", file, root / "before", "--out", root / "former", *options)
    return Scenario(arguments, root / "former")


def calibrate(root, is_new):
    save(root / "former" / "checkpoint.pt", RECIPE)
    draw(root / "good", 6, seed=1)
    options = ["--good", root / "good", "--device", "cpu", "--false-alarm-rate"]
    if not is_new:
        works("calibrate", root / "former", *options, "0.5")
    return Scenario(("calibrate", "OUT", *map(str, options), "0.2"), root / "former")


def export(root, is_new):
    """Write stand-ins for the two files of OpenVINO: tracing would take a minute for each trial."""
    file = save(root / "checkpoint.pt", RECIPE)

    def setup():
        from recontrast.export import export as module

        def write(program, graph, kind, path, description):
            path.write_bytes(b"new graph" * 1000)
            path.with_suffix(".bin").write_bytes(b"new weights" * 1000)

        module._write, module.trace, module._require = write, lambda *arguments: None, lambda kind: None
        module.draw_images = lambda *arguments: []
        module.compare_scores = lambda *arguments: (3, 0.0)
        module.ExportedDetector = lambda path: None

    arguments = ("export", str(file), "--format", "openvino", "--out", "OUT/detector.xml")
    if is_new:
        return Scenario(arguments, setup=setup)
    (root / "former").mkdir()
    (root / "former/detector.xml").write_bytes(b"old graph" * 1000)
    (root / "former/detector.bin").write_bytes(b"old weights" * 1000)
    return Scenario(arguments, root / "former", setup)


def report(root, is_new):
    file = save(root / "checkpoint.pt", RECIPE)
    tiny_set(root / "before", train=1, good=2, defects=1)
    tiny_set(root / "after", train=1, good=1, defects=2, seed=1)
    arguments = ["report", str(file), "--device", "cpu", "--out", "OUT/page.html", "--category", "nut"]
    if not is_new:
        works(*(a.replace("OUT", str(root / "former")) for a in arguments), root / "before")
    return Scenario((*arguments, str(root / "after")), None if is_new else root / "former")


def prepare(root, is_new):
    DOWNLOADS["mvtec"](root / "download")
    former = None if is_new else root / "former"  # a folder that exists and is empty
    if former is not None:
        former.mkdir()
    return Scenario(("prepare", "mvtec", "--source", str(root / "download"), "--out", "OUT"), former)


def reproduce(root, is_new):
    tiny_set(root / "data", "grid", train=4, good=2, defects=2)
    arguments = [
        "reproduce",
        "mvtec",
        "--data",
        str(root / "data"),
        "--out",
        "OUT",
        "--device",
        "cpu",
        "--entries",
        "ours",
    ]
    for change in ("backbone=test_resnet", "weights=random", "size=32", "batch=4", "steps=2"):
        arguments += ["--set", change]
    if is_new:
        return Scenario((*arguments, "--cache", "OUT/cache"))
    works(*(argument.replace("OUT", str(root / "former")) for argument in arguments))
    return Scenario((*arguments, "--seeds", "111,2"), root / "former")  # the first is finished


def demo(root, is_new):
    from recontrast.app import demo as module

    recipe = module.RECIPE.replace(backbone="test_resnet", weights="random", size=32)

    def setup():
        module.RECIPE = recipe
        make_demo = module.synthetic.make_demo
        module.synthetic.make_demo = lambda *args, **sizes: make_demo(*args, **{**sizes, "train": 2, "test": 4})

    arguments = ("demo", "--out", "OUT", "--steps", "2", "--device", "cpu", "--seed")
    if is_new:
        return Scenario((*arguments, "1"), setup=setup)
    report = root / "report"
    arguments_before = [argument.replace("OUT", str(root / "former")) for argument in arguments]
    assert wait(start(run_command([*arguments_before, "0"], setup=setup), report), report)["code"] == 0
    return Scenario((*arguments, "1"), root / "former", setup)


SCENARIOS = {
    function.__name__: function
    for function in (train, extend, predict, evaluate, calibrate, export, report, prepare, reproduce, demo, compare)
}
ONCE = ("prepare", "extend")  # refuse to do the same again, so that the next run only completes what is left
RESUMED = ("train", "reproduce")  # what a killed run leaves is neither old nor new, and is continued
torch.set_num_threads(1)


def select_scenarios(config, ordinary):
    """Return the names of the commands to try: one in an ordinary run of the tests, all in the whole campaign."""
    return list(SCENARIOS) if config.option.markexpr == "campaign" else [ordinary]


def build(name, root, variants=(True, False)):
    """Return the scenarios of a command in a new folder and over an earlier run.

    Each is a tuple of its folder, the scenario, the file operations of a whole run, and its results before
    and after.
    """
    built = []
    for is_new in variants:
        folder = root / ("new" if is_new else "again")
        (folder / "work").mkdir(parents=True)
        scenario = (train_only if name == "train_only" else SCENARIOS[name])(folder, is_new)
        if is_new and scenario.setup is None:  # imports everything once, before processes are forked
            copy(scenario.former, folder / "warm")
            works(*scenario.fill(folder / "warm"))
        copy(scenario.former, folder / "work" / "out")
        action = run_command(scenario.fill(folder / "work" / "out"), folder / "work", setup=scenario.setup)
        whole = wait(start(action, folder / "report"), folder / "report")
        assert whole["code"] == 0, whole["text"]
        assert not list_hidden(folder / "work"), list_hidden(folder / "work")
        former = {} if scenario.former is None else read_folder(scenario.former, normalise)
        built.append((folder, scenario, whole["operations"], former, read_folder(folder / "work" / "out", normalise)))
    return built


def check_run(name, folder, former, whole):
    """Return what is wrong with a folder after a crash; None if nothing is."""
    content = read_folder(folder, normalise)
    if any(path.startswith("unfinished-") for path in content) or content in ({}, former, whole):
        return None
    if name == "prepare":
        return f"a part of the data set: {sorted(content)}"
    if name == "train":
        return check_training(folder, content, former, whole)
    if name == "compare":
        return check_comparison(folder, content, former, whole)
    if name in RESUMED:
        return None
    changed = [path for path in {*content, *former, *whole} if content.get(path) not in (former.get(path),)]
    return f"neither old nor new: {changed} of {sorted(content)}"


def check_comparison(folder, content, former, whole):
    """Return whether the tables describe the runs beside them, and whether each run is of one call."""
    errors = {}
    if "compare.json" in content:  # of a call in which a method failed
        errors = {entry["method"]: entry["error"] for entry in json.loads(content["compare.json"])["methods"]}
        if not any(errors.values()):
            return f"tables beside other runs: {sorted(content)}"
    for method in ("padim", "recontrast"):
        start = f"{method}/"
        parts = [
            {path.removeprefix(start): entry for path, entry in run.items() if path.startswith(start)}
            for run in (content, former, whole)
        ]
        if errors and errors[method] is None and parts[0] != parts[2]:
            return f"{method}: not the run that the tables describe"
        wrong = check_training(folder / method, *parts) if parts[0].keys() - {"method.json"} else None
        if wrong is not None:
            return f"{method}: {wrong}"
    return None


def check_training(folder, content, former, whole):
    """Return whether checkpoint, log, recipe and results are of one run."""
    if "recipe.yaml" not in content:
        return None if set(content) <= {"log.jsonl", "method.json"} else f"no recipe beside {sorted(content)}"
    runs = [run for run in (former, whole) if run.get("recipe.yaml") == content["recipe.yaml"]]
    if not runs:
        return "a recipe of another run"
    log = content.get("log.jsonl", [])
    if log != runs[0]["log.jsonl"][: len(log)]:
        return "a log of another run"
    if "checkpoint.pt" in content:
        if checkpoints.load(folder / "checkpoint.pt").recipe != read_recipe(folder / "recipe.yaml"):
            return "a checkpoint of another run"
        if (log[-1][0] if log else 0) < content["checkpoint.pt"][0]:
            return "a log without lines of the checkpoint"
    if "results.json" in content and "results.json" in runs[0]:
        found, wanted = (json.loads(run["results.json"]) for run in (content, runs[0]))
        if found.get("decided") is None:  # written before the decisions, which could not be written
            wanted["decided"] = None
        if found != wanted and not found["errors"]:  # of images that failed
            return "results of another run"
    return None


def continue_run(name, scenario, out):
    """Return the arguments with which a user continues."""
    arguments = scenario.fill(out)
    if name == "train" and "--overwrite" not in arguments and (out / "checkpoint.pt").exists():
        evaluation = [option for option in arguments if option == "--no-evaluate"]
        return [*arguments[:2], "--resume", str(out), "--device", "cpu", *evaluation]
    return arguments
