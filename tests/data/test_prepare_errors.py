"""recontrast prepare with invalid input: an error of one sentence, exit status 2, and no files left behind."""

import errno
import os
import shutil

import pytest
from downloads import APTOS_IDS, DOWNLOADS, write_mask
from PIL import Image
from typer.testing import CliRunner

from recontrast.app.cli import app
from recontrast.data import downloads

VISA = "VisA/split_csv/1cls.csv"
ISIC = "ISIC2018_Task3_Training_GroundTruth/ISIC2018_Task3_Training_GroundTruth.csv"
OCT = "ZhangLabData/CellData/OCT"
CLASSES = "MEL, NV, BCC, AKIEC, BKL, DF, VASC"


def run_command(*arguments):
    """Run ``recontrast prepare``."""
    return CliRunner().invoke(app, ["prepare", *map(str, arguments)])


def run_failing_command(*arguments):
    """Run ``recontrast prepare``, check that it fails, and return the error message."""
    result = run_command(*arguments)
    lines = [line for line in result.stderr.splitlines() if line.startswith("recontrast: ")]
    assert result.exit_code == 2, result.output
    assert len(lines) == 1 and "Traceback" not in result.output
    return lines[0].removeprefix("recontrast: ")


@pytest.fixture
def error_for(download, tmp_path):
    """Return a function that damages a download, prepares it, and returns the error message."""

    def call(name, damage):
        source = download(name)
        damage(source)
        message = run_failing_command(name, "--source", source, "--out", tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["downloads"]
        return message.replace(str(source), "SOURCE")

    return call


def replace_line(path, number, text):
    lines = path.read_text().splitlines()
    lines[number - 1 : number] = [text]
    path.write_text("\n".join(lines) + "\n")


def without(*patterns):
    """Return a function that deletes files and folders of a download."""

    def damage(source):
        for pattern in patterns:
            for path in list(source.glob(pattern)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


# ---- tables ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, text, expected",
    [
        (1, "object,split,label,image",
         ": wanted the columns image, object, split, label, mask, got object, split, label, image: mask is missing"),
        (2, "candle,train,normal", " line 2: wanted 5 cells, one for each column, got 3"),
        (3, "candle,val,normal,candle/Data/Images/Normal/0002.JPG,",
         " line 3: wanted the split train or test, got 'val'"),
        (3, "candle,train,anomaly,candle/Data/Images/Anomaly/009.JPG,x.png",
         " line 3: wanted normal images for training, got one with the label anomaly"),
        (3, "candle,train,normal,candle/Data/Images/Normal/0007.JPG,",
         " line 3: wanted each image once, got candle/Data/Images/Normal/0007.JPG again, as in line 2"),
        (4, "candle,train,normal,candle/Data/Images/Normal/0999.JPG,",
         " line 4: wanted the image SOURCE/VisA/candle/Data/Images/Normal/0999.JPG, got no such file"),
        (6, "candle,test,anomaly,candle/Data/Images/Anomaly/000.JPG,",
         " line 6: wanted the path of its mask below SOURCE/VisA, got ''"),
        (3, "candle,train,normal,../../secret.png,",
         " line 3: wanted the path of its image below SOURCE/VisA, got '../../secret.png'"),
        (3, "candle,train,normal,/secret.png,",
         " line 3: wanted the path of its image below SOURCE/VisA, got '/secret.png'"),
        (3, "../x,train,normal,candle/Data/Images/Normal/0002.JPG,",
         " line 3: wanted the name of an object, got '../x'"),
    ],
)  # fmt: skip
def test_tables_of_visa(error_for, line, text, expected):
    assert error_for("visa", lambda source: replace_line(source / VISA, line, text)) == f"SOURCE/{VISA}{expected}"


@pytest.mark.parametrize(
    "name, table, line, text, expected",
    [
        ("aptos", "train.csv", 1, "id,diagnosis",
         ": wanted the columns id_code, diagnosis, got id, diagnosis: id_code is missing"),
        ("aptos", "train.csv", 3, "01c1434d8d7,5", " line 3: wanted a diagnosis from 0 to 4, got '5'"),
        ("aptos", "train.csv", 3, "ffc1434d8d7,0",
         " line 3: wanted the image SOURCE/train_images/ffc1434d8d7.png, got no such file"),
        ("isic2018", ISIC, 1, "image,MEL,NV,BCC,AKIEC,BKL,DF",
         f": wanted the columns image, {CLASSES}, got image, {CLASSES[:-6]}: VASC is missing"),
        ("isic2018", ISIC, 2, "ISIC_0024306,1.0,1.0,0.0,0.0,0.0,0.0,0.0",
         f" line 2: wanted one of {CLASSES} to be 1, got 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0"),
        ("isic2018", ISIC, 2, "ISIC_0024306,no,yes,no,no,no,no,no",
         f" line 2: wanted one of {CLASSES} to be 1, got no, yes, no, no, no, no, no"),
        ("isic2018", ISIC, 2, "ISIC_0000000,0,1,0,0,0,0,0",
         " line 2: wanted the image SOURCE/ISIC2018_Task3_Training_Input/ISIC_0000000.jpg, got no such file"),
    ],
)  # fmt: skip
def test_tables_of_the_medical_sets(error_for, name, table, line, text, expected):
    assert error_for(name, lambda source: replace_line(source / table, line, text)) == f"SOURCE/{table}{expected}"


def test_missing_files_are_reported_in_one_error(error_for):
    assert error_for("visa", without("VisA/pcb1/Data")) == (
        f"SOURCE/{VISA} line 8: wanted the image SOURCE/VisA/pcb1/Data/Images/Normal/0007.JPG, got no such file, "
        "and 7 more are missing"
    )


def test_two_files_with_one_target(error_for):
    def damage(source):
        text = (source / VISA).read_text().replace("pcb1,train,normal,pcb1/Data/Images/Normal/0007.JPG,\n", "")
        (source / VISA).write_text(text + "candle,train,normal,pcb1/Data/Images/Normal/0007.JPG,\n")

    assert error_for("visa", damage) == (
        "SOURCE/VisA/pcb1/Data/Images/Normal/0007.JPG: wanted one file for candle/train/good/0007.JPG, "
        "got SOURCE/VisA/candle/Data/Images/Normal/0007.JPG for the same target"
    )


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", "wanted the columns id_code, diagnosis, got an empty file: id_code is missing"),
        (b"id_code,diagnosis\n\n", "wanted a CSV table with at least one line below its header, got none"),
        (b"\xff\xfe\x00", "wanted text in UTF-16-LE, got truncated data"),
        (b'id_code,diagnosis\n"' + b"x" * 200_000, "wanted a CSV table, got one that cannot be read (field larger"),
    ],
    ids=["empty", "header", "binary", "quote"],
)
def test_files_that_are_not_tables(error_for, content, expected):
    message = error_for("aptos", lambda source: (source / "train.csv").write_bytes(content))
    assert message.startswith(f"SOURCE/train.csv: {expected}")


def test_tables_from_other_programs(download):
    """Byte order mark, line ends, further columns, their order, blanks and empty lines do not matter."""
    source = download("aptos")
    expected = downloads.read_aptos(source)
    rows = [line.split(",") for line in (source / "train.csv").read_text().splitlines()]
    text = "\r\n\r\n".join(f"{grade}, {name} ,x" for name, grade in rows)
    (source / "train.csv").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n,,\r\n")
    assert downloads.read_aptos(source) == expected


# ---- incomplete downloads ---------------------------------------------------------------


def only_test_rows(source):
    lines = [line for line in (source / VISA).read_text().splitlines() if "pcb1,train" not in line]
    (source / VISA).write_text("\n".join(lines))


def only_anomalous(source):
    lines = (source / "train.csv").read_text().splitlines()
    (source / "train.csv").write_text("\n".join([lines[0], *(line[:-1] + "4" for line in lines[1:])]))


def twice(source):
    shutil.copytree(source, source.with_name("copy"))
    for name in ("x", "y"):
        shutil.copytree(source.with_name("copy"), source / "again" / name)
    without("ISIC*")(source)
    shutil.rmtree(source.with_name("copy"))


@pytest.mark.parametrize(
    "name, damage, expected",
    [
        ("mvtec", without("*/bottle/train/good/*"),
         "SOURCE/mvtec_anomaly_detection/bottle/train/good: wanted a folder with image files"),
        ("mvtec", without("*/bottle/train"),
         "SOURCE/mvtec_anomaly_detection/bottle/train/good: wanted the folder of good training images, got no such"),
        ("mvtec", without("*"), "SOURCE: wanted CATEGORY/train/good, as MVTec AD unpacks, got an empty folder"),
        ("visa", only_test_rows, "SOURCE/VisA: wanted good training images of pcb1, got only 3 test images"),
        ("visa", without("*/split_csv"),
         "SOURCE: wanted split_csv/1cls.csv of the VisA download, or the one-class layout CATEGORY/train/good, got V"),
        ("aptos", without("train.csv"),
         "SOURCE: wanted train.csv and train_images/, as APTOS 2019 unpacks, got sample_submission.csv, test.csv, "),
        ("aptos", only_anomalous, "SOURCE: wanted good training images of aptos, got only 9 test images"),
        ("oct2017", without("*/*/*/train/NORMAL"),
         "SOURCE: wanted train/NORMAL and test/NORMAL, as OCT2017 unpacks, got ZhangLabData"),
        ("oct2017", without("*/*/*/test/NORMAL"),
         f"SOURCE/{OCT}: wanted test/NORMAL beside train/NORMAL, as OCT2017 unpacks, got test, train"),
        ("oct2017", without("*/*/*/train/NORMAL/*"),
         f"SOURCE/{OCT}/train/NORMAL: wanted a folder with image files"),
        ("isic2018", without("*_Training_Input"), "SOURCE: wanted ISIC2018_Task3_Training_Input, "),
        ("isic2018", without("*_Validation_GroundTruth"),
         "SOURCE/ISIC2018_Task3_Validation_GroundTruth.csv: wanted a CSV table, got no such file"),
        ("isic2018", twice, "SOURCE: wanted one folder with ISIC2018_Task3_Training_Input, ..._GroundTruth and "),
    ],
)  # fmt: skip
def test_missing_parts(error_for, name, damage, expected):
    assert error_for(name, damage).startswith(expected)


MASK = "VisA/pcb1/Data/Masks/Anomaly/001.png"
EYE = f"train_images/{APTOS_IDS[3]}.png"


@pytest.mark.parametrize(
    "name, damage, expected",
    [
        ("visa", lambda source: write_mask(source / MASK, 9, (16, 12)),
         f"SOURCE/{MASK}: wanted a mask of the size of its image SOURCE/VisA/pcb1/Data/Images/Anomaly/001.JPG, "
         "12 x 16 (height x width), got 16 x 12"),
        ("visa", lambda source: (source / MASK).write_bytes(b"%PDF-1.7"),
         f"SOURCE/{MASK}: wanted a PNG, JPEG, BMP, TIFF, WebP, GIF, Netpbm, JPEG 2000, AVIF or DICOM image, "
         "got a file that starts with b'%PDF-1.7'"),
        ("aptos", lambda source: Image.new("RGB", (9, 9), (9, 10, 11)).save(source / EYE),
         f"SOURCE/{EYE}: wanted a fundus photograph, got one without a pixel brighter than 30"),
        ("aptos", lambda source: (source / EYE).write_bytes(b""),
         f"SOURCE/{EYE}: wanted a PNG, JPEG, BMP, TIFF, WebP, GIF, Netpbm, JPEG 2000, AVIF or DICOM image, "
         "got an empty file"),
    ],
    ids=["size", "kind", "dark", "empty"],
)  # fmt: skip
def test_unusable_images(error_for, name, damage, expected):
    """These errors are found while files are converted, when a part of the data set is already written."""
    assert error_for(name, damage) == expected


# ---- arguments and full disk -----------------------------------------------------------


def test_wrong_arguments(download, tmp_path):
    source = download("mvtec")
    assert run_failing_command("mvtek", "--source", source) == (
        "prepare: wanted one of mvtec, visa, aptos, oct2017, isic2018, mvtec_loco, mvtec_ad_2, mvtec_3d, btad, "
        "mpdd, real_iad, kolektor_sdd, kolektor_sdd2, dagm2007, aitex, bmad, ham10000, got 'mvtek'"
    )
    (tmp_path / "file").write_text("")
    for name in DOWNLOADS:
        message = run_failing_command(name, "--source", tmp_path / "no")
        assert message.startswith(f"{tmp_path / 'no'}: wanted a folder with ") and message.endswith(", got none")
        assert run_failing_command(name, "--source", tmp_path / "file").endswith(", got a file")
    assert run_command("mvtec").exit_code == 2  # no --source
    message = run_failing_command("mvtec", "--source", source, "--out", source)
    assert message == f"{source}: wanted a new or an empty folder, got one that holds mvtec_anomaly_detection"
    assert "(not a folder)" in run_failing_command("mvtec", "--source", source, "--out", tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["downloads", "file"]


def test_disk_full(download, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    source = download("aptos")
    monkeypatch.setattr(os, "replace", full)
    message = run_failing_command("aptos", "--source", source, "--out", tmp_path / "out")
    assert message.startswith("cannot write ") and message.endswith(": No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["downloads"]
