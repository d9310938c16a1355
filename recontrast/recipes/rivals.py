"""Recipes of PatchCore, PaDiM and UniAD with the settings of their published results.

Each recipe states the settings of the script or configuration that it follows. What a recipe cannot express, and can
move the result, is listed above it. All of these codes resize masks by nearest neighbour or count only pixels of full
scale; ``mask_rule="half"`` is the closest rule here.
"""

from recontrast.recipes.recipe import Recipe

# PatchCore (Roth et al., CVPR 2022, https://arxiv.org/abs/2106.08265), the baseline "IM224" of sample_training.sh in
# github.com/amazon-science/patchcore-inspection: WideResNet-50-2, layers 2 and 3, 3 x 3 neighbourhoods averaged down to
# 1024 values, a coreset of 10 %, one neighbour, seed 0. The image score is that of the worst point, before upsampling
# and blur. Not as in the code:
# - Its coreset is approximate: distances start from the mean over ten random vectors. Here the selection is exact.
# - It resizes the short side to 256 pixels and crops 224 x 224. Here both sides become 256, which is the same for the
#   square images of MVTec AD.
_PATCHCORE_MVTEC = Recipe(
    name="patchcore_mvtec", architecture="patchcore", size=256, crop=224, batch=2, levels=(2, 3), bank_share=0.1,
    bank_embedding="unfold", bank_neighbours=1, score="model", mask_rule="half", seed=0,
)  # fmt: skip

# The authors publish no settings for VisA; these are those of MVTec AD. The images of VisA are not square, so that the
# crop shows more of the long side than that of the code would.
_PATCHCORE_VISA = _PATCHCORE_MVTEC.replace(name="patchcore_visa")

# PaDiM (Defard et al., 2020, https://arxiv.org/abs/2011.08785), "WR50-Rd550". The authors publish no code; the settings
# that their paper leaves open are those of github.com/xiahaifeng1995/PaDiM-Anomaly-Detection-Localization-master:
# 550 of the 1792 channels, a regularisation of 0.01, blur with sigma 4, and the maximum of the blurred map. Not as in
# that code: the channels are drawn by another generator (seed 1024 of Python's there), and images are resized with a
# bilinear filter (Lanczos there).
_PADIM_MVTEC = Recipe(
    name="padim_mvtec", architecture="padim", size=256, crop=224, batch=32, levels=3, gaussian_features=550,
    mask_rule="half", seed=1024,
)  # fmt: skip

# UniAD (You et al., NeurIPS 2022, https://arxiv.org/abs/2206.03687), experiments/MVTec-AD/config.yaml in
# github.com/zhiyuanyou/UniAD: one model for all categories, EfficientNet-B4, AdamW with learning rate 1e-4, which drops
# to a tenth after 80 % of 1000 epochs, gradients clipped to 0.1, jitter 20, seed 133. Its results come from 8 GPUs with
# 8 images each: 57 steps of 64 images per epoch of MVTec AD. The map is not blurred, and the image score is the largest
# mean of 16 x 16 pixels. Not as in the code:
# - It also reconstructs the 24 channels at stride 2, of 272 in all. Levels here start at stride 4: 248 channels.
# - It reports the best of 100 evaluations on the test images, by their pixel AUROC. Here the last step counts.
_UNIAD_MVTEC = Recipe(
    name="uniad_mvtec", architecture="uniad", backbone="tf_efficientnet_b4.aa_in1k", size=224, batch=64, steps=57_000,
    decoder_lr=1e-4, weight_decay=1e-4, lr_drop=0.1, lr_drop_at=0.8, clip=0.1, jitter=20.0, levels=3, encoder_bn="eval",
    blur=None, score="model", mask_rule="half", seed=133,
)  # fmt: skip

# The authors publish no settings for VisA; these are those of MVTec AD, also 1000 epochs: of 8,659 images, 136 steps.
_UNIAD_VISA = _UNIAD_MVTEC.replace(name="uniad_visa", steps=136_000)

RIVALS: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (_PATCHCORE_MVTEC, _PATCHCORE_VISA, _PADIM_MVTEC, _UNIAD_MVTEC, _UNIAD_VISA)
}
"""Recipes of other methods with the settings of their published results."""
