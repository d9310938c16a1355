"""`recontrast compare`: several methods on the same images, their tables, page and recommendation."""

import csv
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

from recontrast.app.compare import run as compare_run
from recontrast.app.compare.gallery import select_differing
from recontrast.app.compare.recommend import recommend
from recontrast.app.compare.record import MethodResult
from recontrast.app.compare.unlabelled import (
    compute_agreement,
    compute_separation,
    count_false_alarms,
    paste_patch,
    rank_scores,
)
from recontrast.inference.detector import open_detector
from tests.command_line import call, fails, works
from tests.tiny import tiny_set

SMALL = ("--backbone", "test_resnet", "--weights", "random", "--size", "64", "--batch", "4", "--steps", "1",
         "--device", "cpu")  # fmt: skip
QUICK = ("--methods", "padim,patchcore", *SMALL)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    tiny_set(root, train=20)
    return root / "nut"


@pytest.fixture(scope="module")
def labelled(data, tmp_path_factory):
    """Folder of a comparison with labels and masks, and what the command printed."""
    out = tmp_path_factory.mktemp("out") / "labelled"
    return out, works("compare", data, *QUICK, "--holdout", 0.4, "--out", out)


def read_json(out):
    return json.loads((out / "compare.json").read_text())


def test_tables_have_every_measure(labelled):
    out, printed = labelled
    content = read_json(out)
    assert content["compared"] == ["padim", "patchcore"] and content["category"] == "nut"
    for method in content["methods"]:
        assert set(method["metrics"]) >= {"i_auroc", "i_ap", "p_auroc", "p_ap", "aupro"}
        assert method["images"] == 6 and method["defects"] == 3 and method["error"] is None
        assert method["train_seconds"] > 0 and method["image_seconds"] > 0
        assert method["train_memory"] > 1e8 and method["image_memory"] > 1e8
        assert method["file_bytes"] == (out / method["method"] / "checkpoint.pt").stat().st_size
        assert 0 <= method["separation"] <= 1 and method["false_alarms"][1] == 8
        assert method["decided"]["good"] == 3
        assert -1 <= method["agreement"] <= 1
    assert content["agreement_images"] == 14  # of the test and held out
    with (out / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["padim", "patchcore"]
    for row, method in zip(rows, content["methods"], strict=True):
        assert float(row["aupro"]) == pytest.approx(method["metrics"]["aupro"])
    assert "I-AUROC" in printed and f"{100 * content['methods'][0]['metrics']['aupro']:.1f}" in printed
    assert (out / "compare.md").read_text().count("\n| pa") == 2


def test_metrics_are_those_of_evaluate(labelled, data, tmp_path):
    out, _ = labelled
    works("evaluate", out / "padim", data, "--out", tmp_path, "--device", "cpu", "--batch", 4)
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    metrics = read_json(out)["methods"][0]["metrics"]
    assert all(row[name] == pytest.approx(value, rel=1e-6) for name, value in metrics.items())


def test_recommendation_has_the_highest_mean(labelled):
    out, printed = labelled
    content = read_json(out)
    names = ("i_auroc", "i_ap", "p_auroc", "p_ap", "aupro")
    means = {m["method"]: np.mean([m["metrics"][name] for name in names]) for m in content["methods"]}
    recommendation = content["recommendation"]
    assert recommendation["rule"] == "metrics" and means[recommendation["method"]] == max(means.values())
    assert f"recommended: {recommendation['method']}: the highest mean of I-AUROC" in printed


def test_runs_are_ordinary_runs(labelled, data, tmp_path):
    out, _ = labelled
    works("predict", out / "patchcore", data / "test", "--out", tmp_path / "p", "--device", "cpu")
    assert open_detector(out / "padim" / "checkpoint.pt", "cpu").calibration.count == 8


def test_page_is_one_file(labelled):
    out, _ = labelled
    page = (out / "compare.html").read_text()
    assert len(re.findall(r"<li>", page)) == len(read_json(out)["differing_images"]) > 0
    sources = re.findall(r'(?:src|href)="([^"#]*)"', page)
    assert sources and all(source.startswith("data:") for source in sources)
    assert page.count("data:image/webp") == 3 * len(read_json(out)["differing_images"])  # photograph, two heat maps


def test_page_fits_phones_and_desks(labelled):
    """The page needs no sideways scrolling, in light and dark."""
    from browser import browser, open_page

    with browser() as window:
        for width, scheme in ((360, "dark"), (1200, "light")):
            open_page(window, labelled[0] / "compare.html", width=width, scheme=scheme)
            assert window.execute_script("return document.documentElement.scrollWidth") <= width
            broken = "return [...document.images].filter(i => i.complete && !i.naturalWidth).length"
            assert window.execute_script(broken) == 0
            assert [line for line in window.get_log("browser") if line["level"] in ("SEVERE", "WARNING")] == []


def test_second_call_trains_nothing(labelled, data, monkeypatch):
    out, printed = labelled
    monkeypatch.setattr(compare_run, "run_job", None)
    assert works("compare", data, *QUICK, "--holdout", 0.4, "--out", out) == printed


def test_interrupted_comparison_says_so(labelled, data, tmp_path, monkeypatch):
    """Tables never lie beside runs that they do not describe."""
    out, mark = tmp_path / "copy", tmp_path / "copy" / "unfinished-compare.json"
    shutil.copytree(labelled[0], out)
    arguments = ("compare", data, *QUICK, "--seed", 5, "--holdout", 0.4, "--out", out, "--overwrite")

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    for name in ("run_job", "measure_method"):
        with monkeypatch.context() as patch:
            patch.setattr(compare_run, name, interrupt)
            assert call(*arguments).exit_code == 130
        assert mark.exists() and not list(out.glob("compare.*"))
    works(*arguments)
    assert not mark.exists() and read_json(out)["compared"] == ["padim", "patchcore"]


def test_other_settings_are_refused_without_overwrite(labelled, data, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(labelled[0], out)
    options = ("--methods", "padim", *SMALL, "--seed", 5, "--holdout", 0.4, "--out", out)
    assert "wanted a run of this comparison, got one with seed 111 instead of 5" in fails("compare", data, *options)
    works("compare", data, *options, "--overwrite")
    assert open_detector(out / "padim" / "checkpoint.pt", "cpu").recipe.seed == 5


def test_without_labels(data, tmp_path):
    """Good images alone: held-out images decide, and unlabelled ones are compared as well."""
    out = tmp_path / "out"
    printed = works("compare", data / "train" / "good", *QUICK, "--images", data / "test", "--out", out)
    content = read_json(out)
    assert content["recommendation"]["rule"] == "separation" and "artificial defect" in printed
    assert content["agreement_images"] == 10 and not any(method["metrics"] for method in content["methods"])
    assert all(method["false_alarms"][1:] == [4, pytest.approx(1 / 3)] for method in content["methods"])
    assert "I-AUROC" not in printed and "without label" in (out / "compare.html").read_text()


def test_without_any_held_out_image(data, tmp_path):
    options = ("--methods", "padim", *SMALL, "--holdout", 0, "--out", tmp_path / "out")
    assert "the shortest time for an image" in works("compare", data / "train" / "good", *options)
    assert read_json(tmp_path / "out")["recommendation"]["rule"] == "cost"


def test_few_shots_without_labels(data, tmp_path):
    """Of four images none is held out, though the folder has twenty."""
    out = tmp_path / "out"
    options = ("--methods", "patchcore", *SMALL, "--shots", "4", "--out", out)
    assert "few shots: 4 good images" in works("compare", data / "train" / "good", *options)
    assert read_json(out)["recommendation"]["rule"] == "cost"


def test_without_masks(data, tmp_path):
    root = tmp_path / "nut"
    shutil.copytree(data, root)
    shutil.rmtree(root / "ground_truth")
    printed = works("compare", root, *QUICK, "--out", tmp_path / "out")
    assert "highest mean of I-AUROC and I-AP on the 6" in printed and "AUPRO" not in printed


def test_error_of_one_method_keeps_the_others(data, tmp_path):
    """80 px are a multiple of the stride of PatchCore here, 16 px, and not of that of RD4AD, 32 px."""
    out = tmp_path / "out"
    options = ("--methods", "rd4ad,patchcore", *SMALL, "--size", 80, "--out", out)
    result = call("compare", data, *options)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("recontrast: ")]
    assert result.exit_code == 2 and line.startswith("recontrast: rd4ad: --size: wanted a multiple of")
    content = read_json(out)
    assert [method["error"] is None for method in content["methods"]] == [False, True]
    assert content["recommendation"]["method"] == "patchcore"
    assert "rd4ad has no results" in (out / "compare.html").read_text()


def test_interrupted_comparison_goes_on(data, tmp_path, monkeypatch):
    out, train, stopped = tmp_path / "out", compare_run.run_job, []

    def interrupt(job, **options):
        if job.recipe.architecture == "patchcore" and not stopped:
            stopped.append(job)
            raise KeyboardInterrupt
        return train(job, **options)

    monkeypatch.setattr(compare_run, "run_job", interrupt)
    result = call("compare", data, *QUICK, "--out", out)
    assert result.exit_code == 130 and "interrupted: padim complete and compared in" in result.stderr
    assert read_json(out)["compared"] == ["padim"]
    before = (out / "padim" / "checkpoint.pt").stat().st_mtime_ns
    works("compare", data, *QUICK, "--out", out)
    assert read_json(out)["compared"] == ["padim", "patchcore"]
    assert (out / "padim" / "checkpoint.pt").stat().st_mtime_ns == before


def test_training_by_steps_is_resumed(data, tmp_path, monkeypatch):
    options = ("--methods", "uniad", *SMALL, "--steps", 3, "--out", tmp_path / "out")
    train, jobs = compare_run.run_job, []

    def stop_after_a_step(job, **values):
        jobs.append(job)
        result = train(job, **values)
        if len(jobs) == 1:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(compare_run, "run_job", stop_after_a_step)
    assert "no method is complete" in fails("compare", data, *options, status=130)
    works("compare", data, *options)
    assert jobs[0].resume is None and jobs[1].resume == tmp_path / "out" / "uniad" / "checkpoint.pt"


def test_budget_is_that_of_each_training(data, tmp_path, monkeypatch):
    """The plan depends on the speed of the machine, and a second call must not make another one."""
    out = tmp_path / "out"
    options = ("--methods", "padim", *SMALL, "--budget", "60s", "--out", out)
    works("compare", data, *options)
    (method,) = read_json(out)["methods"]
    assert method["plan"].startswith("for 60 s: ") and method["train_seconds"] < 60
    assert open_detector(out / "padim" / "checkpoint.pt", "cpu").recipe.size == 64
    monkeypatch.setattr(compare_run, "run_job", None)
    works("compare", data, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--methods", "padim,yolo"), "--methods: wanted patchcore, padim, ensemble, recontrast, rd4ad, uniad, "),
        (("--methods", ","), "--methods: wanted names such as patchcore,padim, got ','"),
        (("--budget", "soon"), "--budget: wanted a duration such as 90s, 3m or 1h, got 'soon'"),
        (("--size", "0"), "size: wanted a whole number of pixels"),
        (("--device", "cuda:99"), "cuda:99"),
        (("--images", "nothing"), "nothing"),
        (("--category", "bolt"), "wanted category 'bolt'"),
        (("--shots", "21"), "shots: wanted at most the 20 good images of nut, got 21"),
        (("--shots", "few"), "--shots: wanted"),
        (("--augment", "mirror"), "augment: wanted one of"),
        (("--holdout", "1"), "holdout: wanted a share of at least 0 and below 1"),
        (("--backbone", "no_such_net"), "no_such_net"),
    ],
)  # fmt: skip
def test_bad_input(options, message, data, tmp_path):
    assert message in fails("compare", data, *QUICK, *options, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_of_others_are_kept(data, tmp_path):
    (tmp_path / "compare.html").write_text("mine")
    assert "which recontrast did not write" in fails("compare", data, *QUICK, "--out", tmp_path)
    assert (tmp_path / "compare.html").read_text() == "mine" and not (tmp_path / "padim").exists()


def test_unreadable_image_is_named(labelled, data, tmp_path):
    out, images = tmp_path / "copy", tmp_path / "images"
    shutil.copytree(labelled[0], out)
    shutil.copytree(data / "test" / "good", images)
    (images / "000.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    result = call("compare", data, *QUICK, "--holdout", 0.4, "--images", images, "--out", out)
    assert result.exit_code == 2 and result.stderr.count("000.png") == 1
    assert read_json(out)["agreement_images"] == 16


def test_images_that_failed_are_measured_again(data, tmp_path, monkeypatch):
    """A failure of the disk may be over: the file is the same, and its error would stay in the tables."""
    options = ("--methods", "padim", *SMALL, "--holdout", 0.4, "--out", tmp_path / "out")
    measure = compare_run.measure_method

    def fail(*arguments):
        return replace(measure(*arguments), image_errors=["nut/test/good/000.png: Input/output error"])

    with monkeypatch.context() as patch:
        patch.setattr(compare_run, "measure_method", fail)
        assert "Input/output error" in call("compare", data, *options).stderr
    assert "Input/output error" not in works("compare", data, *options)


def test_failed_run_keeps_no_tables_of_the_one_before(labelled, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(labelled[0], out)
    monkeypatch.setattr(compare_run, "run_job", lambda *_, **__: (_ for _ in ()).throw(OSError("the disk is full")))
    result = call("compare", data, *QUICK, "--seed", 5, "--holdout", 0.4, "--out", out, "--overwrite")
    assert result.exit_code == 2 and "padim: the disk is full" in result.stderr
    assert {path.name for path in (out / "padim").iterdir()} <= {"log.jsonl", "method.json", "recipe.yaml"}


def test_separation_of_scores():
    assert compute_separation(np.array([1.0, 2]), np.array([3.0, 4])) == 1
    assert compute_separation(np.array([1.0, 3]), np.array([2.0, 4, np.nan])) == 0.75
    assert compute_separation(np.array([np.nan]), np.array([1.0])) is None


def test_false_alarms_keep_the_promise_on_average():
    scores = np.random.default_rng(0).normal(size=(400, 40))
    alarms = [count_false_alarms(row, seed)[:2] for seed, row in enumerate(scores)]
    rate = sum(count for count, _ in alarms) / sum(images for _, images in alarms)
    assert 0.06 < rate <= 0.1
    assert count_false_alarms(np.arange(3.0)) is None


def test_agreement_is_the_rank_correlation():
    from scipy.stats import spearmanr

    scores = {name: np.random.default_rng(seed).normal(size=20).round(1) for seed, name in enumerate("abc")}
    scores["constant"] = np.ones(20)
    table = compute_agreement(scores)
    assert table["a"]["b"] == table["b"]["a"] == pytest.approx(spearmanr(scores["a"], scores["b"])[0])
    assert table["a"]["constant"] is None
    np.testing.assert_array_equal(rank_scores(np.array([5.0, 1, 5])), [0.75, 0, 0.75])


def test_images_that_differ_most_come_first():
    ranks = {"a": {"x": 0.0, "y": 0.5, "z": 1.0}, "b": {"x": 0.9, "y": 0.5, "z": 0.4}}
    assert select_differing(ranks) == ["x", "z"] and select_differing(ranks, 1) == ["x"]
    assert select_differing({"a": ranks["a"]}) == []


def test_pasted_patch_changes_a_part():
    image = np.random.default_rng(0).integers(0, 255, (64, 48, 3), np.uint8)
    changed = (paste_patch(image, 3) != image).any(-1)
    assert 0.01 < changed.mean() < 0.07
    assert (paste_patch(np.full((64, 64, 3), 128, np.uint8), 0) != 128).any()


def test_close_separations_are_decided_by_cost():
    def result(name, separation, seconds):
        return MethodResult(name, separation=separation, image_seconds=seconds, train_seconds=1.0)

    slow, fast = result("slow", 0.95, 0.2), result("fast", 0.945, 0.1)
    assert recommend([slow, fast]).method == "fast"
    assert recommend([slow, result("fast", 0.9, 0.1)]).method == "slow"
    assert recommend([MethodResult("a", error="x"), slow]).method == "slow"
    assert recommend([MethodResult("a", error="x")]) is None
