"""recontrast.data.class_folders, .class_names and .datasets: which folders hold good images."""

import os

import pytest
from PIL import Image

from recontrast.data import datasets, listing
from recontrast.data.class_folders import list_good_images
from recontrast.data.class_names import classify_folder
from recontrast.data.listing import DataWarning, find_images, list_images
from recontrast.data.unsplit import list_good_of_classes

WAYS_OUT = r"name the folder of good images itself, or use --all-good \(all_good=True\)"


def create_files(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def names(paths, root):
    return [path.relative_to(root).as_posix() for path in paths]


@pytest.mark.parametrize(
    ("kind", "folders"),
    [
        ("good", "good GOOD Good OK ok_parts 0_good GoodParts good-2024 Normal NORMAL pass passed Gut gute_teile iO "
                 "i.O. in_ordnung fehlerfrei ohne_fehler bon Bueno buono bom goed dobre годные 良品 良品画像 合格 正常 "
                 "양품 no_defect defect-free non_defective undamaged conformes sans_défaut exempt_de_défaut OK品 "
                 "正品 добре придатні dobar תקין ללא\xa0פגם سليم अच्छा"),
        ("bad", "bad NG ng nok NIO n.i.O. not_good notGood no_good non-conforming nicht_ok defect DEFECTS anomaly "
                "abnormal fail Ausschuss fehlerhaft défauts mauvais difettoso defectuosos брак 不良 不良品 不合格品 "
                "异常 缺陷 불량 NG品 crack scratches metal_contamination 1_bad bad_parts não_conforme "
                "nem_megfelelő iyi_değil incorrecto погано лош ελαττωματικό תקול לא\xa0תקין معيب غير\xa0سليم เสีย खराब"),  # noqa: RUF001 Hebrew
        ("mask", "mask Masks ground_truth GroundTruth gt labels annotations crack_mask masken マスク"),
        ("neutral", "day1 2024-05-01 000 cam_2 line_A left images batch12"),
        ("unclear", "good_bad pass_fail positive negative rework almost_good"),
        ("train", "train Training"), ("test", "test validation eval"),
        ("other", "gasket combined A class1 type_b"),
    ],
)  # fmt: skip
def test_names_of_folders(kind, folders):
    kinds = {name: classify_folder(name) for name in folders.split(" ")}
    assert {name: found for name, found in kinds.items() if found != kind} == {}


@pytest.mark.parametrize(
    ("good", "others"),
    [("good", ["crack", "mask/crack"]), ("OK", ["NG"]), ("良品", ["不良品"]), ("Gut", ["Schlecht"]),
     ("day1/ok", ["day1/ng"]), ("normal", ["gasket", "day3"]), ("0_good", ["1_bad"])],
)  # fmt: skip
def test_good_class_alone_is_taken(tmp_path, good, others):
    root = create_files(tmp_path / "parts", f"{good}/2.png", f"{good}/10.png", f"{good}/more/3.png")
    create_files(root, *(f"{other}/0.png" for other in others))
    with pytest.warns(DataWarning, match="not used: 1 image in ") as caught:
        samples = datasets.load(root)["parts"]
    assert names([sample.path for sample in samples], root) == [
        f"{good}/{n}" for n in ("2.png", "10.png", "more/3.png")
    ]
    assert all(other.split("/")[0] in str(caught[0].message) for other in others)
    assert {sample.label for sample in samples} == {0}
    with pytest.warns(DataWarning):
        assert list_good_images(root) == [sample.path for sample in samples]
    assert len(datasets.load(root, all_good=True)["parts"]) == 3 + len(others)
    assert list_good_images(root / good) == [sample.path for sample in samples]


def test_loose_images_beside_class_folders_are_named(tmp_path):
    root = create_files(tmp_path / "parts", "good/0.png", "7.png", "8.png")
    with pytest.warns(DataWarning, match=r"not used: 2 images beside the class folders \(7\.png, 8\.png\)"):
        assert names(list_good_images(root), root) == ["good/0.png"]


@pytest.mark.parametrize(
    "files",
    [
        ["0.png", "defect/0.png"], ["0.png", "mask/0.png"], ["bad/0.png"], ["crack/0.png", "scratch/0.png"],
        ["day1/0.png", "ng/0.png"], ["a/0.png", "b/0.png"], ["0/0.png", "1/0.png"], ["typeA/0.png", "typeB/0.png"],
        ["positive/0.png", "negative/0.png"], ["day1/good/0.png", "day1/bad/0.png", "day2/0.png"],
        ["good/0.png", "good/bad/0.png"], ["good/0.png", "line1/ok/0.png", "line1/ng/0.png"], ["rework/0.png"],
        ["gasket/bad/0.png"], ["0.png", "gasket/0.png"],
    ],
)  # fmt: skip
def test_unclear_folders_are_refused_with_two_ways_out(tmp_path, files):
    root = create_files(tmp_path / "parts", *files)
    for read in (datasets.load, datasets.folder, list_good_images):
        with pytest.raises(ValueError, match=rf"parts: wanted good images alone, .*got .*: {WAYS_OUT}"):
            read(root)
    assert len(list_good_images(root, all_good=True)) == len(datasets.folder(root, all_good=True)) == len(files)
    assert len(datasets.folder(root, label=1)) == len(files)


@pytest.mark.parametrize("name", ["crack", "NG", "ground_truth", "masks"])
def test_folder_named_as_defects_is_refused(tmp_path, name):
    root = create_files(tmp_path / name, "0.png")
    with pytest.raises(ValueError, match=r"wanted a folder of good images, got one whose name is that of"):
        datasets.load(root)
    assert len(datasets.load(root, all_good=True)[name]) == 1


@pytest.mark.parametrize(
    "files",
    [
        ["0.png"], ["day1/0.png", "day2/0.png", "x.png"], ["000/0.png", "001/0.png"], ["2024-01-05/0.png"],
        ["run7/0.png"], ["2024-01-05/0.png", "2024-01-06/0.png"], ["kw12/0.png"], ["new_parts/0.png"],
    ],
)  # fmt: skip
def test_folders_without_classes_are_taken_whole(tmp_path, files):
    root = create_files(tmp_path / "parts", *files)
    assert sorted(names(list_good_images(root), root)) == sorted(files)


@pytest.mark.parametrize("inside", ["gasket", "gasket/day1", "A17", "day1/gasket"])
def test_only_subfolder_of_unknown_name_is_named(tmp_path, inside):
    root = create_files(tmp_path / "parts", f"{inside}/0.png", f"{inside}/1.png")
    folder = "day1/gasket" if inside == "day1/gasket" else inside.split("/")[0]
    for read in (datasets.load, list_good_images):
        with pytest.warns(DataWarning, match=rf"parts: 2 images in {folder} taken as good, although the name"):
            assert len(read(root)["parts"] if read is datasets.load else read(root)) == 2
    assert len(list_good_images(root, all_good=True)) == len(list_good_images(root / inside)) == 2


@pytest.mark.parametrize("name", ["poke", "Squeezed_teeth", "blowhole", "oil_dirt", "frayed edges", "burnt_2024"])
def test_only_subfolder_with_the_name_of_a_defect_is_refused(tmp_path, name):
    root = create_files(tmp_path / "parts", f"{name}/0.png")
    with pytest.raises(ValueError, match=WAYS_OUT):
        list_good_images(root)


def test_good_folders_may_have_any_subfolders(tmp_path):
    root = create_files(tmp_path / "good parts", "gasket/0.png", "a/0.png", "b/day2/0.png")
    assert len(list_good_images(root)) == 3


@pytest.mark.parametrize("good", ["Good", "ok", "NORMAL", "良品", "good_parts"])
def test_category_with_other_names_for_good(tmp_path, good):
    root = create_files(tmp_path / "nut", f"Train/{good}/0.png", f"TEST/{good}/1.png", "TEST/hole/2.png")
    create_files(root, "masks/hole/2_mask.png", f"masks/{good}/1_mask.png")
    samples = sorted(datasets.load(root)["nut"], key=lambda sample: sample.path.name)
    assert [(s.split, s.label, s.defect) for s in samples] == [
        ("train", 0, "good"), ("test", 0, "good"), ("test", 1, "hole"),
    ]  # fmt: skip
    assert samples[2].mask == root / "masks/hole/2_mask.png"
    assert datasets.categories(tmp_path) == ["nut"]
    assert datasets.describe({"nut": samples}) == [
        f"nut: {root}", f"  Train/{good}: 1 image (good, to train on)", f"  TEST/{good}: 1 image (test, good)",
        "  TEST/hole: 1 image (test, hole, 1 mask)",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["goood", "norml", "images", "good_bad", "cam/good", "hole/ok", "good/crack"])
def test_test_folders_of_unclear_label_are_refused(tmp_path, name):
    root = create_files(tmp_path / "nut", "train/good/0.png", f"test/{name}/0.png")
    with pytest.raises(ValueError, match=r"wanted a folder of good images"):
        datasets.load(root)


def test_numbers_of_classes_in_test_are_refused(tmp_path):
    root = create_files(tmp_path / "nut", "train/good/0.png", "test/0/0.png", "test/1/0.png")
    with pytest.raises(ValueError, match=r"test: wanted test images in .* got folders 0, 1, which may be numbers"):
        datasets.load(root)


def test_everything_that_is_not_used_is_named(tmp_path):
    root = create_files(
        tmp_path / "nut", "train/good/0.png", "train/5.png", "train/bad/1.png", "validation/good/0.png", "9.png",
        "train/good/x.heic", "train/good/y.tga", "test/hole/0.png", "test/mask/0.png", "train/good/picture",
    )  # fmt: skip
    (root / "train/good/picture").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(30))
    os.mkfifo(root / "train/good/pipe.png")
    (root / "train/good/gone.png").symlink_to(root / "nothing.png")
    (root / "train/good/itself.png").symlink_to("itself.png")
    (root / "itself").symlink_to("itself")
    with pytest.warns(DataWarning) as caught:
        samples = datasets.load(root)["nut"]
    assert names([sample.path for sample in samples], root) == ["train/good/0.png", "test/hole/0.png"]
    text = "\n".join(str(warning.message) for warning in caught)
    for expected in (
        "1 image directly in it (5.png), 1 image in bad", "1 image directly in it (9.png), 1 image in validation",
        "6 pictures not read", "gone.png, itself.png, picture, pipe.png, x.heic and 1 more", "1 picture not used",
    ):  # fmt: skip
        assert expected in text


@pytest.mark.parametrize(
    "unread", ["x.heic", "good/x.heic", "day1/x.heic", "crack/x.heic", "more/deep/x.heic", "good/cam/x.heic"]
)
def test_pictures_that_cannot_be_read_are_named_in_every_plain_folder(tmp_path, unread):
    root = create_files(tmp_path / "parts", "good/0.png", unread)
    for read in (datasets.load, datasets.folder, list_good_images, list_images):
        with pytest.warns(DataWarning, match=rf"1 picture not read; .*: {unread}"):
            assert read(root)


@pytest.mark.parametrize(
    "unread",
    ["x.heic", "nut/x.heic", "nut/train/x.heic", "nut/train/good/x.heic", "nut/train/other/x.heic", "nut/test/x.heic",
     "nut/test/hole/x.heic", "nut/test/good/sub/x.heic", "nut/test/mask/x.heic", "nut/ground_truth/x.heic",
     "nut/ground_truth/hole/x.heic", "nut/more/x.heic", "docs/x.heic"],
)  # fmt: skip
def test_pictures_that_cannot_be_read_are_named_in_every_data_set(tmp_path, unread):
    create_files(tmp_path, "nut/train/good/0.png", "nut/test/good/0.png", "nut/test/hole/1.png", unread)
    create_files(tmp_path, "nut/ground_truth/hole/1.png")
    with pytest.warns(DataWarning) as caught:
        assert len(datasets.load(tmp_path)["nut"]) == 3
    text = " ".join(str(warning.message) for warning in caught)
    assert len(caught) == 1 and ("x.heic" in text or "nut/test/mask: 1 picture not used" in text)


def test_system_folders_and_files_are_passed_over(tmp_path):
    junk = (
        "@eaDir/0.png/SYNOPHOTO_THUMB_S.jpg", ".ipynb_checkpoints/0-checkpoint.png", "__MACOSX/0.png",
        ".thumbnails/0.png", "Thumbnails/0.png", "$RECYCLE.BIN/0.png", "System Volume Information/0.png", "._0.png",
        "lost+found/0.png", "#recycle/0.png", ".Trash-1000/files/0.png", "SYNOPHOTO_THUMB_M.jpg", ".AppleDouble/0.png",
        "0.png:Zone.Identifier", "Thumbs.db", ".DS_Store", "desktop.ini", "~$0.png",
    )  # fmt: skip
    root = create_files(tmp_path / "parts", "0.png", *junk)
    assert names(list_good_images(root), root) == names(list_images(root), root) == ["0.png"]


def test_endings_of_formats_that_are_read(tmp_path):
    endings = (".jfif", ".JPE", ".Jpg", ".PNG", ".dib", ".pjpeg", ".TIFF", ".webp")
    root = create_files(tmp_path / "parts", *(f"a{ending}" for ending in endings))
    assert len(find_images(root)) == len(endings)
    assert all(map(listing.is_image, (f"a{ending}" for ending in endings)))


def test_classes_of_good_images(tmp_path):
    for name in ("set/screw/train/good", "set/tile/train/good", "new/screw", "a/new", "b/new", "plate/good"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / name / "0.png")
    rows = f"{tmp_path / 'a/new/0.png'},lid\n{tmp_path / 'b/new/0.png'},cap\n"
    (tmp_path / "stated.csv").write_text(f"path,category\n{rows}")
    for folder in "ab":
        (tmp_path / folder / "list.csv").write_text("path\nnew/0.png\n")

    def classes(*names):
        return [sample.category for sample in list_good_of_classes([tmp_path / name for name in names])]

    assert classes("set/screw/train/good", "set/tile/train/good", "new/screw") == ["screw", "tile", "screw"]
    assert classes("set/screw", "set/tile/train", "new/screw/0.png") == ["screw", "tile", "screw"]
    assert sorted(s.category for s in list_good_of_classes(tmp_path / "set", all_good=True)) == ["screw", "tile"]
    assert classes("plate/good", "a/new") == ["plate", "new"]
    assert classes("a/new", "b/new", "new/screw") == ["", "", "screw"]
    assert classes("a/new", "a/new") == ["new", "new"]
    assert classes("stated.csv", "a/new") == ["lid", "cap", "new"]
    assert classes("a/list.csv") == ["list"] and classes("a/list.csv", "b/list.csv") == ["", ""]
    assert [s.category for s in list_good_of_classes(str(tmp_path / "a/new"))] == ["new"]
