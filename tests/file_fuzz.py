"""Mutated files of every kind but images: the target of a fuzz test, and a coverage-guided run by hand.

    pip install atheris
    python tests/file_fuzz.py --seconds 600

reads recipes, logs, tables, journals, parts of predictions, descriptions, checkpoints, weights and exported networks
that atheris mutates towards new branches of the readers; without atheris, it mutates them at random. Any other outcome
than a value or one sentence stops the run and prints the file. The first byte of an input is the number of its reader.
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from hostile import zipped
from image_fuzz import mutate
from small_detectors import RECIPE, build_onnx, describe, export_pt2, save_checkpoint

from recontrast import checkpoint as checkpoints
from recontrast.app.prediction import journal, output_files, parquet_parts
from recontrast.checkpoint import unpickle
from recontrast.data import archive, csv_table, temporary, unfinished
from recontrast.experiments import reproduce
from recontrast.inference import file_checks, onnx_file, openvino_file, pt2_file
from recontrast.models import weights
from recontrast.recipes import yaml_file
from recontrast.training import json_log

MODULES = (
    archive, csv_table, file_checks, journal, json_log, onnx_file, openvino_file, output_files, parquet_parts, pt2_file,
    reproduce, temporary, unfinished, unpickle, weights, yaml_file,
)  # fmt: skip
IDENTITY = {"checkpoint": "/a", "stamp": [1, 2]}
ENTRY = {
    "path": "/a.png", "score": 1.0, "flagged": None, "map": None, "overlay": None, "error": None, "decision": None,
    "stamp": None, "start": 0, "shape": None, "map_crc32": None, "crc32": 0,
}  # fmt: skip
ROW = {"category": "tile", "images": 3, "defects": 1, "i_auroc": 0.5, "seconds": {"forward": 1.0}}


class Files:
    """Seeds of each reader, and the readers: functions of the content of a file."""

    def __init__(self, folder):
        self.folder = folder
        self.path = folder / "x"
        content = torch.load(save_checkpoint(folder / "whole.pt"), weights_only=True)
        small = dict(list(content["model"].items())[1:3])
        torch.save({**content, "model": small, "optimisers": [], "checksums": None}, folder / "small.pt")
        torch.save(small, folder / "weights.pth", _use_new_zipfile_serialization=False)
        self.members = self._read_members(folder / "small.pt")
        self.exported = self._read_members(export_pt2(folder / "net.pt2"))
        onnx = build_onnx()
        entry = onnx.metadata_props.add()
        entry.key, entry.value = file_checks.KEY, describe()
        network = (
            f'<net name="a"><layers><layer id="0" type="Add" version="opset1"/></layers><rt_info><{file_checks.KEY} '
            f'value="{describe().replace(chr(34), "&quot;")}"/></rt_info></net>'
        )
        lines = [{"identity": IDENTITY}, ENTRY, {**ENTRY, "error": "a"}]
        self.kinds = [
            (self.read_recipe, yaml_file.write_recipe(folder / "recipe.yaml", RECIPE).read_bytes()),
            (self.read_log, b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": null}\n'),
            (self.read_table, b"path,label\na,good\n'=b,bad\n"),
            (self.read_own_table, b"path,label\na,good\n'=b,bad\n"),
            (self.read_list, b"a.png\r\nb/c.png\n"),
            (self.read_journal, b"".join(json.dumps(line).encode() + b"\n" for line in lines)),
            (self.read_part, self.write_part()),
            (self.read_mark, json.dumps({"note": "a", "files": ["maps/a.png"]}).encode()),
            (self.read_commit, json.dumps({"replace": ["a"], "remove": ["b"]}).encode()),
            (self.read_results, json.dumps({"rows": [ROW]}).encode()),
            (self.read_description, describe().encode()),
            (self.read_pickle, self.members["data.pkl"]),
            (self.read_archive, (folder / "small.pt").read_bytes()),
            (self.read_weights, (folder / "weights.pth").read_bytes()),
            (self.read_onnx, onnx.SerializeToString()),
            (self.read_openvino, network.encode()),
            (self.read_graph, self.exported[pt2_file._GRAPH]),
        ]

    @staticmethod
    def _read_members(path):
        with zipfile.ZipFile(path) as file:
            return {name.partition("/")[2]: file.read(name) for name in file.namelist()}

    def seeds(self):
        """Return one valid input of each reader, by its name."""
        return {read.__name__: bytes([number]) + seed for number, (read, seed) in enumerate(self.kinds)}

    def write(self, content, name="x"):
        path = self.folder / name
        path.write_bytes(content)
        return path

    def read_recipe(self, content):
        yaml_file.read_recipe(self.write(content))

    def read_log(self, content):
        assert isinstance(json_log.read_log(self.write(content)), list)

    def read_table(self, content):
        csv_table.read_table(self.write(content), ["path", "label"])

    def read_own_table(self, content):
        csv_table.read_table(self.write(content), ["path", "label"], own=True)

    def read_list(self, content):
        parquet_parts._read_text_paths(self.write(content))

    def read_journal(self, content):
        self.write(content, journal.LINES)
        found = journal.Journal(self.folder, IDENTITY, False)
        assert all(isinstance(name, str) for name in found.entries)
        found.close()

    def write_part(self):
        """Return the content of a part of predictions."""
        self.parts = self.folder / "parts"
        self.parts.mkdir()
        rows = [{"path": "/a.png", "score": 1.0, "decision": "good"}, {"path": "/b.png", "error": "damaged"}]
        part = parquet_parts.Part("part-a.parquet", ("/a.png", "/b.png"))
        parquet_parts.write_part(self.parts, part, rows, {"identity": "a"})
        return (self.parts / part.name).read_bytes()

    def read_part(self, content):
        self.write(content, "parts/part-a.parquet")
        if parquet_parts._read_finished(self.parts, "a") == {"/a.png", "/b.png"}:
            parquet_parts.summarise(self.parts, ["/a.png", "/b.png"])
        parquet_parts._read_parquet_paths(self.parts / "part-a.parquet")

    def read_mark(self, content):
        self.write(content, unfinished.name_mark("predict"))
        assert all(map(unfinished.is_inside, unfinished.list_unfinished(self.folder, "predict")))

    def read_commit(self, content):
        self.write(content, temporary.COMMIT)
        temporary._read_commit(self.folder)

    def read_results(self, content):
        self.write(content, "results.json")
        output_files._read_earlier_images(self.folder)
        reproduce._read_rows(self.folder, RECIPE, {"tile": []})

    def read_description(self, content):
        file_checks.parse_description(self.path, content.decode(errors="replace"))

    def read_pickle(self, content):
        checkpoints.load(self.write(zipped({**self.members, "data.pkl": content})))

    def read_archive(self, content):
        checkpoints.load(self.write(content))

    def read_weights(self, content):
        weights.read_weights(self.write(content, "x.pth"))

    def read_onnx(self, content):
        onnx_file.read_onnx(self.write(content))

    def read_openvino(self, content):
        openvino_file.read_openvino(self.write(content, "x.xml"))

    def read_graph(self, content):
        pt2_file.read_pt2(self.write(zipped({**self.exported, pt2_file._GRAPH: content})))

    def describe_fault(self, content):
        """Read a damaged file; return what is wrong, or None."""
        read, _ = self.kinds[content[0] % len(self.kinds) if content else 0]
        begin = time.process_time()
        try:
            read(content[1:])
        except (ValueError, FileNotFoundError) as error:
            if "\n" in str(error) or not 0 < len(str(error)) < 2000:
                return f"{read.__name__}: not one sentence: {str(error)[:300]!r}"
        except Exception as error:
            return f"{read.__name__}: {type(error).__name__}: {str(error)[:300]}"
        if time.process_time() - begin > 10:
            return f"{read.__name__}: {time.process_time() - begin:.0f} s"
        return None


def accept_all_checksums():
    """Let mutated files pass the comparison with their checksum, which would refuse each of them."""
    onnx_file.check_checksum = openvino_file.check_checksum = lambda *arguments: None
    journal._compute_crc32 = lambda line: line["crc32"]


def main():
    """Fuzz for a number of seconds, with atheris if it is installed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600, help="duration (default: 600)")
    parser.add_argument("--seed", type=int, default=0, help="seed of random mutations without atheris (default: 0)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp())
    files = Files(folder)
    accept_all_checksums()

    def read_one(content):
        if fault := files.describe_fault(content):
            (folder / "fault").write_bytes(content)
            raise AssertionError(f"{fault}: {folder / 'fault'}")

    try:
        import atheris
    except ImportError:
        rng, tried, end = np.random.default_rng(options.seed), 0, time.monotonic() + options.seconds
        seeds = list(files.seeds().values())
        while time.monotonic() < end:
            seed = seeds[tried % len(seeds)]
            read_one(seed[:1] + mutate(seed[1:], rng))
            tried += 1
        print(f"{tried} files tried, none failed")
        return
    (folder / "corpus").mkdir()
    for name, content in files.seeds().items():
        read_one(content)
        (folder / "corpus" / name).write_bytes(content)
    for module in MODULES:
        for name, value in vars(module).items():
            if getattr(value, "__module__", None) == module.__name__ and isinstance(value, type(main)):
                setattr(module, name, atheris.instrument_func(value))
    arguments = [sys.argv[0], str(folder / "corpus"), f"-max_total_time={options.seconds}", "-timeout=60"]
    atheris.Setup([*arguments, "-rss_limit_mb=4096"], read_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
