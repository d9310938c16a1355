"""Recipes of Dinomaly and INP-Former with the settings of their published results: one detector for all categories.

Each recipe states the settings of the script that it follows. What both scripts share:

- The encoder is DINOv2 with four registers, ViT-B/14, frozen; its middle blocks 2 to 9 are rebuilt in two groups.
- Images are resized to 448 x 448 pixels, then 392 x 392 are cropped; there is no augmentation.
- Maps are computed at 392 pixels, resized to 256 without smoothing, and blurred with 5 taps, sigma 4, and zeros outside
  (``get_gaussian_kernel``). The image score is the mean of the highest 1 % of the pixels. Masks are resized to 256 by
  nearest neighbour.
- StableAdamW with amsgrad, eps 1e-10, weight decay 1e-4 for all weights, and gradients clipped to a norm of 0.1. The
  learning rate rises over 100 steps, the first of which has rate zero, and falls to a tenth by a cosine.
- The last, smaller batch of an epoch is left out. Seed 1.

Not as in the codes: the position embeddings of 37 x 37 patches are resampled to 28 x 28 as timm does it, with
antialiasing; the codes resample without it, by a scale factor with an offset of 0.1 patches. Batches come in another
random order.
"""

from recontrast.recipes.recipe import Recipe

# Dinomaly (Guo et al., CVPR 2025, https://arxiv.org/abs/2405.14325), dinomaly_mvtec_uni.py and dinomaly_visa_uni.py in
# github.com/guojiajeremy/Dinomaly: 10,000 steps at a rate of 2e-3. The share of hard points falls from 1 to 0.1 over
# 1000 steps; the gradient of the others is multiplied by 0.1. Any pixel of a resized mask above zero counts.
_DINOMALY_MVTEC = Recipe(
    name="dinomaly_mvtec", architecture="dinomaly", backbone="vit_base_patch14_reg4_dinov2.lvd142m", size=448, crop=392,
    map_size=256, batch=16, steps=10_000, drop_last=True, layers=((2, 3, 4, 5), (6, 7, 8, 9)), bottleneck_dropout=0.2,
    rule="hardest", fraction_start=1.0, fraction_end=0.1, ramp=0.1, factor=0.1, optimiser="stableadamw",
    decoder_lr=2e-3, weight_decay=1e-4, eps=1e-10, amsgrad=True, clip=0.1, schedule="cosine_from_zero", warmup=0.01,
    lr_end=0.1, blur="zero5", reduce="mean", score=0.01, mask_rule="any", encoder_bn="eval", seed=1,
)  # fmt: skip
_DINOMALY_VISA = _DINOMALY_MVTEC.replace(name="dinomaly_visa")

# INP-Former (Luo et al., CVPR 2025, https://arxiv.org/abs/2503.02424), INP_Former_Multi_Class.py in
# github.com/luow23/INP-Former: 200 epochs at a rate of 1e-3, of 226 steps on MVTec AD (3,629 images) and of 541 on VisA
# (8,659 images). Six prototypes, class and register tokens left out, no dropout. The gradient is weighted by the third
# power of the relative distance; the coherence loss counts 0.2. Pixels of at least half of full scale count.
_INP_FORMER_MVTEC = _DINOMALY_MVTEC.replace(
    name="inp_former_mvtec", architecture="inp_former", steps=200 * (3629 // 16), rule="power",
    exponent_start=3.0, exponent_end=3.0, prototypes=6, coherence=0.2, decoder_lr=1e-3, factor=0.0,
    warmup=100 / (200 * (3629 // 16)), mask_rule="half",
)  # fmt: skip
_VISA_STEPS = 200 * (8659 // 16)
_INP_FORMER_VISA = _INP_FORMER_MVTEC.replace(name="inp_former_visa", steps=_VISA_STEPS, warmup=100 / _VISA_STEPS)

TRANSFORMERS: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (_DINOMALY_MVTEC, _DINOMALY_VISA, _INP_FORMER_MVTEC, _INP_FORMER_VISA)
}
"""Recipes of methods that rebuild the features of a vision transformer."""
