"""Data sets that are read by a description of where their files lie (`recontrast.data.described_set`).

Each set is prepared in MVTec AD layout; good images for validation become ``CATEGORY/validation/good``, to calibrate
with. Numbers of images are checked only where they could be verified.
"""

from recontrast.data.described_set import DescribedSet
from recontrast.data.download_tables import Listing, Table
from recontrast.data.downloads import BAD
from recontrast.data.published_counts import Counts

_NC = "CC BY-NC-SA 4.0"
_VALIDATION = ("{category}/validation/good/{name}",)
_TEST = ("{category}/test/{defect}/{stem}.{suffix}",)
_BMAD_FOLDERS = {  # category -> folder in the archive
    "Brain": "BraTS2021_slice",
    "Liver": "hist_DIY",
    "Retina_RESC": "RESC",
    "Retina_OCT2017": "OCT2017",
    "Chest": "Chest-RSNA",
    "Histopathology": "camelyon16_256",
}
DESCRIBED_SETS = {
    "mvtec_loco": DescribedSet(
        title=f"MVTec LOCO AD ({_NC}; Bergmann et al., Beyond Dents and Scratches: Logical Constraints in Unsupervised "
        "Anomaly Detection and Localization, IJCV 130, 2022)",
        categories=("breakfast_box", "juice_bottle", "pushpins", "screw_bag", "splicing_connectors"),
        marker="*/test/logical_anomalies",
        validation=_VALIDATION,
        test=_TEST,
        mask=("{category}/ground_truth/{defect}/{stem}/{name}",),
        keep={  # what sPRO needs
            "{category}/defects_config.json": "{category}/defects_config.json",
            "{category}/ground_truth/{defect}/{stem}/{name}": "{category}/defects/{defect}/{stem}/{name}",
        },
        total=Counts(1772, 1568, 575),
    ),
    "mvtec_ad_2": DescribedSet(
        title=f"MVTec AD 2 ({_NC}; Heckler-Kram et al., The MVTec AD 2 Dataset: Advanced Scenarios for Unsupervised "
        "Anomaly Detection, 2025)",
        categories=("can", "fabric", "fruit_jelly", "rice", "sheet_metal", "vial", "wallplugs", "walnuts"),
        marker="*/test_public",
        validation=_VALIDATION,
        test=("{category}/test_public/{defect}/{stem}.{suffix}",),
        mask=("{category}/test_public/ground_truth/{defect}/{stem}_mask.png",),
        total=Counts(2528, 1084, 379),
    ),
    "mvtec_3d": DescribedSet(
        title=f"MVTec 3D-AD ({_NC}; Bergmann et al., The MVTec 3D-AD Dataset for Unsupervised 3D Anomaly Detection and "
        "Localization, VISAPP 2022), its RGB images",
        categories=("bagel", "cable_gland", "carrot", "cookie", "dowel", "foam", "peach", "potato", "rope", "tire"),
        marker="*/train/good/rgb",
        train=("{category}/train/good/rgb/{name}",),
        validation=("{category}/validation/good/rgb/{name}",),
        test=("{category}/test/{defect}/rgb/{stem}.{suffix}",),
        mask=("{category}/test/{defect}/gt/{stem}.png",),
        total=Counts(2656, 1197, 249),
    ),
    "btad": DescribedSet(
        title=f"BTAD, beanTech ({_NC}; Mishra et al., VT-ADL: A Vision Transformer Network for Image Anomaly Detection "
        "and Localization, ISIE 2021)",
        categories=("01", "02", "03"),
        marker="*/train/ok",
        train=("{category}/train/ok/{name}",),
        test=_TEST,
        mask=("{category}/ground_truth/{defect}/{stem}.{suffix}",),
        good="ok",
    ),
    "mpdd": DescribedSet(
        title="MPDD (for its licence see the download; Jezek et al., Deep learning-based defect detection of metal "
        "parts: evaluating current methods in complex conditions, ICUMT 2021)",
        categories=("bracket_black", "bracket_brown", "bracket_white", "connector", "metal_plate", "tubes"),
        test=_TEST,
        mask=("{category}/ground_truth/{defect}/{stem}_mask.png",),
        total=Counts(888, 458, 176),
    ),
    "real_iad": DescribedSet(
        title=f"Real-IAD ({_NC}; Wang et al., Real-IAD: A Real-World Multi-View Dataset for Benchmarking Versatile "
        "Industrial Anomaly Detection, CVPR 2024), all five views",
        categories=(
            "audiojack", "bottle_cap", "button_battery", "end_cap", "eraser", "fire_hood", "mint", "mounts", "pcb",
            "phone_battery", "plastic_nut", "plastic_plug", "porcelain_doll", "regulator", "rolled_strip_base",
            "sim_card_set", "switch", "tape", "terminalblock", "toothbrush", "toy", "toy_brick", "transistor1",
            "u_block", "usb", "usb_adaptor", "vcpill", "wooden_beads", "woodstick", "zipper",
        ),
        marker="realiad_jsons",
        listing=Listing(
            files=("realiad_jsons/{category}.json", "realiad_jsons/realiad_jsons/{category}.json"),
            folders=("realiad_1024", "realiad_512", "realiad_256", "realiad_raw"),
        ),
        total=Counts(36465, 114585, 63256),
    ),
    "kolektor_sdd": DescribedSet(
        title=f"KolektorSDD ({_NC}; Tabernik et al., Segmentation-based deep-learning approach for surface-defect "
        "detection, Journal of Intelligent Manufacturing 31, 2020)",
        categories=("kolektor_sdd",),
        marker="kos01",
        unsplit=(r"{group:kos\d+}/{stem:Part\d+}.jpg",),
        mask=("{group}/{stem}_label.bmp",),
        labels="pixels",
        total=Counts(0, 399, 347),
    ),
    "kolektor_sdd2": DescribedSet(
        title=f"KolektorSDD2 ({_NC}; Bozic et al., Mixed supervision for surface-defect detection: from weakly to "
        "fully supervised learning, Computers in Industry 129, 2021)",
        categories=("kolektor_sdd2",),
        marker="train/*_GT.png",
        train=(r"{split:train}/{stem:\d+}.png",),  # without the stray files "10301 (copy).png", "10301_GT (copy).png"
        test=(r"{split:test}/{stem:\d+}.png",),
        mask=(r"{split:train|test}/{stem:\d+}_GT.png",),
        labels="pixels",
        total=Counts(2085, 1004, 894),
    ),
    "dagm2007": DescribedSet(
        title="DAGM 2007 (for its licence see the download; Wieler and Hahn, Weakly Supervised Learning for Industrial "
        "Optical Inspection, DAGM 2007)",
        categories=tuple(f"Class{number}" for number in range(1, 11)),
        marker="*/Train",
        train=(r"{category}/{split:Train}/{stem:\d+}.{suffix}",),
        test=(r"{category}/{split:Test}/{stem:\d+}.{suffix}",),
        mask=(r"{category}/{split:Train|Test}/Label/{stem:\d+}_label.{suffix}",),
        labels="mask",
    ),
    "aitex": DescribedSet(
        title="AITEX (for its licence see the download; Silvestre-Blanes et al., A Public Fabric Database for Defect "
        "Detection Methods and Results, Autex Research Journal 19, 2019)",
        categories=("aitex",),
        marker="NODefect_images",
        unsplit=(
            r"NODefect_images/**/{number:\d+}_{defect:000}_{fabric:\d+}.png",
            r"Defect_images/**/{number:\d+}_{defect:\d+}_{fabric:\d+}.png",
        ),
        mask=(r"Mask_images/**/{number:\d+}_{defect:\d+}_{fabric:\d+}_mask{suffix:\d*}.png",),
        good="000",
        left_out=("0100_025_08.png",),
    ),
    "bmad": DescribedSet(
        title="BMAD (licences of its sources, as its authors state them: BraTS 2021 for all purposes, BTCV and OCT2017 "
        "CC BY 4.0, LiTS CC BY-NC-SA, RESC for research, RSNA not commercial, Camelyon16 CC0; Bao et al., BMAD: "
        "Benchmarks for Medical Anomaly Detection, CVPR Workshops 2024)",
        categories=tuple(_BMAD_FOLDERS),
        marker="",
        train=("**/{category}/train/good/[img/]{name}",),
        validation=(
            "**/{category}/{split:valid|val}/good/[img/]{name}",
            "**/{category}/{split:valid|val}/img/good/{name}",  # an archive of the liver
        ),
        test=(
            "**/{category}/test/{defect:good|Ungood|ungood}/[img/]{stem}.{suffix}",
            "**/{category}/test/img/{defect:good|Ungood|ungood}/{stem}.{suffix}",
        ),
        mask=(
            "**/{category}/test/{defect:Ungood|ungood}/{folder:label|anomaly_mask}/{stem}.{suffix}",
            "**/{category}/test/{folder:label}/{defect:Ungood|ungood}/{stem}.{suffix}",
        ),
        unmasked=("Retina_OCT2017", "Chest", "Histopathology"),
        aliases={
            **{alias: name for name, folder in _BMAD_FOLDERS.items() for alias in (name, f"{name}_AD", folder)},
            "camelyon16": "Histopathology",  # in its README
        },
        defects={"Ungood": BAD, "ungood": BAD},
    ),
    "ham10000": DescribedSet(
        title="HAM10000 (CC BY-NC 4.0; Tschandl et al., The HAM10000 dataset, a large collection of multi-source "
        "dermatoscopic images of common pigmented skin lesions, Scientific Data 5, 2018)",
        categories=("ham10000",),
        marker="HAM10000_metadata.csv",
        unsplit=(r"[{folder:HAM10000_images\w*}/]{stem:ISIC_\d+}.jpg",),
        good="nv",
        labels=Table("HAM10000_metadata.csv", image="image_id", label="dx", group="lesion_id"),
        total=Counts(0, 10015, 6705),
    ),
}  # fmt: skip
"""Data sets by the name that ``recontrast prepare`` takes."""
