import dataclasses
import json

import pytest

from recontrast.engine.recipes import RECIPES, Recipe, differences

BAD = {
    "steps": [0, -1, 2.0, "10", True, None],
    "batch": [0, 1.5],
    "size": [0, "256", (256,), (256, 0), 256.0],
    "crop": [0, (224, 224, 3), 300],  # 300: larger than size
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
    "seed": [-1, 2**63, 1.0],
    "precision": ["float16", "bf16"],
    "channels_last": ["auto", 1],
    "log_every": [0],
    "checkpoint_every": [0],
    "name": ["", 3],
    "weights": ["", 3],
}


@pytest.mark.parametrize("field, value", [(f, v) for f, values in BAD.items() for v in values])
def test_refuses(field, value):
    with pytest.raises(ValueError, match=rf"^recipe .*: {field} must .*, got ") as error:
        Recipe(**{field: value})
    assert "\n" not in str(error.value)


def test_unknown_field_names_the_close_one():
    with pytest.raises(ValueError, match=r"recipe 'mvtec': there is no field 'step' \(did you mean steps\?\)"):
        RECIPES["mvtec"].replace(step=3)
    with pytest.raises(ValueError, match="there is no field 'zzz'; fields are name, "):
        Recipe.from_dict({"zzz": 1})
    with pytest.raises(ValueError, match="wanted a mapping of field names to values, got list"):
        Recipe.from_dict([1])


def test_one_category_in_both_lists():
    with pytest.raises(ValueError, match=r"got \['a'\] in both"):
        Recipe(bn_train_categories=("a", "b"), bn_eval_categories=("a",))


def test_round_trip_through_json():
    recipe = RECIPES["mvtec"].replace(size=(256, 192), crop=(224, 160), score=0.01, betas=(0.5, 0.9), blur=None)
    again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe
    assert isinstance(again.size, tuple)
    assert isinstance(again.bn_eval_categories, tuple)
    assert hash(again) == hash(recipe)


def test_numbers_of_the_script():
    """recontrast_mvtec.py, last iteration, as the paper reports it."""
    recipe = RECIPES["mvtec"]
    assert (recipe.steps, recipe.batch, recipe.size, recipe.crop, recipe.seed) == (2000, 16, 256, None, 111)
    assert (recipe.decoder_lr, recipe.encoder_lr, recipe.weight_decay, recipe.eps) == (2e-3, 1e-5, 1e-5, 1e-8)
    assert (recipe.alpha_start, recipe.alpha_end, recipe.ramp, recipe.factor) == (-3.0, 1.0, 0.1, 0.0)
    assert (recipe.blur, recipe.reduce, recipe.score, recipe.drop_last) == ("reflect", "sum", "max", False)
    assert len(recipe.bn_train_categories) + len(recipe.bn_eval_categories) == 15


def test_frozen():
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


def test_conversions():
    recipe = Recipe(decoder_lr=0, betas=[0, 0], size=[64, 32], score=1)
    assert (recipe.decoder_lr, recipe.betas, recipe.size, recipe.score) == (0.0, (0.0, 0.0), (64, 32), 1.0)
    assert isinstance(recipe.decoder_lr, float)
    assert recipe.out == (64, 32)
    assert Recipe(size=256, crop=224).out == (224, 224)


def test_differences():
    recipe = Recipe()
    other = recipe.replace(batch=8, log_every=3)
    assert differences(recipe, other) == ["batch: 16 and 8", "log_every: 20 and 3"]
    assert differences(recipe, other, ignore=("log_every",)) == ["batch: 16 and 8"]
