"""Comma-separated values that were separated by spaces: the message says how to write them."""

import pytest
from command_line import fails

from recontrast.app.comma_separated import check_data, describe_spaces
from recontrast.export.export import NEEDS


@pytest.mark.parametrize(
    ("words", "joined"),
    [
        (["nothing", "--methods", "patchcore", "rd4ad"], "patchcore,rd4ad"),
        (["--methods", "patchcore,", "padim", "lab:REBUILD", "nothing"], "patchcore,padim,lab:REBUILD"),
        (["nothing", "uniad"], "uniad"),  # without the option
    ],
)
def test_methods(words, joined, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = next(word for word in words if word in ("rd4ad", "padim", "uniad"))
    assert fails("compare", *words) == (
        f"recontrast: {first}: wanted a data set, got a value of --methods, which takes comma-separated names: "
        f"--methods {joined}"
    )


def test_a_folder_with_the_name_of_a_method_is_a_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "padim").mkdir()
    assert fails("compare", "padim", "--methods", "patchcore").startswith(
        "recontrast: padim: wanted a folder with image files"
    )


@pytest.mark.parametrize("command", ["train", "compare"])
def test_shots_by_class(command):
    text = fails(command, "--shots", "screw=4", "tile=16", "nothing")
    assert text.endswith("which takes comma-separated numbers: --shots screw=4,tile=16")


@pytest.mark.parametrize(
    ("words", "joined"),
    [
        (["reproduce", "mvtec", "--data", "d", "--seeds", "1", "11", "111"], "--seeds 1,11,111"),
        (["reproduce", "--shots=1", "2", "mvtec", "--data", "d"], "--shots 1,2"),
        (["reproduce", "ablation", "--entries", "A", "E", "--data", "d"], "--entries A,E"),
        (["reproduce", "--categories", "screw", "grid", "mvtec", "--data", "d"], "--categories screw,grid"),
        (["reproduce", "mvtec", "--data", "d", "--vary", "steps=1", "2", "--vary", "seed=3"], "--vary steps=1,2"),
        (["benchmark", "run", "--batches", "1", "16"], "--batches 1,16"),
        (["benchmark", "--formats", "onnx", "openvino", "run"], "--formats onnx,openvino"),
    ],
)
def test_too_many_arguments(words, joined):
    option = joined.split()[0]
    kind = {"--vary": "values", "--entries": "names", "--categories": "names", "--formats": "names"}.get(option)
    got = words[words.index(option) + 2] if option in words else "2"
    assert fails(*words) == (
        f"recontrast: {got}: wanted an option, got a value of {option}, which takes comma-separated "
        f"{kind or 'numbers'}: {joined}"
    )


def test_other_arguments_keep_their_message():
    text = fails("benchmark", "run", "--batches", "1", "more")
    assert text.startswith("recontrast: benchmark: got unexpected extra argument") and "--batches" not in text
    assert describe_spaces(["--batches", "1", "16"], ["--seeds"]) is None  # an option of another command
    assert all(describe_spaces(["--formats", "onnx", kind], ["--formats"]) for kind in NEEDS)
    check_data([], "--methods", "padim", "names", lambda word: True)
