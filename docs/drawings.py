"""The drawings that explain the method, as SVG cards in ``docs/figures``: ``python docs/drawings.py``."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from charts import WIDTH, save_svg, text

FIGURES = Path(__file__).parent / "figures"
TIMES = "\N{MULTIPLICATION SIGN}"
LINE = 20  # units from one line of text to the next


def box(x: float, y: float, width: float, height: float, label: str = "", kind: str = "box") -> str:
    """A rounded box with centred lines of text."""
    lines = label.split("\n") if label else []
    first = y + height / 2 + 5.5 - (len(lines) - 1) * LINE / 2
    words = [text(x + width / 2, first + LINE * i, line, "middle") for i, line in enumerate(lines)]
    return f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>' + "".join(words)


def arrow(*points: tuple[float, float], kind: str = "arrow") -> str:
    """A line through ``points`` with a head at its end."""
    return f'<polyline class="{kind}" points="{" ".join(f"{x},{y}" for x, y in points)}"/>'


def model() -> tuple[int, list[str]]:
    """Two encoders, one bottleneck and decoder, and the pairs that are compared."""
    return 330, [
        box(200, 14, 120, 36, "image"),
        arrow((230, 50), (130, 78)),
        arrow((290, 50), (390, 78)),
        box(30, 80, 200, 56, "frozen encoder\n(pretrained, fixed)"),
        box(290, 80, 200, 56, "trained encoder\n(small steps)", "accent"),
        arrow((150, 136), (230, 168)),
        arrow((370, 136), (290, 168)),
        box(150, 170, 220, 56, "bottleneck and decoder\n(trained)", "accent"),
        arrow((200, 226), (130, 258)),
        arrow((320, 226), (390, 258)),
        box(30, 260, 200, 56, "features of the\nfrozen one, rebuilt"),
        box(290, 260, 200, 56, "features of the\ntrained one, rebuilt"),
        arrow((60, 136), (60, 258), kind="arrow dashed"),
        arrow((460, 136), (460, 258), kind="arrow dashed"),
        text(68, 200, "compare"),
        text(452, 200, "compare", "end"),
    ]


def three_sums() -> tuple[int, list[str]]:
    """Features, the three sums of each point, and what follows from them."""
    sums = ("⟨x, y⟩", "⟨x, x⟩", "⟨y, y⟩")
    results = (
        "distance\nof each point",
        "hard points\n(mean, deviation)",
        "loss: cosine of\nthe whole map",
        "anomaly\nmap",
    )
    elements = [
        box(40, 16, 200, 56, "features x\n(C channels)"),
        box(280, 16, 200, 56, "features y\n(C channels)"),
        arrow((140, 72), (220, 98)),
        arrow((380, 72), (300, 98)),
        box(70, 100, 380, 66, "", "accent"),
        text(260, 122, "one operator: three sums for each point", "middle"),
        *(text(140 + 120 * i, 150, name, "middle", "bold") for i, name in enumerate(sums)),
    ]
    for i, label in enumerate(results):
        x, y = 14 + (i % 2) * 268, 200 + (i // 2) * 76
        elements.append(box(x, y, 224, 60, label))
    elements += [
        arrow((190, 166), (150, 198)),
        arrow((330, 166), (370, 198)),
        arrow((260, 166), (260, 306), (240, 306)),
        arrow((260, 306), (280, 306)),
    ]
    return 350, elements


def banded() -> tuple[int, list[str]]:
    """The band of an upsampling and blurring matrix, in the equation of the map."""
    cells, step = [], 12
    rows, columns = 16, 5
    for row in range(rows):
        centre = row * (columns - 1) / (rows - 1)
        for column in range(columns):
            weight = max(0.0, 1 - abs(column - centre) / 1.3)
            if weight:
                cells.append(f'<rect class="good" x="{36 + column * step}" y="{40 + row * step}" width="{step - 1}" '
                             f'height="{step - 1}" opacity="{0.25 + 0.75 * weight:.2f}"/>')  # fmt: skip
                cells.append(f'<rect class="good" x="{242 + row * step}" y="{106 + column * step}" width="{step - 1}" '
                             f'height="{step - 1}" opacity="{0.25 + 0.75 * weight:.2f}"/>')  # fmt: skip
    return 282, [
        f'<rect class="box" x="34" y="38" width="{columns * step + 3}" height="{rows * step + 3}"/>',
        f'<rect class="box" x="240" y="104" width="{rows * step + 3}" height="{columns * step + 3}"/>',
        *cells,
        box(140, 104, 63, 63, "D"),
        text(120, 142, TIMES, "middle", "bold"),
        text(222, 142, TIMES, "middle", "bold"),
        text(66, 28, "K (rows)", "middle"),
        text(172, 94, "distances", "middle"),
        text(338, 94, "Kᵀ (columns)", "middle"),
        text(478, 142, "= map", "middle", "bold"),
        text(WIDTH / 2, 266, f"K = blur {TIMES} upsampling: zero off a narrow band", "middle"),
    ]


def sweep() -> tuple[int, list[str]]:
    """Sorted scores with a threshold that moves through them once."""
    scores = np.array([0.97, 0.93, 0.88, 0.86, 0.79, 0.74, 0.66, 0.61, 0.5, 0.46, 0.37, 0.3, 0.26, 0.2, 0.13, 0.1])
    defects = {0, 1, 3, 4, 7, 10}
    elements = []
    for i, score in enumerate(scores):
        kind = "defect" if i in defects else "calibration"
        height = 90 * score
        elements.append(
            f'<rect class="{kind}" x="{30 + 29 * i}" y="{134 - height:.0f}" width="20" height="{height:.0f}"/>'
        )
    return 270, [
        text(30, 26, "scores, sorted; defects in colour"),
        *elements,
        '<line class="threshold" x1="199" y1="38" x2="199" y2="150"/>',
        arrow((199, 156), (300, 156)),
        text(190, 160, "threshold", "end"),
        box(30, 178, 460, 34, "counts so far: true and false positives, overlap", "accent"),
        arrow((260, 212), (260, 226)),
        text(WIDTH / 2, 246, "ROC · precision and recall · F1 · PRO", "middle", "bold"),
    ]


def cache() -> tuple[int, list[str]]:
    """What is computed once, and what every step computes."""
    return 236, [
        box(12, 20, 104, 84, "image\nfile"),
        arrow((116, 62), (174, 62)),
        box(176, 20, 104, 84, "pixels\n(kept)", "accent"),
        arrow((280, 62), (338, 62)),
        box(340, 20, 168, 84, "features of the\nfrozen encoder\n(kept)", "accent"),
        text(144, 54, "once", "middle"),
        text(308, 54, "once", "middle"),
        arrow((228, 104), (228, 154)),
        arrow((424, 104), (424, 154)),
        box(120, 156, 388, 60, "every step: trained encoder, bottleneck,\ndecoder, loss"),
    ]


def export() -> tuple[int, list[str]]:
    """The exported graph with its input and outputs."""
    outputs = ("map", "score", "p_value", "defect")
    elements = [
        box(12, 76, 120, 76, "image: bytes\n(N, H, W, 3)\nany size"),
        arrow((132, 114), (168, 114)),
        box(170, 20, 200, 188, "resize\nnormalise\nnetwork\nmap and score\ndecision", "accent"),
        text(270, 40, "detector.onnx", "middle", "bold"),
    ]
    for i, name in enumerate(outputs):
        elements += [arrow((370, 42 + 48 * i), (408, 42 + 48 * i)), box(410, 24 + 48 * i, 96, 36, name)]
    return 228, elements


def many_machines() -> tuple[int, list[str]]:
    """A list of images, workers, and the table that they write."""
    elements = [box(10, 88, 130, 64, "list of images,\nin parts")]
    for i in range(3):
        y = 20 + 72 * i
        label = "worker, lost" if i == 1 else "worker\n(one model)"
        elements += [box(204, y, 114, 56, label, "box" if i == 1 else "accent"), arrow((140, 120), (202, y + 28))]
        if i != 1:
            elements.append(arrow((318, y + 28), (372, 120)))
    elements += [
        box(374, 88, 136, 64, "scores.parquet,\nin parts"),
        arrow((261, 148), (261, 162), kind="arrow dashed"),
    ]
    return 244, [*elements, text(330, 196, "does its part again")]


DRAWINGS: Sequence = (model, three_sums, banded, sweep, cache, export, many_machines)

if __name__ == "__main__":
    for draw in DRAWINGS:
        save_svg(FIGURES / f"{draw.__name__}.svg", draw())
