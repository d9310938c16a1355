"""Random command lines: one sentence or success, no traceback, and no file of the user changed."""

import hashlib
import os
import random
import re
import shutil

import pytest
from command_line import call
from saved_model import RECIPE, draw, save
from tiny import tiny_set
from typer.main import get_command

from recontrast.app.cli import app
from recontrast.data.locks import LOCK_NAME

# Commands, each as often as it is tried; those that take long get few trials or an option that ends them early.
COMMANDS = ["train"] * 6 + ["predict"] * 8 + ["evaluate", "calibrate", "report"] * 5 + ["prepare"] * 4
COMMANDS += ["reproduce"] * 3 + ["export", "demo", "info"]
SMALL = {
    "train": ["--backbone", "test_resnet", "--weights", "random", "--steps", "1", "--size", "64", "--device", "cpu"],
    "reproduce": "--set steps=1 --set backbone=test_resnet --set weights=random --set size=64 --set batch=2".split(),
    "demo": ["--device", "none"],
}
PATHS = ("--out", "--good", "--check", "--images", "--source", "--data", "--cache", "--resume", "--recipe", "--weights")
TOO_SLOW = ("--compile", "--engine", "--address", "--part", "--short", "--compare", "--copy")
WORDS = ["", " ", "0", "1", "-1", "2", "32", "64", "0.5", "0.05", "1e-9", "nan", "inf", "-inf", "x", "all", "both",
         "trained", "bfloat16", "nchw", "npy", "tiff", "onnx", "mvtec", "visa", "nut", "steps=1", "=", "=1+1", "a=b=c",
         "[red]x[/red]", "a\nb", "a\rb", "\x1b[31m", "é", "\udcff", "a,b", "*", "--help",
         "../..", "cuda:7", "-"]  # fmt: skip


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """Folder of a user: images, a category, checkpoints, texts, links, and files of odd names or contents."""
    root = tmp_path_factory.mktemp("user")
    draw(root / "photos", 3, seed=0)
    draw(root / "many", 24, seed=1)
    tiny_set(root / "data", "nut", train=4, good=2, defects=2)
    (root / "run").mkdir()
    save(root / "run" / "checkpoint.pt", RECIPE)
    (root / "empty").mkdir()
    (root / "empty.png").touch()
    (root / "text.pt").write_text("text")
    (root / "notes.txt").write_text("a list\nof lines\n")
    (root / "recipe.yaml").write_text("steps: 1\n")
    (root / "bad.yaml").write_text("steps: [1\n&")
    (root / "broken.png").write_bytes((root / "photos" / "000.png").read_bytes()[:300])
    shutil.copytree(root / "photos", root / "=1+1 [b] é,\n")
    (root / "link").symlink_to(root / "photos")
    (root / "nowhere").symlink_to(root / "gone")
    (root / "own.csv").write_text("of the user")
    (root / "results").mkdir()
    for name in ("scores.csv", "results.json", "report.html", "log.jsonl", "recipe.yaml", "checkpoint.pt"):
        (root / "results" / name).write_text("of the user")
    return root


def read_files(root):
    """Return a digest of each file and the target of each link."""
    content = {}
    for folder, _, names in os.walk(root):
        for name in names:
            path = os.path.join(folder, name)
            with open(path, "rb") if not os.path.islink(path) else open(os.devnull, "rb") as file:
                digest = hashlib.sha256(file.read()).hexdigest()
            content[os.path.relpath(path, root)] = os.readlink(path) if os.path.islink(path) else digest
    return content


def choose_path(chance, root):
    names = sorted(os.listdir(root))
    path = root / chance.choice([*names, "missing", "photos/000.png", "run/checkpoint.pt", "data/nut", "new/out"])
    return str(chance.choice([path, path, path, f"{path}/", "out", "out/more", chance.choice(WORDS), "~/none", "a\0b"]))


def list_usual_values(root):
    """Return values that make sense, by the name of an argument or an option."""
    return {
        "name": ["mvtec"], "checkpoint": [f"{root}/run"], "run": [f"{root}/run"], "data": [f"{root}/data"],
        "inputs": [f"{root}/photos", f"{root}/=1+1 [b] é,\n", f"{root}/link"], "--out": ["out", f"{root}/new"],
        "--good": [f"{root}/many"], "--check": [f"{root}/photos"], "--images": ["3"], "--device": ["cpu"],
        "--steps": ["1", "2"], "--batch": ["1", "2"], "--size": ["64"], "--category": ["nut", "all"],
        "--workers": ["1"],
        "--false-alarm-rate": ["0.2", "0.05"], "--pixel-rate": ["0.1"], "--views": ["both", "trained"], "--seed": ["3"],
        "--precision": ["float32"], "--layout": ["nchw"], "--maps": ["npy", "tiff"], "--threshold": ["1.5"],
        "--recipe": ["mvtec", f"{root}/recipe.yaml"], "--set": ["holdout=0"], "--data": [f"{root}/data"],
        "--encoder-bn": ["eval"], "--cache": ["cache"], "--holdout": ["0"], "--seeds": ["1"],
    }  # fmt: skip


def choose_arguments(chance, root):
    """Return a random command line; in some of them all values are usual ones."""
    name, usual = chance.choice(COMMANDS), list_usual_values(root)
    likelihood = chance.choice([0.5, 0.9, 1.0])

    def choose(key, is_path):
        if key in usual and chance.random() < likelihood:
            return chance.choice(usual[key])
        return choose_path(chance, root) if is_path else chance.choice(WORDS)

    parameters = get_command(app).commands[name].params
    arguments = [name]
    for parameter in parameters:
        if not parameter.opts[0].startswith("-"):
            counts = [1] if likelihood == 1 else [0, 1, 1, 1, 2] if parameter.nargs == -1 else [0, 1, 1, 1, 1, 1]
            arguments += [choose(parameter.name, True) for _ in range(chance.choice(counts))]
    arguments += SMALL.get(name, [])
    options = [p for p in parameters if p.opts[0].startswith("--") and p.opts[0] not in TOO_SLOW]
    for option in chance.sample(options, min(len(options), chance.choice([0, 1, 1, 2, 2, 3, 5]))):
        arguments.append(chance.choice(option.opts))
        if not option.is_flag and chance.random() < 0.9 + likelihood / 10:
            arguments.append(choose(option.opts[0], option.opts[0] in PATHS))
    needed = {"predict": "--out", "calibrate": "--good", "reproduce": "--data", "report": "--out", "export": "--out"}
    if name in needed and needed[name] not in arguments and chance.random() < likelihood:
        arguments += [needed[name], choose(needed[name], True)]
    return arguments


def describe_failure(result, before, after, arguments):
    """Return what is wrong with the end of a command; None if nothing is."""
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return f"{type(result.exception).__name__}: {result.exception}"
    if "Traceback" in result.output:
        return f"a traceback: {result.output[-500:]}"
    if result.exit_code not in (0, 2):
        return f"exit status {result.exit_code}: {result.output[-500:]}"
    lines = [line for line in result.stderr.splitlines() if re.match(r"recontrast: (?!warning: )", line)]
    if result.exit_code == 2 and not lines:
        return f"exit status 2 without a sentence: {result.output[-500:]}"
    allowed = ("run/checkpoint.pt",) if arguments[0] == "calibrate" else ()
    changed = [path for path in before if before[path] != after.get(path) and path not in allowed]
    if changed and "--overwrite" not in arguments:
        return f"changed or removed {changed}"
    if left := [path for path in after if path.endswith((".tmp", LOCK_NAME))]:
        return f"left {left}"
    return None


def test_command_lines(campaign, user, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for seed in range(campaign.tries(15, 600)):
        chance = random.Random(seed)
        folder = tmp_path / str(seed)
        shutil.copytree(user, folder / "user", symlinks=True)
        monkeypatch.chdir(folder)
        before = read_files(folder / "user")
        arguments = choose_arguments(chance, folder / "user")
        result = call(*arguments)
        wrong = describe_failure(result, before, read_files(folder / "user"), arguments)
        if wrong is None:
            campaign.passed()
        else:
            campaign.failed(f"seed {seed}: {arguments}: {wrong}")
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(folder)
