"""Messages, tables and the syntax of the command line."""

import errno
import os
import re
from typing import get_type_hints

import numpy as np
import pytest
import torch
from command_line import call, fails, works
from rich.cells import cell_len

from recontrast.app import console, environment, options, progress_bar, tables
from recontrast.app.cli import app
from recontrast.evaluation.results import Result, Row
from recontrast.runtime.device import resolve_device

COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands]


# ---- tables ------------------------------------------------------------------


def make_result(categories):
    metrics = ("i_auroc", "i_ap", "i_f1", "i_accuracy", "p_auroc", "p_ap", "p_f1", "aupro", "aupro_per_image")
    values = {metric: 0.1 * index + 0.01234 if index else 1.0 for index, metric in enumerate(metrics)}
    rows = [Row(name, 8, 4, **values) for name in categories]
    return Result(rows, "mvtec", (256, 256), "max", None, "sum", "any")


def print_on_terminal(monkeypatch, capsys, width, call):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    call()
    return re.sub("\x1b\\[[0-9;]*m", "", capsys.readouterr().out)


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120, 200])
@pytest.mark.parametrize("categories", [["bottle", "screw"], ["a category with a long name " * 4, "部品" * 20]])
def test_numbers_are_never_cut(monkeypatch, capsys, width, categories):
    result = make_result(categories)
    text = print_on_terminal(monkeypatch, capsys, width, lambda: tables.print_result(result))
    for number in ("100.00", *(f"{10 * index + 1.234:.2f}" for index in range(1, 9))):
        assert text.count(number) == 3, number  # two categories and their mean
    assert "…" not in text and all(name in text for name in ("I-AUROC", "AUPRO per image"))
    if width >= 40:
        assert max(map(cell_len, text.splitlines())) <= width


def test_table_in_a_pipe_is_one_part(capsys):
    tables.print_result(make_result(["bottle" * 40, "screw"]))
    text = capsys.readouterr().out
    assert text.count("category") == 1 and "bottle" * 40 in text and text.count("100.00") == 3


@pytest.mark.parametrize(
    "name", ["[/b]", "[red]part[/red]", "a\nb", "\x1b[31mred", os.fsdecode(b"caf\xe9"), "\u202egnp"]
)
def test_names_in_tables_are_plain_text(monkeypatch, capsys, name):
    result = make_result([name])
    for text in (
        print_on_terminal(monkeypatch, capsys, 120, lambda: tables.print_result(result, title=name)),
        print_on_terminal(monkeypatch, capsys, 40, lambda: tables.print_result(result, title=name)),
    ):
        assert console.make_printable(name) in text and "100.00" in text
        text.encode()


def test_progress_of_a_name_with_markup(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar.ProgressBar("train [/b]") as progress:
        progress(1, 2, "[/red] \x1b[2J")
    shown = capsys.readouterr().err
    assert "train [/b]" in shown and "[/red] \\x1b[2J" in shown


# ---- messages ----------------------------------------------------------------


def test_control_characters_are_escaped(capsys):
    console.print_error(f"{os.fsdecode(b'caf' + bytes([0xE9]))}\r\n\x1b[31m.png: wanted an image")
    assert capsys.readouterr().err == "recontrast: caf\\xe9 \\x1b[31m.png: wanted an image\n"
    assert console.make_printable("täglich 部品 👩‍🔧") == "täglich 部品 👩‍🔧"


def test_long_messages_are_shortened(capsys):
    console.print_error("x" * 10**6)
    assert len(capsys.readouterr().err) < 2000


@pytest.mark.parametrize(
    "make_error",
    [
        lambda: torch.empty(10**15),
        lambda: np.empty(10**15, np.float64),
        lambda: bytearray(10**18),
        lambda: (_ for _ in ()).throw(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))),
        lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
        lambda: (_ for _ in ()).throw(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")),
    ],
)
def test_memory_errors_say_what_to_reduce(monkeypatch, make_error):
    monkeypatch.setattr(environment, "describe_environment", lambda: next(make_error()))
    message = fails("info")
    assert message.startswith("recontrast: out of memory") and ": try " in message


def test_advice_names_options_of_the_command(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("recontrast.app.calibrate_job.open_target", fail)
    message = fails("calibrate", tmp_path, "--good", tmp_path)
    assert message == "recontrast: out of memory on the GPU: try a smaller --batch"


def test_other_runtime_errors_are_not_taken_for_memory_errors(monkeypatch):
    monkeypatch.setattr(environment, "describe_environment", lambda: torch.ones(2) @ torch.ones(3))
    assert isinstance(call("info").exception, RuntimeError)


# ---- syntax ------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["bake"], "no such command 'bake' (see recontrast --help)"),
        (["--bake"], "no such option: --bake (see recontrast --help)"),
        (["info", "--bake"], "info: no such option: --bake (see recontrast info --help)"),
        (["train"], "train: missing argument 'DATA' (see recontrast train --help)"),
        (["predict", "a", "b"], "predict: missing option '--out' (see recontrast predict --help)"),
        (["train", "a", "--steps", "many"], "--steps: wanted a valid integer, got "),
        (["train", "a", "--holdout", "some"], "--holdout: wanted a valid "),
        (["train", "a", "--out", ""], "--out: wanted a path, got an empty text"),
        (["train", ""], "DATA: wanted a path, got an empty text"),
        (["train", "a\0b"], "DATA: wanted a path, got a null byte in a\\x00b"),
    ],
)
def test_usage_errors_are_one_sentence(arguments, message):
    assert fails(*arguments).startswith(f"recontrast: {message}")


def test_every_command_gives_help_and_takes_paths_of_one_kind():
    for name in COMMANDS:
        assert "Usage:" in works(name, "--help")
    for command in app.registered_commands:
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            if "pathlib" in str(hint):
                assert "parse_path" in str(vars(hint.__metadata__[0])), f"{command.callback.__name__} {name}"


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert options.parse_path("~/runs") == tmp_path / "runs" and options.parse_path("a~") == options.Path("a~")
    assert options.expand_home("~/recipe.yaml") == str(tmp_path / "recipe.yaml")
    assert options.parse_change("weights=~/backbone.pth") == ("weights", str(tmp_path / "backbone.pth"))
    message = fails("report", "~/runs/mine")
    assert str(tmp_path / "runs" / "mine") in message


@pytest.mark.parametrize(
    "device", ["mps", "xpu", "meta", "nonsense", "cuda:99", "cpu:7", "", "hip", "vulkan", "cuda:-1"]
)
def test_unusable_devices_are_one_sentence(tmp_path, device):
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has the device")
    for command in (
        ["predict", tmp_path, tmp_path, "--out", tmp_path / "out"],
        ["predict", tmp_path / "detector.onnx", tmp_path, "--out", tmp_path / "out"],
        ["evaluate", tmp_path, tmp_path],
    ):
        message = fails(*command, "--device", device)
        assert message.startswith("recontrast: device: wanted ") and message.endswith(
            (f"got {device!r}", "which cannot run this model")
        )
    with pytest.raises(ValueError, match="device: wanted"):
        resolve_device(device)


@pytest.mark.parametrize(("rank", "printed"), [("0", "recontrast: warning: dark\n"), ("1", "")])
def test_warnings_are_printed_by_one_process(rank, printed, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    console.print_warning("dark")
    assert capsys.readouterr().err == printed
