"""Property-based fuzz target for recipes, logs, descriptions and the pickles of checkpoints.

Ten minutes by hand: ``pytest -m campaign tests/campaigns/test_file_fuzz.py``. Inputs are drawn by hypothesis from parts
of valid files, and pickles are altered operation by operation, so that most of them get past the first checks. The
target of `file_fuzz`, which atheris can guide by coverage, runs here with random mutations.
"""

import pickletools
import warnings
import zipfile

import numpy as np
import pytest
import torch
from file_fuzz import Files, accept_all_checksums
from hostile import zipped
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_fuzz import mutate
from small_detectors import describe, save_checkpoint

from recontrast import checkpoint as checkpoints
from recontrast.app.prediction import journal
from recontrast.inference import onnx_file, openvino_file
from recontrast.inference.file_checks import ForeignFileError, parse_description
from recontrast.recipes.recipe import Recipe
from recontrast.recipes.yaml_file import read_recipe
from recontrast.training.json_log import read_log

PARTS = [*Recipe().to_dict(), "base", "mvtec", "true", "null", "1", "-1", "2.5", "1e-5", ".nan", "[", "]", "{", "}",
         ":", "- ", "\n", "  ", "&a ", "*a", "<<: ", "!!python/object:os.system ", "!!binary ", "|", ">", "'", '"', "#",
         "\t", "\r",
         "\0", "ä", "9" * 40, "2024-01-01", "? ", ",", ": ", "---\n", "%TAG", "0x1", "1:2:3"]  # fmt: skip


def run(count, strategy, check):
    """Draw ``count`` inputs and check each, always the same ones."""

    @settings(max_examples=count, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(strategy)
    def trial(value):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(value)

    trial()


def texts():
    words = st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=30).map("".join)
    pairs = st.lists(st.tuples(st.sampled_from(PARTS), st.sampled_from(PARTS)), max_size=8)
    lines = pairs.map(lambda rows: "\n".join(f"{key}: {value}" for key, value in rows))
    return (words | lines).map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=60)


def test_recipes(campaign, tmp_path):
    path = tmp_path / "recipe.yaml"

    def check(content):
        path.write_bytes(content)
        try:
            assert isinstance(read_recipe(path), Recipe)
        except ValueError as error:
            assert str(error).startswith(str(path)) and len(str(error)) < 2000
        campaign.passed()

    run(campaign.tries(150, 30_000), texts(), check)


def test_logs_and_descriptions(campaign, tmp_path):
    path = tmp_path / "log.jsonl"
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=8,
    )
    fields = ("format", "recontrast", "category", "top", "recipe", "calibration", "checksum")

    def check(case):
        field, value, content = case
        path.write_bytes(content)
        assert isinstance(read_log(path), list)
        try:
            parse_description(path, describe(**{field: value}))
        except ForeignFileError as error:
            assert str(error).startswith(str(path)) and len(str(error)) < 2000
        campaign.passed()

    run(campaign.tries(150, 20_000), st.tuples(st.sampled_from(fields), values, texts()), check)


@pytest.fixture
def members(tmp_path):
    """Members of the archive of a checkpoint with two small tensors as its weights."""
    content = torch.load(save_checkpoint(tmp_path / "whole.pt"), weights_only=True)
    small = dict(list(content["model"].items())[1:3])
    torch.save({**content, "model": small, "optimisers": [], "checksums": None}, tmp_path / "small.pt")
    with zipfile.ZipFile(tmp_path / "small.pt") as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def test_pickles_of_checkpoints(campaign, tmp_path, members):
    """Operations of the pickle are left out, repeated, exchanged and altered."""
    program = members["data.pkl"]
    starts = [position for _, _, position in pickletools.genops(program)]
    operations = [program[a:b] for a, b in zip(starts, [*starts[1:], len(program)], strict=True)]
    path = tmp_path / "fuzzed.pt"
    places = st.integers(0, len(operations) - 1)
    change = st.tuples(st.sampled_from(("drop", "repeat", "exchange", "alter")), places, places, st.binary(max_size=4))

    def check(changes):
        altered = list(operations)
        for kind, first, second, content in changes:
            if kind == "drop":
                altered[first] = b""
            elif kind == "repeat":
                altered[first] = altered[first] + altered[second]
            elif kind == "exchange":
                altered[first], altered[second] = altered[second], altered[first]
            else:
                altered[first] = altered[first][:1] + content + altered[first][1 + len(content) :]
        path.write_bytes(zipped({**members, "data.pkl": b"".join(altered)}))
        try:
            checkpoints.load(path)
        except ValueError as error:
            assert str(error).startswith(str(path)) and len(str(error)) < 2000
        campaign.passed()

    run(campaign.tries(150, 20_000), st.lists(change, max_size=4), check)


@pytest.fixture
def mutable(tmp_path, monkeypatch):
    """Files whose checksums are not compared."""
    for module, name in ((onnx_file, "check_checksum"), (openvino_file, "check_checksum"), (journal, "_compute_crc32")):
        monkeypatch.setattr(module, name, getattr(module, name))  # restored at the end
    accept_all_checksums()
    return Files(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_mutated_files(campaign, mutable):
    rng = np.random.default_rng(0)
    for name, seed in mutable.seeds().items():
        assert mutable.describe_fault(seed) is None
        for trial in range(campaign.tries(40, 2000)):
            content = seed[:1] + mutate(seed[1:], rng)
            if fault := mutable.describe_fault(content):
                campaign.failed(f"{name}, trial {trial}: {fault}")
            else:
                campaign.passed()
