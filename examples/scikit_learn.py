"""The detector as a scikit-learn estimator: python examples/scikit_learn.py"""

import argparse
from pathlib import Path

import joblib
import numpy as np
from sklearn.metrics import confusion_matrix, roc_auc_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold

from recontrast import Recipe, ReContrastDetector
from recontrast.data.datasets import load
from recontrast.data.synthetic import make_demo

options = argparse.ArgumentParser(description=__doc__)
options.add_argument(
    "--data", type=Path, default=Path("demo-data"), help="made if it is not there (default: %(default)s)"
)
options.add_argument("--category", default="brick")
options.add_argument("--steps", type=int, default=60)
options.add_argument("--size", type=int, default=128, help="pixels")
options.add_argument("--backbone", default="tf_efficientnet_lite0", help="timm's name")
options.add_argument("--weights", default="package", help='a file, "package" or "random"')
args = options.parse_args()

samples = load(make_demo(args.data), [args.category])[args.category]
good = [s.path for s in samples if s.split == "train"]
X = [s.path for s in samples if s.split == "test"]  # paths; PIL images and uint8 arrays do as well
y = np.array([-1 if s.label else 1 for s in samples if s.split == "test"])  # scikit-learn's: +1 good, -1 a defect

# Fit on good images alone. Some are held out, so that of new good images of this kind at most a tenth are false alarms.
recipe = Recipe(backbone=args.backbone, weights=args.weights, steps=args.steps, size=args.size, batch=8, ramp=1.0)
detector = ReContrastDetector(recipe, false_alarm_rate=0.1, random_state=0).fit(good)
found = detector.predict(X)
print(
    f"{args.category}: fitted on {len(good)} good images, {len(detector.held_out_)} of them held out for the threshold"
)
print(f"AUROC {100 * roc_auc_score(y, detector.score_samples(X)):.1f}")
print("good called good, good called defect / defect called good, defect called defect:")
print(confusion_matrix(y, found, labels=[1, -1]))
print("p-values of the first good and defective image:", *(detector.p_values([X[i]])[0].round(3) for i in (0, -1)))
print("maps:", detector.anomaly_maps(X[:2]).shape)

# Choose the learning rate of the encoder by cross-validation. Defects (-1) only score: fit leaves them out.
grid = {"encoder_lr": [0.0, 1e-4], "steps": [max(args.steps // 2, 1)]}
search = GridSearchCV(detector, grid, scoring="roc_auc", cv=StratifiedKFold(2), refit=False)
search.fit([*good, *X], [1] * len(good) + y.tolist())
for parameters, mean in zip(search.cv_results_["params"], search.cv_results_["mean_test_score"], strict=True):
    print(f"encoder_lr {parameters['encoder_lr']:g}: AUROC {100 * mean:.1f} in cross-validation")

joblib.dump(detector, args.data / "detector.joblib")  # for Python; .save("detector.pt") is for `recontrast predict`
same = joblib.load(args.data / "detector.joblib").score_samples(X)
print("read from the disk, it scores the same:", np.array_equal(same, detector.score_samples(X)))
