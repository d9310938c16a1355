"""The nine training scripts of the paper's public code, as recipes.

Guo et al., NeurIPS 2023, https://arxiv.org/abs/2306.02602. The defaults of `Recipe` are the settings of
recontrast_mvtec.py; each recipe below states only what its script does differently. All scripts report the result of
the last step.
"""

from recontrast.recipes.recipe import VISA_BN_EVAL, VISA_BN_TRAIN, Recipe
from recontrast.recipes.rivals import RIVALS
from recontrast.recipes.transformers import TRANSFORMERS

# recontrast_mvtec.py: one model per category. The mode of the encoder's BatchNorm is chosen by category.
_MVTEC = Recipe(name="mvtec")

# recontrast_visa.py: as recontrast_mvtec.py, with 1000 more steps and VisA's own choice of the BatchNorm mode.
_VISA = _MVTEC.replace(name="visa", steps=3000, bn_train_categories=VISA_BN_TRAIN, bn_eval_categories=VISA_BN_EVAL)

# recontrast_mvtec_stable.py: the measures of appendix E against loss spikes, so that all categories can train with
# BatchNorm in train mode. Its comment says that the encoder pauses for 100 steps after each reset of the decoder's
# optimiser. The counter is first increased in the step of the reset itself, so the pause is 99 steps.
_MVTEC_STABLE = _MVTEC.replace(
    name="mvtec_stable", encoder_bn="train", drop_last=True, partial_norm=True, eps=1e-10, ramp=0.2,
    wipe_every=500, rest=99, score=0.01,
)  # fmt: skip

# recontrast_visa_stable.py: trains for 4000 steps, although the default name of its runs says 3000. The counter of the
# encoder's pause starts at its final value and is never reset, so the encoder never pauses.
_VISA_STABLE = _MVTEC_STABLE.replace(
    name="visa_stable", steps=4000, bn_train_categories=VISA_BN_TRAIN, bn_eval_categories=VISA_BN_EVAL,
    rest=0, score="max",
)  # fmt: skip

# recontrast_mvtec_multiclass.py: one model for all categories. It uses a single AdamW with three parameter groups; two
# optimisers give the same numbers, because AdamW updates each weight independently.
_MVTEC_UNIFIED = _MVTEC.replace(
    name="mvtec_unified", steps=5000, seed=1, encoder_bn="eval", drop_last=True, eps=1e-10, amsgrad=True,
    lr_drop=0.2, lr_drop_at=0.8, activation="gelu", reduce="mean", blur="zero5", score=0.01,
)  # fmt: skip

# recontrast_visa_multiclass.py: the settings of recontrast_mvtec_multiclass.py.
_VISA_UNIFIED = _MVTEC_UNIFIED.replace(name="visa_unified")

# recontrast_aptos.py: image-level only, with larger batches.
_APTOS = _MVTEC.replace(name="aptos", steps=1000, batch=32, encoder_bn="train")

# recontrast_oct.py: as recontrast_aptos.py, with the encoder's BatchNorm in eval mode.
_OCT2017 = _APTOS.replace(name="oct2017", encoder_bn="eval")

# recontrast_isic.py: the only script that crops (256 to 224 pixels) and that scores an image by the mean of its map.
_ISIC2018 = _APTOS.replace(name="isic2018", steps=2000, crop=224, score="mean")


RECIPES: dict[str, Recipe] = (
    {
        recipe.name: recipe
        for recipe in (
            _MVTEC,
            _VISA,
            _MVTEC_STABLE,
            _VISA_STABLE,
            _MVTEC_UNIFIED,
            _VISA_UNIFIED,
            _APTOS,
            _OCT2017,
            _ISIC2018,
        )
    }
    | RIVALS
    | TRANSFORMERS
)
"""Recipes of the nine scripts in the paper's public code (Guo et al., NeurIPS 2023, https://arxiv.org/abs/2306.02602).

"patchcore_mvtec", "patchcore_visa", "padim_mvtec", "uniad_mvtec" and "uniad_visa" have the settings of the published
results of PatchCore, PaDiM and UniAD, see `recontrast.recipes.rivals`; "dinomaly_mvtec", "dinomaly_visa",
"inp_former_mvtec" and "inp_former_visa" those of Dinomaly and INP-Former, see `recontrast.recipes.transformers`. The
others:
"mvtec", "visa", "mvtec_stable" and "visa_stable" (appendix E), "mvtec_unified", "visa_unified", "aptos",
"oct2017" and "isic2018". To change a setting: ``RECIPES["mvtec"].replace(steps=500)``.
"""
