"""Numbers published in the paper and in the logs of its code, in [0, 1].

Sources: the tables named below of Guo et al., NeurIPS 2023 (https://arxiv.org/abs/2306.02602), and
``saved_results/*/log.txt`` of its public code, last iteration, seed 111. AUPRO has the per-image form of that code
(`recontrast.metrics.aupro`). The unified rows are an exception: they come from Table 1 of Dinomaly
(https://arxiv.org/abs/2405.14325), and their AUPRO is that of the whole data set.
"""

Numbers = dict[str, float]  # field of `recontrast.evaluation.results.Row` -> value in [0, 1]


def _parse_rows(metrics: str, text: str) -> dict[str, Numbers]:
    """Parse lines with a name and one percentage for each of the ``metrics``; "-" stands for a missing number."""
    rows = {}
    for line in text.strip().splitlines():
        name, *values = line.split()
        cells = zip(metrics.split(), values, strict=True)
        rows[name] = {metric: round(float(value) / 100, 6) for metric, value in cells if value != "-"}
    return rows


# Log recontrast_mvtec_it2k_lr2e31e5_wd1e5_hm1d01_s111. Table 2 gives 99.5, 98.4, 95.2. Table A2 gives the mean and
# standard deviation over three seeds: 99.42 +- 0.05, 98.39 +- 0.01, 95.21 +- 0.06.
MVTEC = _parse_rows(
    "i_auroc p_auroc aupro_per_image",
    """
    carpet 99.76 99.26 97.90
    grid 100 99.21 97.82
    leather 100 99.45 99.22
    tile 99.75 96.32 93.65
    wood 99.04 95.88 92.54
    bottle 100 98.99 97.09
    cable 99.76 98.94 95.64
    capsule 97.73 98.40 95.36
    hazelnut 100 99.06 95.86
    metal_nut 100 98.70 94.42
    pill 98.64 99.10 97.73
    screw 97.95 99.57 98.57
    toothbrush 100 99.17 94.98
    transistor 99.71 95.40 82.34
    zipper 99.47 98.12 94.87
    mean 99.45 98.37 95.20
    """,
)

# Logs recontrast_visa_es_it3k_*. Table 3 gives 97.5, 98.2, 92.6.
VISA = _parse_rows(
    "i_auroc p_auroc aupro_per_image",
    """
    candle 97.20 99.15 94.77
    capsules 93.55 99.46 94.45
    cashew 98.14 97.41 94.28
    chewinggum 99.28 97.63 86.63
    fryum 97.56 91.96 79.11
    macaroni1 98.84 99.01 93.63
    macaroni2 91.79 99.04 97.36
    pcb1 97.86 99.79 96.76
    pcb2 97.84 98.99 92.47
    pcb3 98.18 99.05 95.14
    pcb4 99.82 98.70 91.29
    pipe_fryum 99.96 98.30 95.57
    mean 97.50 98.21 92.62
    """,
)

# Logs recontrast_aptos_*, recontrast_oct_*, recontrast_isic_*, which agree with Table 5. F1 and accuracy are at the
# threshold with the best F1 on the test images.
MEDICAL = _parse_rows(
    "i_auroc i_f1 i_accuracy",
    """
    aptos 97.51 95.27 93.35
    oct2017 99.60 98.53 97.80
    isic2018 90.15 81.12 86.01
    """,
)

# Appendix E, means; no log is published.
STABLE = _parse_rows("i_auroc", "mvtec 99.41\nvisa 97.28")

# Table 1 of Dinomaly, for the public code, which uses amsgrad. Table 4 of the paper gives I-AUROC 98.2 and 95.1. No
# numbers by category are published.
UNIFIED = _parse_rows(
    "i_auroc i_ap i_f1 p_auroc p_ap p_f1 aupro",
    """
    mvtec 98.3 99.4 97.6 97.1 60.2 61.5 93.2
    visa 95.5 96.4 92.0 98.5 47.9 50.6 91.9
    """,
)

# Rivals. PatchCore: Tables 1 to 3 of the paper (on MVTec AD those of Roth et al. for a bank of 25 %, which differ from
# those for 10 % by 0.1). PaDiM: WR50-Rd550 of Defard et al. UniAD, one detector for all categories:
# Table 1 of Dinomaly; Table 4 of the paper gives I-AUROC 96.5 and 91.5. Dinomaly and INP-Former with a ViT-B,
# one detector for all categories: Table 1 of Dinomaly; assets/multi-class-tab.png in the code of INP-Former.
RIVALS = _parse_rows(
    "i_auroc i_ap i_f1 p_auroc p_ap p_f1 aupro",
    """
    patchcore/mvtec 99.1 - - 98.1 - - 93.4
    patchcore/visa 95.1 - - 98.8 - - 91.2
    padim/mvtec 95.3 - - 97.5 - - 92.1
    uniad/mvtec 96.5 98.8 96.2 96.8 43.4 49.5 90.7
    uniad/visa 88.8 90.8 85.8 98.3 33.7 39.0 85.5
    dinomaly/mvtec 99.6 99.8 99.0 98.4 69.3 69.2 94.8
    dinomaly/visa 98.7 98.9 96.2 98.7 53.2 55.7 94.5
    inp_former/mvtec 99.7 99.9 99.2 98.5 71.0 69.7 94.9
    inp_former/visa 98.9 99.0 96.6 98.9 51.2 54.7 94.4
    """,
)

# Table 6, last iteration: MVTec AD and APTOS.
ABLATION = _parse_rows(
    "i_auroc aupro_per_image",
    """
    A 95.31 93.34
    B 98.86 94.51
    B+hm 99.00 94.86
    C 91.54 88.24
    D 94.64 84.11
    C+cp 97.59 93.76
    E-gl 98.93 94.65
    E 99.13 94.59
    ours 99.45 95.20
    """,
)
ABLATION_APTOS = _parse_rows(
    "i_auroc",
    """
    A 90.12
    B 92.49
    B+hm 93.87
    C 90.71
    D 93.06
    C+cp 92.68
    E-gl 96.39
    E 97.32
    ours 97.51
    """,
)

# Table A4, MVTec AD, by the final value of alpha.
ALPHA = _parse_rows("i_auroc", "-2 99.13\n-1 99.13\n0 99.14\n0.5 99.32\n1 99.45\n1.5 99.38\n2 98.85")

# Table A5, MVTec AD. RD4AD was trained as in its own paper.
BACKBONES = _parse_rows(
    "i_auroc aupro_per_image",
    """
    resnet18/RD4AD 97.9 91.2
    resnet18/ours 98.7 94.2
    resnet50/RD4AD 98.4 93.1
    resnet50/ours 99.1 95.0
    wide_resnet50_2/RD4AD 98.5 93.9
    wide_resnet50_2/ours 99.5 95.2
    """,
)

# Table A6, by the target features of the map: those of the frozen encoder, of the trained one, or both.
MAPS = _parse_rows("i_auroc", "frozen 99.16\ntrained 99.38\nboth 99.45")
MAPS_APTOS = _parse_rows("i_auroc", "frozen 95.32\ntrained 97.73\nboth 97.51")
