"""recontrast.recipes: fields and their rules, the nine scripts of the paper, and YAML files."""

import dataclasses
import json
import os

import pytest

from recontrast.recipes import yaml_file
from recontrast.recipes.paper import RECIPES
from recontrast.recipes.recipe import Recipe, list_differences
from recontrast.recipes.rivals import RIVALS
from recontrast.recipes.transformers import TRANSFORMERS
from recontrast.recipes.validation import FIELD_RULES, FLOAT_FIELDS
from recontrast.training.optimisers import compute_lr_factor

INVALID = {
    "steps": [0, -1, 2.0, "10", True, None],
    "batch": [0, 1.5],
    "size": [0, "256", (256,), (256, 0), 256.0],
    "crop": [0, (224, 224, 3), 300],  # 300 is larger than size
    "encoder_bn": ["on", None, True],
    "bn_train_categories": ["carpet", [1]],
    "decoder_lr": [-1.0, float("nan"), float("inf"), "2e-3", True],
    "betas": [0.9, (0.9,), (0.9, 1.0), ("a", "b")],
    "eps": [0.0, -1e-8],
    "ramp": [-0.1, 1.5],
    "factor": [-1.0],
    "activation": ["tanh"],
    "partial_norm": [1, "yes"],
    "blur": ["gauss", False],
    "reduce": ["max"],
    "score": ["top", 0.0, 1.5, -0.1, None, True],
    "mask_rule": ["all"],
    "holdout": [-0.1, 1.0, "half", True],
    "seed": [-1, 2**63, 1.0],
    "precision": ["float16", "bf16"],
    "tf32": ["yes", 1],
    "cudnn_benchmark": ["yes", None],
    "channels_last": ["auto", 1],
    "log_every": [0],
    "checkpoint_every": [0],
    "compile": ["yes"],
    "amsgrad": [1],
    "lr_drop": [0.0, -1.0],
    "lr_drop_at": [1.1, "end"],
    "wipe_every": [0, 500.0],
    "rest": [-1, 1.5, 1],  # 1 needs wipe_every
    "loss": ["regional"],
    "mining": ["no"],
    "stop_gradient": [0],
    "train_encoder": [None],
    "pairs": ["both"],
    "views": ["all", None],
    "name": ["", 3],
    "weights": ["", 3],
    "sampling": ["balanced", None],
    "shots": [0, -1, 4.0, True, "4", {}, {"screw": 0}, {"screw": "4"}, {"screw": None}],
    "augment": ["rotate", None, True],
}


@pytest.mark.parametrize("field, value", [(f, v) for f, values in INVALID.items() for v in values])
def test_invalid_values(field, value):
    with pytest.raises(ValueError, match=rf"^recipe .*: {field}: wanted .*, got ") as error:
        Recipe(**{field: value})
    assert "\n" not in str(error.value)


def test_error_for_an_unknown_field_suggests_the_closest_one():
    with pytest.raises(ValueError, match=r"recipe 'mvtec': there is no field 'step' \(did you mean steps\?\)$"):
        RECIPES["mvtec"].replace(step=3)
    with pytest.raises(ValueError, match=r"there is no field 'zzz'; fields are name, .{1,600} \.\.\.$"):
        Recipe.from_dict({"zzz": 1})
    with pytest.raises(ValueError, match="wanted a mapping of field names to values, got list"):
        Recipe.from_dict([1])


def test_category_in_both_lists():
    with pytest.raises(ValueError, match=r"got \['a'\] in both"):
        Recipe(bn_train_categories=("a", "b"), bn_eval_categories=("a",))


def test_round_trip_through_json():
    recipe = RECIPES["mvtec"].replace(size=(256, 192), crop=(224, 160), score=0.01, betas=(0.5, 0.9), blur=None)
    restored = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert restored == recipe
    assert isinstance(restored.size, tuple)
    assert isinstance(restored.bn_eval_categories, tuple)
    assert hash(restored) == hash(recipe)


def test_settings_of_recontrast_mvtec():
    """The settings of upstream's recontrast_mvtec.py."""
    recipe = RECIPES["mvtec"]
    assert (recipe.steps, recipe.batch, recipe.size, recipe.crop, recipe.seed) == (2000, 16, 256, None, 111)
    assert (recipe.decoder_lr, recipe.encoder_lr, recipe.weight_decay, recipe.eps) == (2e-3, 1e-5, 1e-5, 1e-8)
    assert (recipe.alpha_start, recipe.alpha_end, recipe.ramp, recipe.factor) == (-3.0, 1.0, 0.1, 0.0)
    assert (recipe.blur, recipe.reduce, recipe.score, recipe.drop_last) == ("reflect", "sum", "max", False)
    assert len(recipe.bn_train_categories) + len(recipe.bn_eval_categories) == 15


TABLE = {  # steps, batch, drop_last, ramp, eps, score, encoder_bn; other differences from `mvtec`
    "mvtec": ((2000, 16, False, 0.1, 1e-8, "max", "auto"), {}),
    "visa": ((3000, 16, False, 0.1, 1e-8, "max", "auto"), {}),
    "mvtec_stable": (
        (2000, 16, True, 0.2, 1e-10, 0.01, "train"),
        {"partial_norm": True, "wipe_every": 500, "rest": 99},
    ),
    "visa_stable": ((4000, 16, True, 0.2, 1e-10, "max", "train"), {"partial_norm": True, "wipe_every": 500}),
    "mvtec_unified": (
        (5000, 16, True, 0.1, 1e-10, 0.01, "eval"),
        {"amsgrad": True, "lr_drop": 0.2, "lr_drop_at": 0.8, "activation": "gelu", "reduce": "mean", "blur": "zero5",
         "seed": 1},
    ),
    "aptos": ((1000, 32, False, 0.1, 1e-8, "max", "train"), {}),
    "oct2017": ((1000, 32, False, 0.1, 1e-8, "max", "eval"), {}),
    "isic2018": ((2000, 32, False, 0.1, 1e-8, "mean", "train"), {"crop": 224}),
}  # fmt: skip
TABLE["visa_unified"] = TABLE["mvtec_unified"]


@pytest.mark.parametrize("name", TABLE)
def test_settings_of_every_script(name):
    """A script differs from recontrast_mvtec.py in the settings of the table and in no other."""
    columns, differences = TABLE[name]
    recipe = RECIPES[name]
    names = ("steps", "batch", "drop_last", "ramp", "eps", "score", "encoder_bn")
    assert tuple(getattr(recipe, column) for column in names) == columns
    listed = {"name", "bn_train_categories", "bn_eval_categories", *names, *differences}
    for field in dataclasses.fields(Recipe):
        if field.name not in listed:
            assert getattr(recipe, field.name) == getattr(RECIPES["mvtec"], field.name), field.name
    assert {key: getattr(recipe, key) for key in differences} == differences
    assert recipe.name == name


def test_every_recipe_is_in_the_table():
    assert {*TABLE, *RIVALS, *TRANSFORMERS} == set(RECIPES)
    assert len(TABLE) + len(RIVALS) + len(TRANSFORMERS) == len(RECIPES)


def test_dinomaly_and_inp_former_have_their_published_settings():
    for name, recipe in TRANSFORMERS.items():
        assert recipe.name == name == f"{recipe.architecture}_{name.split('_')[-1]}"
        assert (recipe.size, recipe.out, recipe.map_out, recipe.batch) == (448, (392, 392), (256, 256), 16)
        assert (recipe.optimiser, recipe.amsgrad, recipe.eps, recipe.weight_decay, recipe.clip) == (
            "stableadamw", True, 1e-10, 1e-4, 0.1)  # fmt: skip
        assert [compute_lr_factor(recipe, step) for step in (0, 99, 100)] == [0, 1, 1]
        assert compute_lr_factor(recipe, recipe.steps) == pytest.approx(0.1)
    steps = {name: recipe.steps for name, recipe in TRANSFORMERS.items()}
    assert steps == {"dinomaly_mvtec": 10_000, "dinomaly_visa": 10_000, "inp_former_mvtec": 200 * 226,
                     "inp_former_visa": 200 * 541}  # fmt: skip
    dinomaly, inp_former = TRANSFORMERS["dinomaly_mvtec"], TRANSFORMERS["inp_former_mvtec"]
    assert (dinomaly.decoder_lr, dinomaly.rule, dinomaly.factor, dinomaly.mask_rule) == (2e-3, "hardest", 0.1, "any")
    assert (inp_former.decoder_lr, inp_former.rule, inp_former.coherence) == (1e-3, "power", 0.2)
    with pytest.raises(ValueError, match="map_size: wanted none if tile is given"):
        dinomaly.replace(tile=392, crop=None)


def test_rivals_have_their_published_settings():
    patchcore, padim, uniad = (RECIPES[name] for name in ("patchcore_mvtec", "padim_mvtec", "uniad_mvtec"))
    assert (patchcore.bank_share, patchcore.levels, patchcore.bank_embedding, patchcore.out) == (
        0.1, (2, 3), "unfold", (224, 224))  # fmt: skip
    assert (padim.gaussian_features, padim.levels, padim.out, padim.score) == (550, 3, (224, 224), "max")
    assert (uniad.decoder_lr, uniad.weight_decay, uniad.clip, uniad.jitter) == (1e-4, 1e-4, 0.1, 20)
    assert (uniad.batch, uniad.lr_drop, uniad.lr_drop_at, uniad.blur) == (64, 0.1, 0.8, None)
    assert uniad.steps == 1000 * -(-3629 // 64) and RECIPES["uniad_visa"].steps == 1000 * -(-8659 // 64)
    for name, recipe in RIVALS.items():
        assert recipe.name == name == f"{recipe.architecture}_{name.split('_')[1]}"


def test_encoder_bn_on_visa():
    """Two of the twelve categories use eval mode; the stable script uses train mode for all."""
    visa = RECIPES["visa"]
    assert [c for c in (*visa.bn_train_categories, *visa.bn_eval_categories) if visa.encoder_bn_for(c) == "eval"] == [
        "cashew",
        "pcb1",
    ]
    assert len(visa.bn_train_categories) == 10
    assert RECIPES["visa_stable"].encoder_bn_for("cashew") == "train"
    assert RECIPES["visa_unified"].encoder_bn_for("candle") == "eval"


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"loss": "point"}, "mining: wanted false if loss is 'point', got true"),
        ({"train_encoder": False}, "pairs: wanted 'self' if train_encoder is false, got 'cross'"),
        ({"pairs": "self", "views": "trained"}, "views: wanted 'both' if pairs is 'self', .*got 'trained'"),
        ({"architecture": "patchcore", "sampling": "classes"}, "sampling: wanted the default for .*, got 'classes'"),
        ({"wipe_every": 5, "rest": 6}, r"rest: wanted at most wipe_every \(5\), got 6"),
    ],
)
def test_contradicting_fields(changes, text):
    with pytest.raises(ValueError, match=f"^recipe 'mvtec': {text}"):
        RECIPES["mvtec"].replace(**changes)


def test_every_field_has_a_rule():
    assert set(FIELD_RULES) == {field.name for field in dataclasses.fields(Recipe)}
    assert set(FLOAT_FIELDS) < set(FIELD_RULES)


# ---- YAML ----------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_round_trip_through_yaml(tmp_path, name):
    recipe = RECIPES[name].replace(size=(512, 448), weights="wéights.pth", decoder_lr=1e-5)
    assert yaml_file.read_recipe(yaml_file.write_recipe(tmp_path / "recipe.yaml", recipe)) == recipe


@pytest.mark.parametrize("names", [
    ("1e3", "2e3", "1.E5", "-1e+3"), ("1", "0x10", "1_000", "12:30"), ("null", "~", "yes", "2001-01-01", "=", "<<"),
], ids=", ".join)  # fmt: skip
def test_texts_that_look_like_other_values_stay_texts(tmp_path, names):
    recipe = Recipe(name="1e5", views_from="_(.+)_", view_names=names)
    assert yaml_file.read_recipe(yaml_file.write_recipe(tmp_path / "recipe.yaml", recipe)) == recipe


def test_yaml_with_some_fields(tmp_path):
    path = tmp_path / "mine.yml"
    path.write_text("# mine\nbase: visa\nname: mine\nsteps: 100\nencoder_lr: 2e-5\nsize: [64, 32]\nwipe_every: null\n")
    recipe = yaml_file.load_recipe(str(path))
    assert recipe == RECIPES["visa"].replace(name="mine", steps=100, encoder_lr=2e-5, size=(64, 32))
    assert yaml_file.load_recipe("oct2017") is RECIPES["oct2017"]
    path.write_text("steps: 7")
    assert yaml_file.read_recipe(path) == RECIPES["mvtec"].replace(steps=7)


def bomb(first, following):
    """Return YAML whose aliases repeat 9 times what is before them, 11 times over."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{i}: &a{i} " + following.format(", ".join([f"*a{i - 1}"] * 9)) for i in range(1, 12)]
    return "\n".join(lines).encode()


ALIAS_BOMB = bomb("[1]", "[{}]")
MERGE_BOMB = bomb("{b: 1}", "{{<<: [{}]}}")


@pytest.mark.parametrize(
    "text, expected",
    [
        (b"steps: [1", "line 1: wanted a recipe in YAML, got "),
        (b"steps: 1\n  batch: 2", "line 2: wanted a recipe in YAML, got mapping values are not allowed"),
        (b"steps: 1\nsteps: 2", "line 2: wanted a recipe in YAML, got 'steps' twice"),
        (b"steps: !!python/object:os.system 1", "line 1: wanted a recipe in YAML, got could not determine"),
        (b"{[1]: 2}", "line 1: wanted a recipe in YAML, got found unhashable key"),
        (b"\x89PNG\x00\xff", "wanted a recipe in YAML, got a file of another kind"),
        (b"- steps", "wanted a mapping of recipe fields to values, got list"),
        (b"", "wanted a mapping of recipe fields to values, got an empty file"),
        (b"step: 3", r"recipe 'mvtec': there is no field 'step' \(did you mean steps\?\)"),
        (b"3: 3", "recipe 'mvtec': there is no field '3'"),
        (b"steps: many", "recipe 'mvtec': steps: wanted a whole number of at least 1, got 'many'"),
        (b"base: mvtek", "base: wanted one of mvtec, visa, .*, got 'mvtek'"),
        (b"base: [mvtec]", r"base: wanted one of .*, got \['mvtec'\]"),
        (b"[" * 5000, "got lists or mappings that are nested too deeply"),
        (b"steps: " + b"[" * 300 + b"]" * 300, "steps: wanted a whole number of at least 1, got "),
        (b"a: &a [1]\nsteps: &b [*a, *b]", "line 1: wanted a recipe in YAML, got aliases that multiply its content"),
        (ALIAS_BOMB, "wanted a recipe in YAML, got aliases that multiply its content"),
        (MERGE_BOMB, "wanted a recipe in YAML, got aliases that multiply its content"),
        (b"steps: " + b"9" * 5000, "wanted a recipe in YAML, got Exceeds the limit"),
        (b"steps: 2024-99-99", "wanted a recipe in YAML, got month must be in 1..12"),
        (b"decoder_lr: " + b"9" * 400, "decoder_lr: wanted a number of at least 0, got inf"),
        (b"steps: 99999999999999999999", "steps: wanted a whole number of at least 1, got 99999999999999999999"),
        (b"name: " + b"x" * 2**20, "wanted a recipe in YAML of at most 1,048,576 bytes, got a larger file"),
        (b"steps: " + b"x" * 9999, r"steps: wanted a whole number of at least 1, got 'x+\.\.\.x+'$"),
    ],
)
def test_invalid_yaml(tmp_path, text, expected):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=expected) as error:
        yaml_file.read_recipe(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_yaml_in_utf_16_and_with_aliases(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("size: &size [64, 32]\ncrop: *size\nname: größe\n", encoding="utf-16")
    assert yaml_file.read_recipe(path) == RECIPES["mvtec"].replace(size=(64, 32), crop=(64, 32), name="größe")


@pytest.mark.parametrize("name", ["pipe.yaml", "pipe"])
def test_named_pipe_is_refused(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: wanted a recipe in YAML, got a named pipe"):
        yaml_file.load_recipe(str(tmp_path / name))


def test_load_missing_recipe(tmp_path):
    with pytest.raises(ValueError, match=r"wanted one of mvtec, visa, .*, or a YAML file, got 'mvtek'"):
        yaml_file.load_recipe("mvtek")
    with pytest.raises(FileNotFoundError):
        yaml_file.load_recipe(str(tmp_path / "none.yaml"))


def test_recipe_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECIPES["mvtec"].steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "category, mode",
    [("toothbrush", "eval"), ("screw", "eval"), ("carpet", "train"), ("zipper", "train"), ("my_parts", "eval")],
)
def test_encoder_bn_by_category(category, mode):
    recipe = RECIPES["mvtec"]
    assert recipe.encoder_bn_for(category) == mode
    assert recipe.replace(encoder_bn="train").encoder_bn_for(category) == "train"
    assert recipe.replace(encoder_bn="eval").encoder_bn_for(category) == "eval"


def test_values_are_converted():
    recipe = Recipe(decoder_lr=0, betas=[0, 0], size=[64, 32], score=1)
    assert (recipe.decoder_lr, recipe.betas, recipe.size, recipe.score) == (0.0, (0.0, 0.0), (64, 32), 1.0)
    assert isinstance(recipe.decoder_lr, float)
    assert recipe.out == (64, 32)
    assert Recipe(size=256, crop=224).out == (224, 224)


def test_shots_by_class(tmp_path):
    """Numbers by class can be hashed, written to JSON and YAML, and not be changed."""
    recipe = Recipe(shots={"screw": 4, "tile": 1})
    assert recipe == Recipe(shots={"tile": 1, "screw": 4}) and hash(recipe) == hash(
        Recipe(shots={"tile": 1, "screw": 4})
    )
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert yaml_file.read_recipe(yaml_file.write_recipe(tmp_path / "r.yaml", recipe)) == recipe
    with pytest.raises(TypeError):
        recipe.shots["screw"] = 5
    assert "shots" not in Recipe().to_dict() and recipe.replace(shots=None) == Recipe()


def test_list_differences():
    recipe = Recipe()
    other = recipe.replace(batch=8, log_every=3)
    assert list_differences(recipe, other) == ["batch: 16 and 8", "log_every: 20 and 3"]
    assert list_differences(recipe, other, ignore=("log_every",)) == ["batch: 16 and 8"]
