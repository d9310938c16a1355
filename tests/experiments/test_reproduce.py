import csv
import json
import os

import pytest
from command_line import fails, works
from tiny import tiny_set

from recontrast.data.temporary import FOLDER_LOCK
from recontrast.evaluation.results import METRICS
from recontrast.experiments import paper_tables, published_numbers, reproduce
from recontrast.experiments.comparison import Comparison, Line
from recontrast.experiments.paper_tables import TABLES
from recontrast.recipes import yaml_file
from recontrast.recipes.paper import RECIPES

CHANGES = {"backbone": "test_resnet", "weights": "random", "size": 32, "batch": 4, "steps": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for seed, name in enumerate(("grid", "screw")):
        tiny_set(root, name, train=4, good=2, defects=2, seed=seed)
    return root


def run(name, data, out, calls=None, **more):
    """Reproduce a table with tiny runs, and append each activity to ``calls``."""
    record = None if calls is None else lambda activity, *_: calls.append(activity)
    if name in TABLES and any(entry.recipe for entry in TABLES[name].entries):
        more = {"entries": ["ours"], **more}
    return reproduce.reproduce(name, data, out, on_step=record, device="cpu", **{"changes": CHANGES, **more})


def line(comparison, entry, category, metric="i_auroc"):
    (match,) = (x for x in comparison.lines if (x.entry, x.category, x.metric) == (entry, category, metric))
    return match


# ---- numbers and tables ------------------------------------------------------------


@pytest.mark.parametrize("name", ["MVTEC", "VISA"])
def test_published_means_equal_the_means_over_categories(name):
    """Detects numbers that were copied wrongly: the logs round each number to four digits."""
    numbers = dict(getattr(published_numbers, name))
    mean = numbers.pop("mean")
    for metric, value in mean.items():
        assert sum(row[metric] for row in numbers.values()) / len(numbers) == pytest.approx(value, abs=1e-4)
    assert len(numbers) == {"MVTEC": 15, "VISA": 12}[name]


def test_tables_are_consistent():
    assert set(published_numbers.ABLATION) == set(published_numbers.ABLATION_APTOS) == set(paper_tables.ABLATION)
    assert (
        published_numbers.ABLATION["ours"]["i_auroc"]
        == published_numbers.MVTEC["mean"]["i_auroc"]
        == published_numbers.ALPHA["1"]["i_auroc"]
    )
    assert published_numbers.MAPS["both"] == published_numbers.ALPHA["1"]
    assert published_numbers.MAPS_APTOS["both"]["i_auroc"] == published_numbers.MEDICAL["aptos"]["i_auroc"] == 0.9751
    for name, table in TABLES.items():
        names = [entry.name for entry in table.entries]
        assert len(set(names)) == len(names) and all("/" not in n for n in names), name
        assert all((entry.trained_as or entry.name) in names for entry in table.entries)
        for entry in table.entries:
            assert "mean" in entry.numbers
            assert {metric for numbers in entry.numbers.values() for metric in numbers} <= set(METRICS)
            RECIPES[table.recipe].replace(**entry.changes, **entry.evaluation)
        of = RECIPES[table.recipe]
        assert set(table.categories) <= {*of.bn_train_categories, *of.bn_eval_categories} or of.encoder_bn != "auto"


# ---- runs ------------------------------------------------------------------------------


def test_table_by_category_and_seed(data, tmp_path):
    calls = []
    comparison = run("mvtec", data, tmp_path, calls, seeds=[1, 2], categories=["screw"])
    assert {c.split(" ", 1)[1] for c in calls} == {"ours screw seed 1", "ours screw seed 2"}
    screw = line(comparison, "ours", "screw")
    assert (screw.seeds, screw.paper, len(comparison.lines)) == (2, 0.9795, 3)
    rows = [json.loads((tmp_path / f"ours/screw/seed-{s}/results.json").read_text())["rows"][0] for s in (1, 2)]
    assert screw.ours == pytest.approx((rows[0]["i_auroc"] + rows[1]["i_auroc"]) / 2)
    assert screw.spread == pytest.approx(abs(rows[0]["i_auroc"] - rows[1]["i_auroc"]) / 2**0.5)
    assert screw.difference == pytest.approx(screw.ours - 0.9795)
    folder = tmp_path / "ours" / "screw" / "seed-1"
    assert sorted(p.name for p in folder.iterdir()) == [
        "log.jsonl", "recipe.yaml", "results.csv", "results.json", "results.md", "scores.csv",
    ]  # fmt: skip

    calls.clear()
    both = run("mvtec", data, tmp_path, calls, seeds=[2])  # finished runs are skipped
    assert {c.split(" ", 1)[1] for c in calls} == {"ours grid seed 2"}
    mean = line(both, "ours", "mean", "p_auroc")
    assert mean.paper == pytest.approx((0.9921 + 0.9957) / 2)  # the paper's mean over the same two
    assert mean.ours == pytest.approx((line(both, "ours", "grid", "p_auroc").ours
                                       + line(both, "ours", "screw", "p_auroc").ours) / 2)  # fmt: skip
    calls.clear()
    assert run("mvtec", data, tmp_path, calls, seeds=[2]).lines == both.lines and not calls

    text = (tmp_path / "comparison.md").read_text()
    assert "| entry | category | I-AUROC | paper | diff | P-AUROC |" in text
    assert "Not the paper's settings: backbone test_resnet" in text and "2 of the 2 categories are among" in text
    assert json.loads((tmp_path / "comparison.json").read_text())["lines"][0]["category"] == "grid"
    with (tmp_path / "comparison.csv").open() as file:
        assert [row["metric"] for row in csv.DictReader(file)][:3] == ["i_auroc", "p_auroc", "aupro_per_image"]


@pytest.mark.parametrize(("name", "rivals"), [("mvtec", ["patchcore", "padim"]), ("visa_unified", ["uniad"])])
def test_rivals_run_beside_ours(data, tmp_path, name, rivals):
    changes = {**CHANGES, "factor": 0.5, "decoder": "mirror"}  # of ReContrast alone
    categories = ["screw"] if name == "mvtec" else []
    comparison = run(name, data, tmp_path, entries=["ours", *rivals], changes=changes, categories=categories)
    assert list(dict.fromkeys(x.entry for x in comparison.lines)) == ["ours", *rivals]
    for rival in rivals:
        assert line(comparison, rival, "mean", "p_auroc").ours is not None
        folder = tmp_path / rival / ("screw" if name == "mvtec" else "all")
        (recipe,) = folder.glob("seed-*/recipe.yaml")
        recipe = yaml_file.read_recipe(recipe)
        assert recipe.architecture == rival and recipe.size == 32 and recipe.decoder == "auto"
    assert any("their own recipes" in note or "UniAD" in note for note in comparison.notes)


def test_interrupted_run_is_resumed(data, tmp_path):
    def interrupt(activity, done, *_):
        if activity.startswith("train ours screw") and done == 1:
            raise KeyboardInterrupt

    changes = {**CHANGES, "log_every": 1}
    with pytest.raises(KeyboardInterrupt):
        reproduce.reproduce("mvtec", data, tmp_path, changes=changes, device="cpu", on_step=interrupt, entries=["ours"])
    assert (tmp_path / "ours/grid/seed-111/results.json").exists()
    assert (tmp_path / "ours/screw/seed-111/checkpoint.pt").exists()
    steps = []
    run("mvtec", data, tmp_path, changes=changes, keep=True)
    assert (tmp_path / "ours/screw/seed-111/checkpoint.pt").exists()
    log = (tmp_path / "ours/screw/seed-111/log.jsonl").read_text().splitlines()
    assert [json.loads(text)["step"] for text in log] == [1, 2] and not steps


def test_one_detector_for_all_categories(data, tmp_path):
    calls = []
    comparison = run("visa_unified", data, tmp_path, calls)
    assert {c for c in calls if c.startswith("train")} == {"train ours all seed 1"}
    assert [x.category for x in comparison.lines if x.metric == "p_ap"] == ["grid", "screw", "mean"]
    assert line(comparison, "ours", "mean").paper is None  # published for other categories
    assert "results.json" in {p.name for p in (tmp_path / "ours/all/seed-1").iterdir()}


def test_entries_by_views_share_one_training(data, tmp_path):
    calls = []
    comparison = run("maps", data / "grid", tmp_path, calls)
    assert [c for c in calls if c.startswith("train")] == ["train both grid seed 111"]
    assert [x.entry for x in comparison.lines] == ["frozen", "trained", "both"]
    thresholds = [
        json.loads((tmp_path / f"{e}/grid/seed-111/results.json").read_text())["rows"][0]["p_threshold"]
        for e in ("frozen", "trained", "both")
    ]
    assert len(set(thresholds)) == 3
    calls.clear()
    (tmp_path / "trained/grid/seed-111/results.json").unlink()  # its model was deleted, so it is trained again
    run("maps", data / "grid", tmp_path, calls)
    assert {c.split()[0] for c in calls} == {"train", "evaluate"}


def test_selected_entries(data, tmp_path):
    comparison = run("ablation", data / "grid", tmp_path, entries=["A", "ours"])
    assert [x.entry for x in comparison.lines] == ["A", "A", "ours", "ours"]
    assert all(x.ours is not None and x.paper is None for x in comparison.lines)
    aptos = run("ablation_aptos", data / "grid", tmp_path / "other", entries=["D"])
    assert line(aptos, "D", "mean").paper == 0.9306  # the only category may have any name
    isic = run("isic2018", data / "grid", tmp_path / "isic", changes={**CHANGES, "size": 64, "crop": 32})
    assert [(x.metric, x.paper) for x in isic.lines] == [("i_auroc", 0.9015), ("i_f1", 0.8112), ("i_accuracy", 0.8601)]
    assert all(x.ours is not None for x in isic.lines)


def test_lines_for_numbers_of_shots(data, tmp_path):
    """One line for each number of shots and augmentation, with means and deviations over seeds."""
    calls = []
    vary = {"shots": [1, 4], "augment": ["none", "flips"]}
    comparison = run("mvtec", data, tmp_path, calls, categories=["grid"], seeds=[1, 2], vary=vary)
    names = [f"ours-shots={shots}-augment={augment}" for shots in (1, 4) for augment in ("none", "flips")]
    assert list(dict.fromkeys(line.entry for line in comparison.lines)) == names
    assert {call.split()[1] for call in calls} == set(names) and len({tuple(call.split()) for call in calls}) >= 8
    assert all(x.seeds == 2 and x.spread is not None and x.paper is None for x in comparison.lines)
    assert comparison.cells()[0] == ["entry", "category", "I-AUROC", "P-AUROC", "AUPRO per image"]
    recipe = yaml_file.read_recipe(tmp_path / names[1] / "grid/seed-2/recipe.yaml")
    assert (recipe.shots, recipe.augment, recipe.seed) == (1, "flips", 2)
    calls.clear()
    run("mvtec", data, tmp_path, calls, categories=["grid"], seeds=[1, 2], vary={**vary, "shots": [4, 1]})
    assert calls == [], "finished runs are not made again"


def test_variants_of_entries_that_share_a_training(data, tmp_path):
    calls = []
    comparison = run("maps", data / "grid", tmp_path, calls, vary={"shots": [2]})
    assert {line.entry for line in comparison.lines} == {f"{name}-shots=2" for name in ("trained", "frozen", "both")}
    assert {call.split()[1] for call in calls if call.startswith("train")} == {"both-shots=2"}


def test_long_tail(data, tmp_path):
    vary = {"sampling": ["images", "classes"]}
    comparison = run("mvtec_unified", data, tmp_path, vary=vary, long_tail=4, entries=["ours"])
    assert {line.entry for line in comparison.lines} == {"ours-sampling=images", "ours-sampling=classes"}
    recipe = yaml_file.read_recipe(tmp_path / "ours-sampling=classes/all/seed-1/recipe.yaml")
    assert dict(recipe.shots) == {"grid": 4, "screw": 1} and recipe.sampling == "classes"
    assert any("shots {'grid': 4, 'screw': 1}" in note for note in comparison.notes)
    assert not any("paper.s mean" in note or "published" in note for note in comparison.notes)


# ---- errors ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, more, text",
    [
        ("mvtek", {}, "reproduce: table: wanted one of mvtec, visa, .*, got 'mvtek'"),
        ("mvtec", {"entries": ["F"]}, "reproduce: entry: wanted one of ours, patchcore, padim, got 'F'"),
        ("mvtec", {"categories": ["grit"]}, "wanted category 'grit', got grid"),
        ("aptos", {}, "wanted one category for aptos, got 2: grid, screw"),
        ("alpha", {"changes": {"alpha_end": 2.0}}, "fields that the table does not set, got alpha_end"),
        ("maps", {"changes": {"views": "both"}}, "fields that the table does not set, got views"),
        ("mvtec", {"changes": {"seed": 3}}, "fields that the table does not set, got seed"),
        ("mvtec", {"changes": {"step": 3}}, "there is no field 'step'"),
        ("mvtec", {"vary": {"seed": [1, 2]}}, "vary: wanted a field that the table does not set, got 'seed'"),
        ("mvtec", {"vary": {"shots": []}}, r"shots: wanted different values to vary, got \[\]"),
        ("mvtec", {"vary": {"shots": [2, 2]}}, r"shots: wanted different values to vary, got \[2, 2\]"),
        ("mvtec", {"vary": {"step": [1]}}, "there is no field 'step'"),
        ("mvtec", {"vary": {"steps": [1]}}, "reproduce: wanted one way to set steps, got two"),
        ("mvtec", {"vary": {"shots": [1]}, "long_tail": 4}, "reproduce: wanted one way to set shots, got two"),
        ("mvtec", {"vary": {"shots": [2, 5]}}, "shots: wanted at most the 4 good images of grid, got 5"),
        ("mvtec", {"long_tail": 0.5}, "long tail: wanted 2 classes and an imbalance of at least 1, got 2 and 0.5"),
    ],
)
def test_invalid_arguments_are_refused(data, tmp_path, name, more, text):
    with pytest.raises(ValueError, match=text) as error:
        run(name, data, tmp_path / "out", **more)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_results_of_another_recipe_or_data_set_are_refused(data, tmp_path):
    run("mvtec", data, tmp_path / "out", categories=["grid"])
    folder = tmp_path / "out/ours/grid/seed-111"
    with pytest.raises(
        ValueError, match=r"recipe.yaml: wanted the recipe of this call, got another \(steps: 2 and 3\)"
    ):
        run("mvtec", data, tmp_path / "out", categories=["grid"], changes={**CHANGES, "steps": 3})
    tiny_set(tmp_path / "more", "grid", train=4, good=3, defects=2)
    with pytest.raises(ValueError, match=r"results.json: wanted results of the test images .*'grid': 5.* got .*4"):
        run("mvtec", tmp_path / "more", tmp_path / "out")
    row = {"category": "grid", "images": 4, "defects": 2}
    wrong = [{**row, "category": []}, {**row, "images": "4"}, {**row, "i_auroc": True}, {**row, "seconds": 1}, [], {}]
    for content in ("[" * 100_000, *(f"[{json.dumps(values)}]}}" for values in wrong)):
        (folder / "results.json").write_text(f'{{\n "rows": {content}')
        with pytest.raises(ValueError, match=r"results.json: wanted the results of a run, got something else"):
            run("mvtec", data, tmp_path / "out", categories=["grid"])
    tiny_set(tmp_path / "none", "grid", train=4, good=0, defects=0)
    with pytest.raises(ValueError, match="wanted test images of grid, got none"):
        run("mvtec", tmp_path / "none", tmp_path / "other")


def test_checkpoint_goes_with_the_results(data, tmp_path, monkeypatch):
    """A call that is killed when it has written the results leaves no checkpoint, and the next one its leftovers."""

    class Killed(BaseException):
        pass

    def write(*arguments, **options):
        whole_write(*arguments, **options)
        raise Killed

    whole_write = reproduce.Result.write
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(reproduce.Result, "write", write)
        run("mvtec", data, tmp_path / "out", categories=["grid"])
    folder = tmp_path / "out/ours/grid/seed-111"
    assert (folder / "results.json").exists() and not (folder / "checkpoint.pt").exists()
    left = folder / ".recontrast-0123456789abcdef.tmp"
    left.mkdir()
    (left / FOLDER_LOCK).touch()  # Windows locks a file in it
    os.utime(left / FOLDER_LOCK, (0, 0))
    run("mvtec", data, tmp_path / "out", categories=["grid"])
    assert not list(folder.glob(".*"))


def test_cells_in_percent_and_missing_values():
    lines = [Line("a", "x", "i_auroc", 2, 0.5, 0.01, 0.75), Line("a", "x", "i_accuracy", 0, None, None, 0.9)]
    comparison = Comparison("t", "T", lines, ["Note."])
    assert comparison.cells() == (
        ["entry", "category", "I-AUROC", "paper", "diff", "I-ACC", "paper", "diff"],
        [["a", "x", "50.00 ± 1.00", "75.00", "-25.00", "-", "90.00", "-"]],
    )
    assert comparison.to_markdown().endswith("Note.\n")
    unpublished = Comparison("t", "T", [Line("a", "x", "i_auroc", 2, 0.5, 0.01, None)], [])
    assert unpublished.cells() == (["entry", "category", "I-AUROC"], [["a", "x", "50.00 ± 1.00"]])


# ---- the command -------------------------------------------------------------------------


def test_command(data, tmp_path):
    options = [text for key, value in CHANGES.items() for text in ("--set", f"{key}={value}")]
    output = works(
        "reproduce",
        "mvtec",
        "--data",
        data,
        "--out",
        tmp_path,
        "--categories",
        "grid,",
        "--seeds",
        "7",
        "--entries",
        "ours",
        *options,
    )
    assert "I-AUROC" in output and "Recipe mvtec, seed 7." in output and str(tmp_path / "comparison.md") in output
    assert "wanted one of mvtec" in fails("reproduce", "mvtek", "--data", data)
    assert "--seeds: wanted comma-separated integers, got '1,a'" in fails(
        "reproduce", "mvtec", "--data", data, "--seeds", "1,a"
    )


def test_train_from_yaml_with_tensorboard(data, tmp_path):
    (tmp_path / "mine.yaml").write_text("base: mvtec_stable\n" + "".join(f"{k}: {v}\n" for k, v in CHANGES.items()))
    arguments = ["train", data / "grid", "--recipe", tmp_path / "mine.yaml", "--no-evaluate"]
    works(*arguments, "--out", tmp_path / "run", "--tensorboard", "--device", "cpu", "--set", "log_every=1")
    text = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "rest: 99" in text and "steps: 2" in text
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    (tmp_path / "mine.yaml").write_text("steps: [")
    assert f"{tmp_path / 'mine.yaml'}, line 1: wanted a recipe in YAML" in fails(*arguments, "--out", tmp_path / "b")
    (tmp_path / "mine.yaml").write_text("stepz: 3")
    assert "there is no field 'stepz' (did you mean steps?)" in fails(*arguments, "--out", tmp_path / "b")
    assert "nowhere.yaml: wanted a recipe in YAML, got no such file" in fails(
        "train", data / "grid", "--recipe", "nowhere.yaml"
    )
    too_large = ["--recipe", "mvtec_stable", "--set", "batch=9", "--set", "weights=random", "--backbone", "test_resnet"]
    assert "batch: wanted at most the 4 training images, got 9" in fails("train", data / "grid", *too_large)
