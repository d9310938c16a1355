"""The nine training scripts of the paper's code, as recipes."""

from recontrast.recipes.recipe import VISA_BN_EVAL, VISA_BN_TRAIN, Recipe

_MVTEC = Recipe(name="mvtec")  # recontrast_mvtec.py

_VISA = _MVTEC.replace(
    name="visa", steps=3000, bn_train_categories=VISA_BN_TRAIN, bn_eval_categories=VISA_BN_EVAL
)  # recontrast_visa.py

# recontrast_mvtec_stable.py. Its comment says that the encoder rests for 100 steps; its counter is raised for the
# first time in the very step of the wipe, so that they are 99.
_MVTEC_STABLE = _MVTEC.replace(
    name="mvtec_stable", encoder_bn="train", drop_last=True, partial_norm=True, eps=1e-10, ramp=0.2,
    wipe_every=500, rest=99, score=0.01,
)  # fmt: skip

# recontrast_visa_stable.py: 4000 steps, though its runs are named for 3000; its counter of resting steps begins at the
# end and is never set back, so that the encoder never rests.
_VISA_STABLE = _MVTEC_STABLE.replace(
    name="visa_stable", steps=4000, bn_train_categories=VISA_BN_TRAIN, bn_eval_categories=VISA_BN_EVAL,
    rest=0, score="max",
)  # fmt: skip

# recontrast_mvtec_multiclass.py. Its one AdamW of three groups is two here: AdamW treats each weight alone.
_MVTEC_UNIFIED = _MVTEC.replace(
    name="mvtec_unified", steps=5000, seed=1, encoder_bn="eval", drop_last=True, eps=1e-10, amsgrad=True,
    lr_drop=0.2, lr_drop_at=0.8, activation="gelu", reduce="mean", blur="zero5", score=0.01,
)  # fmt: skip

_APTOS = _MVTEC.replace(name="aptos", steps=1000, batch=32, encoder_bn="train")  # recontrast_aptos.py


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _MVTEC,
        _VISA,
        _MVTEC_STABLE,
        _VISA_STABLE,
        _MVTEC_UNIFIED,
        _MVTEC_UNIFIED.replace(name="visa_unified"),  # recontrast_visa_multiclass.py
        _APTOS,
        _APTOS.replace(name="oct2017", encoder_bn="eval"),  # recontrast_oct.py
        _APTOS.replace(name="isic2018", steps=2000, crop=224, score="mean"),  # recontrast_isic.py
    )
}
"""The recipes of the nine scripts in the paper's public code (Guo et al., NeurIPS 2023, https://arxiv.org/abs/2306.02602):

"mvtec", "visa", "mvtec_stable", "visa_stable" (appendix E), "mvtec_unified", "visa_unified", "aptos", "oct2017" and
"isic2018", each by the name of `Recipe.name`. To change one: ``RECIPES["mvtec"].replace(steps=500)``.
"""
