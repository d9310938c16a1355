"""Files that a stranger could send: pickles that run code, bombs, and values of wrong types in every field."""

import io
import json
import pickle
import struct
import zipfile

import torch
from small_detectors import describe

MODULES = ("os", "posix", "builtins", "subprocess", "torch.utils.cpp_extension", "shutil", "importlib")


def payloads(marker):
    """Yield (name, pickle that creates the folder ``marker`` when it is loaded)."""
    path = str(marker)

    class Reduce:
        def __reduce__(self):
            import os

            return os.mkdir, (path,)

    class Exec:
        def __reduce__(self):
            return exec, (f"import os; os.mkdir({path!r})",)

    class Evaluate:
        def __reduce__(self):
            return eval, (f"__import__('os').mkdir({path!r})",)

    class State:
        def __reduce__(self):
            return dict, (), None, None, iter([("a", Reduce())])

    for protocol in range(6):
        for kind in (Reduce, Exec, Evaluate, State):
            yield f"{kind.__name__} of protocol {protocol}", pickle.dumps({"model": kind()}, protocol)
    text = path.encode()
    yield "INST", b"(S'" + text + b"'\nios\nmkdir\n."
    yield "OBJ", b"(cos\nmkdir\nS'" + text + b"'\no."
    yield "STACK_GLOBAL", b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93\x8c" + bytes([len(text)]) + text + b"\x85R."
    yield "NEWOBJ", b"\x80\x02cbuiltins\nexec\nX" + struct.pack("<I", 4) + b"pass\x85\x81."
    yield "EXT1", b"\x80\x02\x82\x01."
    yield "attribute of torch", b"\x80\x02ctorch\nos.mkdir\nX" + struct.pack("<I", len(text)) + text + b"\x85R."
    yield (
        "BUILD",
        b"\x80\x02ccollections\nOrderedDict\n)R}X\x01\x00\x00\x00aK\x01sbcos\nmkdir\nX"
        + struct.pack("<I", len(text))
        + text
        + b"\x85R.",
    )


def zipped(members, folder="archive", compression=zipfile.ZIP_STORED):
    """Return a ZIP archive with members in a folder."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{folder}/{name}" if folder else name, content)
    return buffer.getvalue()


def pickle_containers(content):
    """Yield (file name, bytes) of files of every kind with a pickle in them."""
    yield "a.pt", content
    yield "a.pth", content
    yield "b.pt", zipped({"data.pkl": content, "version": "3\n", "byteorder": "little"})
    yield "b.pth", zipped({"data.pkl": content, "version": "3\n", "byteorder": "little"})
    yield "c.pt", zipped({"data.pkl": content, "constants.pkl": content, "version": "3\n", "code/x.py": "import os"})
    yield "d.pt", zipped({"data.pkl": content, "version": "3\n"}, folder="")
    yield "e.pt2", content
    yield "f.pt2", zipped({"data.pkl": content, "version": "3\n", "byteorder": "little"})
    old = {"serialized_exported_program.json": b"{}", "serialized_state_dict.pt": content, "version": "8.20"}
    old |= {"serialized_constants.pt": content, "serialized_example_inputs.pt": content}
    yield "g.pt2", zipped(old, folder="")
    yield "h.onnx", content
    yield "i.xml", content
    yield "j.safetensors", content


def read_members(path):
    """Return the members of an archive by name, without its folder."""
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def pt2_files(path, content, marker):
    """Yield (name, bytes) of files of torch.export with a pickle or code in every place that could be run."""
    members = read_members(path)
    run = f"__import__('os').mkdir({str(marker)!r})"

    def altered(**changes):
        return zipped({**members, **{name.replace("__", "/"): value for name, value in changes.items()}}, "d")

    def with_json(name, change):
        values = json.loads(members[name])
        change(values)
        return zipped({**members, name: json.dumps(values).encode()}, "d")

    yield "sample inputs", zipped({**members, "data/sample_inputs/model.pt": content}, "d")
    yield "weights of the old format", zipped({**members, "data/weights/model.pt": content}, "d")
    yield "constants of the old format", zipped({**members, "data/constants/model.pt": content}, "d")
    yield "a library", zipped({**members, "data/aotinductor/model/x.so": b"\x7fELF"}, "d")
    yield "a second model", zipped({**members, "models/other.json": members["models/model.json"]}, "d")
    yield "an absolute name", zipped({**members, "/etc/passwd": b""}, "d")
    yield "a name above", zipped({**members, "../x": b""}, "d")
    for folder, config in (("weights", "model_weights_config"), ("constants", "model_constants_config")):
        name = f"data/{folder}/{config}.json"
        for stem in ("weight_0", "tensor_0", "custom_obj_0", "opaque_obj_0", "../x"):

            def use_pickle(values, stem=stem):
                values["config"]["x"] = {"path_name": stem, "is_param": True, "use_pickle": True, "tensor_meta": None}

            values = json.loads(members[name])
            use_pickle(values)
            yield (
                f"{stem} in {folder}",
                zipped({**members, name: json.dumps(values).encode(), f"data/{folder}/{stem}": content}, "d"),
            )
    graph = "models/model.json"
    for target in (
        "torch.os.mkdir", "torch.os.system", "torch.utils.cpp_extension.subprocess.check_output", "torch.load",
        "torch.ops.aten.from_file.default", "torch.ops.aten.save.default", "_operator.attrgetter",
        "_operator.methodcaller", "torch.hub.load", "math.__loader__.load_module", "#x",
        "torch.serialization.pickle.loads", "torch.sym_max.__class__",
        "torch.ops.load_library", "torch.ops.aten.add.Tensor.__class__", "torch._dynamo.x",
        "torch.ops.mylib.run.default",
    ):  # fmt: skip

        def call(values, target=target):
            node = values["graph_module"]["graph"]["nodes"][0]
            node["target"] = target
            node["inputs"] = [{"name": "path", "arg": {"as_string": str(marker)}, "kind": 1}]

        yield f"function {target}", with_json(graph, call)
    for name in (f"a = {run}", f"a\n    {run}\n    b", "torch.load", "self.forward", "__class__", "import", "x;y", run):

        def rename(values, name=name):
            values["graph_module"]["graph"]["nodes"][0]["name"] = name
            values["graph_module"]["graph"]["inputs"][0] = {"as_tensor": {"name": name}}

        yield f"name {name[:20]!r}", with_json(graph, rename)
    for expression in (run, "9**9**9**9**9", "Pow(Integer(9999), Pow(Integer(9999), Integer(9999)))", "s0.__class__",
                       "preview(s0)", "(lambda: 0)()", "Symbol('x') + 1", "Function('f')(s0)", "exec('1')",
                       "a" * 20_000):  # fmt: skip

        def express(values, expression=expression):
            for meta in values["graph_module"]["graph"]["tensor_values"].values():
                meta["sizes"] = [{"as_expr": {"expr_str": expression, "hint": {"as_int": 2}}}]

        yield f"expression {expression[:20]!r}", with_json(graph, express)
    for key, value in (
        ("as_graph", {"name": "x", "graph": {}}), ("as_operator", "torch.os.system"),
        ("as_custom_obj", {"name": "x", "class_fqn": "os"}), ("as_string", run),
    ):  # fmt: skip

        def argue(values, key=key, value=value):
            values["graph_module"]["graph"]["nodes"][0]["inputs"] = [{"name": "self", "arg": {key: value}, "kind": 1}]

        yield f"argument {key}", with_json(graph, argue)

    def spec(values):
        signature = values["graph_module"]["module_call_graph"][0]["signature"]
        signature["in_spec"] = json.dumps([1, {"type": "os.system", "context": run, "children_spec": []}])

    yield "containers of another type", with_json(graph, spec)
    yield "nested JSON", zipped({**members, graph: b"[" * 100_000}, "d")
    yield "a nested description", zipped({**members, "extra/recontrast.json": b"[" * 100_000}, "d")
    yield "no graph", zipped({**members, graph: b"[]"}, "d")
    yield "a compressed archive", zipped(members, "d", zipfile.ZIP_DEFLATED)


# Values of wrong types and ranges. Those that cannot be stored are left out where they are used.
_itself: dict = {}
_itself["self"] = _itself
_bomb: list = [1]
for _ in range(40):
    _bomb = [_bomb, _bomb, _bomb]
WRONG = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 1.5, float("nan"), float("inf"), -0.0, "", "x", "x" * 5000,
    b"x",
    "a\nb\r", [], [1], [None], [[1]], ["a"] * 3, (), (1, 2), {}, {"a": 1}, {1: 2}, {"state": 1}, torch.zeros(3),
    torch.zeros(0), torch.tensor(float("nan")), torch.zeros(1).expand(10**6), _itself, _bomb, [_itself], {"x": _bomb},
]  # fmt: skip


def wrong_descriptions():
    """Yield (name, JSON text) of descriptions with wrong values."""
    for field in ("format", "recontrast", "category", "top", "recipe", "calibration", "weights", "checksum"):
        for index, value in enumerate(WRONG[:-4]):  # the last ones would have no end as JSON
            try:
                text = describe(**{field: value})
            except (TypeError, ValueError, RecursionError):
                continue
            if len(text) < 10**6:
                yield f"{field} is value {index}", text
    for field in ("steps", "size", "crop", "tile", "score", "backbone", "blur", "betas", "nothing"):
        for index, value in enumerate(WRONG[:30]):
            try:
                yield f"recipe: {field} is value {index}", describe(recipe={field: value})
            except (TypeError, ValueError, RecursionError):
                continue
    for text in (
        "",
        "null",
        "[]",
        "{",
        "[" * 100_000,
        '{"format": 1}',
        '{"format": 1, "recontrast": 1}',
        "\ud800",
        "1" * 5000,
    ):
        yield f"text {text[:10]!r}", text
