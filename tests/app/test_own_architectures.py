"""Architectures of users: registered or imported by name, in every command, and never by a name in a file."""

import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import fails, works
from tiny import tiny_set

import recontrast
from recontrast import Architecture, Recipe, checkpoint, registration
from recontrast.architectures import ARCHITECTURES, get_architecture
from recontrast.recipes import yaml_file
from recontrast.recipes.validation import ARCHITECTURE_FIELDS, ONE_PASS, OWN_OPTIONS

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_architecture.py"
TINY = ["--backbone", "test_resnet", "--weights", "random", "--size", "64", "--batch", "2", "--steps", "2"]
ON_CPU = ["--device", "cpu"]


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """Undo registrations and imports after each test."""
    before = [dict(ARCHITECTURES), dict(ARCHITECTURE_FIELDS), dict(OWN_OPTIONS), set(ONE_PASS)]
    imported, modules, path = dict(registration._IMPORTED), set(sys.modules), list(sys.path)
    yield
    for current, former in zip((ARCHITECTURES, ARCHITECTURE_FIELDS, OWN_OPTIONS, ONE_PASS), before, strict=True):
        current.clear()
        current.update(former)
    registration._IMPORTED.clear()
    registration._IMPORTED.update(imported)
    for name in set(sys.modules) - modules:
        if name.startswith(("own_architecture", "lab_")):
            del sys.modules[name]
    assert sys.path == path, "the search path is as before"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    tiny_set(root, train=8)
    return root / "nut"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current folder with the example, and one without it to import from."""
    (tmp_path / "own_architecture.py").write_text(EXAMPLE.read_text())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def forget_example():
    """As in a new process."""
    for name in [name for name in ARCHITECTURES if name.startswith("own_architecture:")]:
        registration._remove(name)
    sys.modules.pop("own_architecture", None)


def test_every_command_takes_it(data, folder):
    """train by its path, then each command with --import, as new processes would."""
    own = ["--architecture", "own_architecture:TINY"]
    works("train", data, *own, *TINY, *ON_CPU, "--set", "options.width=8", "--out", "run")
    saved = checkpoint.load("run/checkpoint.pt")
    assert saved.recipe.architecture == "own_architecture:TINY" and saved.step == 2
    assert dict(saved.recipe.options) == {"width": 8, "noise": 0.2, "sharpness": 4.0}
    assert saved.recipe.score == 0.01 and saved.recipe.schedule == "cosine", "its settings"
    good, named = sorted((data / "train/good").iterdir()), ["--import", "own_architecture"]
    Path("good").mkdir()
    for index, path in enumerate(sorted((data / "test/good").iterdir())):
        (Path("good") / f"{index}.png").write_bytes(path.read_bytes())
    for command in (
        ["evaluate", "run", data, *ON_CPU, "--out", "results"],
        ["calibrate", "run", "--good", "good", "--false-alarm-rate", "0.5", *ON_CPU],
        ["predict", "run", good[0], "--out", "predicted", *ON_CPU],
        ["report", "run", data, *ON_CPU],
        ["export", "run", "--format", "pt2", "--out", "exported.pt2"],
        ["train", data, "--resume", "run", *ON_CPU, "--no-evaluate"],
    ):
        forget_example()
        text = fails(*command)
        assert "wanted an architecture that is imported, got 'own_architecture:TINY'" in text, command
        assert "add --import own_architecture" in text and "own_architecture" not in sys.modules
        works(*command, *named)
    forget_example()
    works("predict", "exported.pt2", good[0], "--out", "from-export", *ON_CPU)  # holds the network: needs no code
    scores = [json.loads(Path(name, "scores.json").read_text())["images"] for name in ("predicted", "from-export")]
    assert "own_architecture" not in sys.modules
    assert scores[0][0]["score"] == pytest.approx(scores[1][0]["score"], rel=1e-4)


def test_compare_and_reproduce_take_it(data, folder):
    options = ["--backbone", "test_resnet", "--weights", "random", "--size", "64", "--batch", "2", "--steps", "2"]
    works("compare", data, "--methods", "patchcore,own_architecture:TINY", *options, *ON_CPU, "--out", "compared")
    assert "own_architecture:TINY" in Path("compared/compare.md").read_text()
    assert checkpoint.load("compared/own_architecture.TINY/checkpoint.pt").recipe.options["sharpness"] == 4.0
    forget_example()
    changes = [part for key in (("backbone", "test_resnet"), ("weights", "random"), ("size", "64"), ("steps", "2"))
               for part in ("--set", "=".join(key))]  # fmt: skip
    output = works(
        "reproduce", "mvtec", "--data", data, "--architecture", "own_architecture:TINY",
        "--entries", "ours,own_architecture.TINY", "--vary", "shots=2,4", *changes, *ON_CPU, "--out", "table",
    )  # fmt: skip
    table = Path("table/comparison.csv").read_text()
    names = [f"{name}-shots={k}" for name in ("ours", "own_architecture.TINY") for k in (2, 4)]
    assert all(name in table for name in names), table + output
    recipe = yaml_file.read_recipe("table/own_architecture.TINY-shots=4/nut/seed-111/recipe.yaml")
    assert recipe.size == 64 and recipe.schedule == "cosine" and recipe.shots == 4


def test_python_interface(data, folder):
    detector = recontrast.train(
        data, "run", architecture="own_architecture:TINY", backbone="test_resnet", weights="random", size=64, steps=2,
        batch=2, device="cpu", **{"options.noise": 0.5},
    )  # fmt: skip
    assert detector.recipe.options["noise"] == 0.5
    forget_example()
    with pytest.raises(ValueError, match=r"recontrast\.import_architectures\('own_architecture'\)"):
        recontrast.load("run")
    assert recontrast.import_architectures("own_architecture") == ["own_architecture:TINY"]
    assert recontrast.import_architectures("own_architecture") == ["own_architecture:TINY"], "a second time"
    assert recontrast.load("run", "cpu").predict(sorted((data / "test/good").iterdir())[:1]).scores.shape == (1,)
    assert registration.list_imported() == ["own_architecture"]


def test_teacher_cache_and_resume(data, folder):
    """The loop of the package serves it: cached features and a resumed run end with the same weights."""
    recontrast.import_architectures("own_architecture")
    common = {"architecture": "own_architecture:TINY", "backbone": "test_resnet", "weights": "random", "size": 64}
    common |= {"steps": 6, "batch": 3, "device": "cpu", "checkpoint_every": 3}
    whole = recontrast.train(data, "a", **common)
    cached = recontrast.train(data, "b", teacher_cache=0.1, **common)

    def stop(step, *_):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recontrast.train(data, "c", on_step=stop, log_every=3, **common)
    resumed = recontrast.train(data, resume="c", device="cpu")
    states = [detector.model.state_dict() for detector in (whole, cached, resumed)]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-5)
        assert torch.equal(states[2][name], value), name


@pytest.mark.parametrize("name", ["os:system", "lab_hostile:NET", "lab_hostile.inner:NET", "__main__:NET"])
def test_a_file_imports_nothing(data, folder, name):
    """A checkpoint, a recipe and an exported file that name a module run none of its code."""
    marker = folder / "was-run"
    (folder / "lab_hostile.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    works("train", data, *TINY, *ON_CPU, "--architecture", "own_architecture:TINY", "--out", "run", "--no-evaluate")
    saved = checkpoint.load("run/checkpoint.pt")
    forget_example()
    hostile = replace(saved, recipe=saved.recipe.replace(architecture=name, options={"width": 8}))
    checkpoint.save("run/checkpoint.pt", hostile)
    yaml_file.write_recipe("hostile.yaml", hostile.recipe)
    before = set(sys.modules)
    for command in (
        ["predict", "run", data, "--out", "predicted"], ["evaluate", "run", data], ["report", "run", data],
        ["calibrate", "run", "--good", data / "test/good", "--false-alarm-rate", "0.5"],
        ["train", data, "--resume", "run"],
        ["export", "run", "--format", "pt2", "--out", "x.pt2"],
        ["train", data, "--recipe", "hostile.yaml", "--out", "other", *TINY],
        ["train", "--extend", "run", "--good", data / "test/good"],
    ):  # fmt: skip
        text = fails(*command)
        assert f"wanted an architecture that is imported, got {name!r}" in text, (command, text)
    with pytest.raises(ValueError, match="wanted an architecture that is imported"):
        recontrast.load("run")
    assert not marker.exists() and not {m for m in set(sys.modules) - before if m.startswith("lab_")}
    assert not Path("other").exists() and name not in ARCHITECTURES


@pytest.mark.parametrize("name", ["os", "os:", ":x", "a b:c", "a:b:c", "a/b:c", "os:system()", "x" * 300 + ":y", "ä:b"])
def test_names_that_are_none(name):
    with pytest.raises(
        ValueError, match=r"architecture: wanted one of 'recontrast', .* your own as 'MODULE:NAME', got"
    ):
        Recipe(architecture=name)
    with pytest.raises(ValueError, match=r"name: wanted a text such as 'module:NAME', got"):
        recontrast.register_architecture(name, ARCHITECTURES["padim"])


BROKEN = {
    "nothing.py": ("nothing:NET", r"wanted a module that can be imported, got nothing \(ModuleNotFoundError"),
    "lab_a.py": ("lab_a:NET", "wanted a recontrast.Architecture at lab_a:NET, got a function", "def NET(): pass"),
    "lab_b.py": ("lab_b:NET", "wanted a recontrast.Architecture at lab_b:NET, got nothing of this name", "x = 1"),
    "lab_c.py": ("lab_c:NET", r"got lab_c \(SyntaxError", "x = ("),
    "lab_d.py": ("lab_d:NET", r"got lab_d \(ZeroDivisionError: division by zero\)", "x = 1 / 0"),
    "lab_e.py": (
        "lab_e:NET", "lab_e:NET: wanted either compute_loss or fit, got neither",
        "import recontrast\nNET = recontrast.Architecture(None, None, None)",
    ),
    "lab_f.py": (
        "lab_f:NET", "lab_f:NET: fields: wanted some of .*, got 'stepz'",
        "import recontrast\nNET = recontrast.Architecture(None, None, None, fit=print, fields=('stepz',))",
    ),
    "lab_g.py": (
        "lab_g:NET", "lab_g:NET: recipe 'mvtec': size: wanted a whole number",
        "import recontrast\nNET = recontrast.Architecture(None, None, None, fit=print, settings={'size': 'big'})",
    ),
}  # fmt: skip


@pytest.mark.parametrize("file", BROKEN)
def test_bad_modules_are_one_sentence(data, folder, file):
    import re

    name, text, *source = BROKEN[file]
    if source:
        (folder / file).write_text(source[0] + "\n")
    for command in (
        ["train", data, *TINY, "--out", "run", "--architecture", name],
        ["compare", data, *TINY, "--out", "run", "--methods", f"patchcore,{name}"],
        ["reproduce", "mvtec", "--data", data, "--out", "run", "--architecture", name],
    ):
        assert re.search(text, fails(*command)), fails(*command)
    assert not Path("run").exists() and name not in ARCHITECTURES and name not in ARCHITECTURE_FIELDS


def test_bad_imports_and_taken_names(data, folder):
    (folder / "lab_empty.py").write_text("x = 1\n")
    assert "wanted a module with a recontrast.Architecture, got none in lab_empty" in fails(
        "evaluate", "run", data, "--import", "lab_empty"
    )
    assert "--import: wanted the name of a module, got 'a/b.py'" in fails("evaluate", "run", data, "--import", "a/b.py")
    assert "got nothing (ModuleNotFoundError" in fails("predict", "run", data, "--out", "x", "--import", "nothing")
    padim = ARCHITECTURES["padim"]
    recontrast.register_architecture("lab_x:A", padim)
    recontrast.register_architecture("lab_x:A", padim)  # the same again
    with pytest.raises(ValueError, match="wanted one that is not taken, got 'lab_x:A'"):
        recontrast.register_architecture("lab_x:A", ARCHITECTURES["patchcore"])
    with pytest.raises(ValueError, match=r"lab_x:B: wanted a recontrast\.Architecture, got dict"):
        recontrast.register_architecture("lab_x:B", {})
    assert "--architecture: wanted one of your own as MODULE:NAME, got 'patchcore'" in fails(
        "reproduce", "mvtec", "--data", data, "--out", "run", "--architecture", "patchcore"
    )


def test_options_and_fields_of_recipes():
    """Options are completed by the defaults of the architecture, checked, stored, and belong to it alone."""
    network = Architecture(None, None, None, fit=print, fields=("levels",), options={"a": 1, "b": 0.5, "c": (1, 2)})
    recontrast.register_architecture("lab_x:A", network)
    recipe = Recipe(architecture="lab_x:A", levels=(1, 3))
    assert dict(recipe.options) == {"a": 1, "b": 0.5, "c": (1, 2)} and not recipe.uses_steps
    changed = recipe.replace(**{"options.b": 2, "options.c": [3]})
    assert dict(changed.options) == {"a": 1, "b": 2.0, "c": (3,)}
    assert Recipe.from_dict(json.loads(json.dumps(changed.to_dict()))) == changed
    assert changed.replace(architecture="patchcore").options == {}
    assert pickle.loads(pickle.dumps(changed)) == changed and hash(changed) != hash(recipe)
    for change, text in (
        ({"options": {"d": 1}}, "options: wanted options among a, b, c, got 'd'"),
        ({"options.a": 1.5}, r"options: a: wanted a value such as 1, got 1\.5"),
        ({"options.b": "x"}, r"options: b: wanted a value such as 0\.5, got 'x'"),
        ({"options.a": [[1]]}, "options: wanted options by name, with texts, numbers"),
        ({"jitter": 3.0}, "jitter: wanted the default for architecture 'lab_x:A', which does not have it"),
    ):
        with pytest.raises(ValueError, match=f"^recipe 'mvtec': {text}"):
            recipe.replace(**change)
    with pytest.raises(ValueError, match="options: wanted none for architecture 'recontrast', got 'a'"):
        Recipe(options={"a": 1})
    foreign = Recipe(architecture="lab_y:B", options={"z": [1, "x", None]}, jitter=3.0)
    assert dict(foreign.options) == {"z": (1, "x", None)}, "kept as they are: its module is not imported"
    with pytest.raises(ValueError, match="wanted an architecture that is imported, got 'lab_y:B'"):
        get_architecture(foreign)


def test_config_of_any_form(data, folder):
    """Arguments of a user's class may have names that classes of the package use for other types."""
    source = EXAMPLE.read_text().replace("noise: float", "features: object = None, noise: float")
    source = source.replace('"noise": noise}', '"noise": noise, "features": [64, "x"], "levels": "all"}')
    source = source.replace("width: int = 32,", "width: int = 32, levels: object = None,")
    (folder / "lab_config.py").write_text(source)
    works("train", data, *TINY, *ON_CPU, "--architecture", "lab_config:TINY", "--out", "run", "--no-evaluate")
    assert recontrast.load("run", "cpu").model.config["features"] == [64, "x"]


def test_numbers_of_the_example(data, folder):
    """Its rule equals a restatement in float64 and averages to 1; its loss, map and gradient follow from it."""
    recontrast.import_architectures("own_architecture")
    example = sys.modules["own_architecture"]
    torch.manual_seed(0)
    distances = torch.rand(3, 5, 7) * 2
    weights = example.Softmax(4.0)(distances, distances)
    scaled = np.exp(4.0 * distances.double().numpy())
    np.testing.assert_allclose(weights.numpy(), scaled * scaled.size / scaled.sum(), rtol=1e-5)
    assert weights.mean().item() == pytest.approx(1, rel=1e-5)
    network = example.TinyReconstruction("test_resnet", weights="random").eval()
    images = torch.rand(2, 3, 64, 64)
    pairs, (maps, scores) = network(images), network.distances(images)
    assert scores is None and [m.shape[1:] for m in maps] == [pair[0].shape[2:] for pair in pairs]
    for (teacher, student), values in zip(pairs, maps, strict=True):
        t, s = teacher.double(), student.double()
        cosine = (t * s).sum(1) / (t.norm(dim=1) * s.norm(dim=1)).clamp_min(1e-12)
        torch.testing.assert_close(values.double(), 1 - cosine, rtol=1e-4, atol=1e-5)
    recipe = Recipe(architecture="own_architecture:TINY")
    loss = example.compute_loss(pairs, recipe, 0.0, None)
    flat = [(t.double().flatten(1), s.double().flatten(1)) for t, s in pairs]
    expected = sum((1 - torch.cosine_similarity(t, s, dim=1)).mean() for t, s in flat)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    trained = recontrast.train(
        data, "run", architecture="own_architecture:TINY", backbone="test_resnet", weights="random", size=64, steps=30,
        batch=4, device="cpu", log_every=1,
    )  # fmt: skip
    losses = [json.loads(line)["loss"] for line in (trained.path.parent / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.9 * losses[0], losses


def test_ray_workers_import_what_the_caller_imported(data, folder):
    """The modules travel by name; a worker without them says what is missing."""
    from recontrast.app.prediction.ray_predict import Worker

    works("train", data, *TINY, *ON_CPU, "--architecture", "own_architecture:TINY", "--out", "run", "--no-evaluate")
    assert registration.list_imported() == ["own_architecture"]
    options = {"folder": folder, "batch": 2, "device": "cpu", "identity": "", "threshold": None, "rate": None}
    forget_example()
    parts = {"name": ["part"], "paths": [[]]}
    without = Worker(1, checkpoint=folder / "run/checkpoint.pt", modules=[], **options)(parts)
    assert "wanted an architecture that is imported" in without["error"][0]
    with_module = Worker(1, checkpoint=folder / "run/checkpoint.pt", modules=["own_architecture"], **options)
    with_module._load(**with_module.settings)
    assert with_module.detector.recipe.architecture == "own_architecture:TINY"
