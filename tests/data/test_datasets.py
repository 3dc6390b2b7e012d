import csv
import gzip
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from torchref.data import load_dataset, read_features, read_texts
from torchref.data.images import read_idx

SHAPES = {
    "digits": (1797, 64, 10),
    "breast_cancer": (569, 30, 2),
    "wine": (178, 13, 3),
    "iris": (150, 4, 3),
}


@pytest.mark.parametrize("name", SHAPES)
def test_sets_of_scikit_learn(name):
    data = load_dataset(name)
    assert (*data.x.shape, len(data.classes)) == SHAPES[name]
    assert data.x.dtype == torch.float32
    assert data.y.dtype == torch.int64
    assert data.y.unique().tolist() == list(range(len(data.classes)))


def test_unknown_name():
    for name in ("cifar", "csv", "digits:", "ftp:here"):
        with pytest.raises(ValueError, match=f"dataset: expected one of digits, .* got '{name}'"):
            load_dataset(name)


@pytest.mark.parametrize("header", ["", "length,width,kind\n"])
def test_csv_with_and_without_header(tmp_path, header):
    path = tmp_path / "a.csv"
    path.write_text(header + "1,2.5,cat\n3,4,dog\n\n5,6,cat\n", encoding="utf-8-sig")
    data = load_dataset(f"csv:{path}")
    assert data.x.tolist() == [[1, 2.5], [3, 4], [5, 6]]
    assert data.y.tolist() == [0, 1, 0]
    assert data.classes == ["cat", "dog"]


def test_number_classes_sort_as_numbers(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("1,10\n2,9\n3,10\n")
    assert load_dataset(f"csv:{path}").classes == ["9", "10"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2,a\n3,x,b\n", "row 2, column 2: 'x' is not a finite number"),
        ("1,2,a\n3,inf,b\n", "row 2, column 2: 'inf' is not a finite number"),
        ("1,2,a\n3,,b\n", "row 2, column 2: '' is missing; --missing impute"),
        ("f,g,c\n1,2,a\nnan,4,b\n", "row 3, column 1: 'nan' is missing"),
        ("f,g,c\n1,2,a\n3,4,\n", "row 3, column 3: '' is no class"),
        ('1,"2,a\n', "not a CSV file"),
        ("1,2,a\n3,4\n", "row 2: expected 3 columns, got 2"),
        ("", "no rows"),
        ("f,g,c\n", "no rows"),
        ("1\n2\n", "got 1 column"),
        ("1,a\n2,a\n", "expected two classes or more"),
    ],
)
def test_a_malformed_csv_names_the_place(tmp_path, text, message):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_dataset(f"csv:{path}")


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xff\xfe\x00\x81,1\n")
    with pytest.raises(ValueError, match="not a CSV file"):
        load_dataset(f"csv:{path}")


def test_features_from_csv_and_npy_agree(tmp_path):
    x = np.array([[1.0, 2.0], [3.0, 4.5]])
    np.save(tmp_path / "a.npy", x)
    (tmp_path / "a.csv").write_text("f,g\n1,2\n3,4.5\n")
    assert torch.equal(read_features(tmp_path / "a.npy"), torch.tensor(x, dtype=torch.float32))
    assert torch.equal(read_features(tmp_path / "a.csv"), read_features(tmp_path / "a.npy"))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(3), "got float64 of shape"),
        (np.zeros(()), "got float64 of shape"),
        (np.array([["a"]]), "got <U1"),
        (np.array([[1.0, np.nan]]), "row 1, column 2: nan is not finite"),
        (np.array([[1.0, {}]], dtype=object), "not a .npy file of numbers"),
    ],
)
def test_a_malformed_npy_raises(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=message):
        read_features(tmp_path / "a.npy")


def test_other_endings_and_garbage_raise(tmp_path):
    (tmp_path / "a.npy").write_text("hello")
    with pytest.raises(ValueError, match="not a .npy file of numbers"):
        read_features(tmp_path / "a.npy")
    with pytest.raises(ValueError, match=r"expected a .csv or .npy file"):
        read_features(tmp_path / "a.txt")


def test_missing_file():
    with pytest.raises(FileNotFoundError):
        read_features("nowhere.csv")


def test_data_imports_neither_nn_nor_training():
    code = (
        "import sys, torchref.data.datasets, torchref.data.split, torchref.data.normalize;"
        "assert not {'torchref.training', 'lightning'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("first", [",,a", "nan,nan,a", "?,?,a", "1e39,2,a"])
def test_a_bad_first_row_is_no_header(tmp_path, first):
    path = tmp_path / "table.csv"
    path.write_text(f"{first}\n1,2,a\n3,4,b\n")
    with pytest.raises(ValueError, match="row 1, column 1"):
        load_dataset(f"csv:{path}")


def test_what_overflows_float32_is_named(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.array([[1.0, 2.0], [3.0, 1e300]]))
    with pytest.raises(ValueError, match="row 2, column 2: 1e[+]300 is not finite in float32"):
        read_features(path)


# Tables with names, categories and gaps.

TABLE = """id,color,size,shop,day,price
1,red,2,a,3,9.5
2,blue,,b,1,4
3,red,1,a,2,5.5
4,,3,c,4,7
"""


def write(path, text=TABLE):
    path.write_text(text)
    return f"csv:{path}"


def test_a_table_of_numbers_categories_and_values(tmp_path):
    data = load_dataset(
        write(tmp_path / "a.csv"), drop=["id"], missing="impute", group="shop", time="day"
    )
    assert data.classes is None
    assert data.y.tolist() == [9.5, 4, 5.5, 7]
    assert [(c.name, c.categories) for c in data.columns] == [
        ("color", ("blue", "red")),
        ("size", None),
    ]
    assert data.x.nan_to_num(-1).tolist() == [[0, 1, 2], [1, 0, -1], [0, 1, 1], [0, 0, 3]]
    assert data.groups.tolist() == [0, 1, 0, 2]
    assert data.times.tolist() == [3, 1, 2, 4]


def test_target_and_task_by_name(tmp_path):
    name = write(tmp_path / "a.csv")
    options = {"drop": ["id", "day", "price", "size"], "missing": "impute"}
    assert load_dataset(name, target="shop", **options).classes == ["a", "b", "c"]
    options["drop"] = ["color", "size", "shop", "price"]
    assert load_dataset(name, target="day", **options).classes == ["1", "2", "3", "4"]
    values = load_dataset(name, target="day", task="regression", **options)
    assert (values.classes, values.y.tolist()) == (None, [3, 1, 2, 4])


def test_numbers_as_categories(tmp_path):
    data = load_dataset(write(tmp_path / "a.csv", "1,10,x\n2,9,y\n"), categories=["2"])
    assert data.columns[1].categories == ("9", "10")
    assert data.x.tolist() == [[1, 0, 1], [2, 1, 0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "colour"}, "a.csv: no column 'colour'; it has id, color, size"),
        ({"drop": ["nothing"]}, "no column 'nothing'"),
        ({"categories": ["nothing"]}, "no column 'nothing'"),
        ({"group": "nothing"}, "no column 'nothing'"),
        ({"time": "shop"}, "row 2, column 4: 'a' is not a finite number"),
        ({"missing": "drop"}, "missing: expected one of refuse, impute, got 'drop'"),
        ({"task": "ranking"}, "task: expected one of auto, classification, regression"),
        ({"target": "shop", "task": "regression"}, "row 2, column 4: 'a' is not a finite number"),
        ({"drop": ["id", "color", "size", "shop", "day"]}, "no column is left"),
        ({}, "row 5, column 2: '' is missing"),
    ],
)
def test_wrong_options_of_a_table_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(write(tmp_path / "a.csv"), **options)


def test_two_columns_of_one_name(tmp_path):
    with pytest.raises(ValueError, match="two columns are called 'f'"):
        load_dataset(write(tmp_path / "a.csv", "f,f,y\n1,2,a\n1,2,b\n"), drop=["f"])


def test_samples_to_predict_are_encoded_as_the_table_was(tmp_path):
    columns = load_dataset(write(tmp_path / "a.csv"), drop=["id"], missing="impute").columns[:2]
    path = tmp_path / "new.csv"
    path.write_text("size,other,color\n5,x,blue\n,y,red\n")
    assert read_features(path, columns).nan_to_num(-1).tolist() == [[1, 0, 5], [0, 1, -1]]
    path.write_text("red,7\n")  # all of a row can be a header: here there is a number
    assert read_features(path, columns).tolist() == [[0, 1, 7]]
    path.write_text("size,color\n5,green\n")
    with pytest.raises(
        ValueError, match=r"row 2, column 2: 'green' is none .* color \(blue, red\)"
    ):
        read_features(path, columns)
    path.write_text("size,shade\n5,green\n")
    with pytest.raises(ValueError, match="no column 'color'; it has size, shade"):
        read_features(path, columns)
    path.write_text("5,green,3\n")
    with pytest.raises(ValueError, match=r"expected 2 columns \(color, size\), got 3"):
        read_features(path, columns)


CELLS = st.sampled_from(["a", "b", "1.5", "-2", "", "nan", "1e99", "x y", "é", "0"])


@settings(deadline=None, max_examples=100)
@given(st.lists(st.lists(CELLS, min_size=3, max_size=3), min_size=1, max_size=8))
def test_any_table_is_encoded_or_refused(tmp_path_factory, rows):
    """Whatever stands in the cells: numbers come through, and errors name the file."""
    path = tmp_path_factory.mktemp("tables") / "a.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["f", "g", "y"], *rows])
    try:
        data = load_dataset(f"csv:{path}", missing="impute")
    except ValueError as error:
        message = str(error)
        assert str(path) in message
        return
    assert len(data.x) == len(data.y) == len(rows)
    assert data.x.shape[1] == sum(column.width for column in data.columns)
    start = 0
    for position, column in enumerate(data.columns):
        block = data.x[:, start : start + column.width]
        for cells, encoded in zip(rows, block.tolist(), strict=True):
            if column.categories is None:
                assert (encoded[0] != encoded[0]) or encoded[0] == float(cells[position])
            else:
                on = [c for c, bit in zip(column.categories, encoded, strict=True) if bit]
                assert on in ([cells[position]], [])
        start += column.width


# Texts.


def test_texts(tmp_path):
    data = load_dataset("reviews")
    assert data.kind == "text"
    assert data.classes == ["negative", "positive"]
    assert len(data.x) == len(data.y)
    path = tmp_path / "a.csv"
    path.write_text("label,text\nham,see you\nspam,buy now\n")
    data = load_dataset(f"text:{path}", target="label")
    assert (data.x, data.classes) == (["see you", "buy now"], ["ham", "spam"])
    assert read_texts(path) == ["see you", "buy now"]
    (tmp_path / "a.txt").write_text("one line\nanother\n")
    assert read_texts(tmp_path / "a.txt") == ["one line", "another"]
    with pytest.raises(ValueError, match="images: this is a set of text"):
        _ = data.images
    path.write_text("text\nalone\n")
    with pytest.raises(ValueError, match="expected a column of texts and one of classes"):
        load_dataset(f"text:{path}")


# Images.


def idx(array, code=8):
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, code, array.ndim]) + sizes + array.tobytes()


def write_mnist(folder, packed=False, **replaced):
    """Four IDX files of 2 x 3 pixels: six images to train with, four for the test."""
    folder.mkdir()
    for part, count in (("train", 6), ("t10k", 4)):
        images = np.arange(count * 6, dtype=np.uint8).reshape(count, 2, 3)
        labels = (np.arange(count) % 2).astype(np.uint8)
        files = {"images-idx3-ubyte": idx(images), "labels-idx1-ubyte": idx(labels)}
        for stem, content in files.items():
            name = f"{part}-{stem}"
            content = replaced.get(name.replace("-", "_"), content)
            (folder / f"{name}{'.gz' * packed}").write_bytes(
                gzip.compress(content) if packed else content
            )
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_are_images_with_a_test_part(tmp_path, packed):
    data = load_dataset("mnist", root=write_mnist(tmp_path / "mnist", packed))
    assert data.images.shape == (10, 1, 2, 3)
    assert data.images[6, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert data.test.tolist() == [6, 7, 8, 9]
    assert data.high == 255
    assert data.classes == ["0", "1"]
    assert set(data.confusing) == {"horizontal_flip", "vertical_flip"}
    fashion = load_dataset("fashion-mnist", root=tmp_path / "mnist")
    assert set(fashion.confusing) == {"vertical_flip"}


IMAGES = idx(np.zeros((6, 2, 3), np.uint8))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train_images_idx3_ubyte", IMAGES[:-1], r"truncated: shape \(6, 2, 3\) .* 36 bytes.* 35"),
        ("train_images_idx3_ubyte", IMAGES + b"x", "too long: shape .* 36 bytes of data, got more"),
        ("train_images_idx3_ubyte", IMAGES[:7], "truncated in its header of 3 sizes"),
        ("train_images_idx3_ubyte", b"", "not an IDX file: it begins with $"),
        ("train_images_idx3_ubyte", b"PNG!" * 9, "not an IDX file: it begins with 50 4e 47 21"),
        (
            "train_images_idx3_ubyte",
            idx(np.zeros(6, np.uint8)),
            "expected images and as many label",
        ),
        (
            "train_labels_idx1_ubyte",
            idx(np.zeros(5, np.uint8)),
            "expected images and as many label",
        ),
        ("t10k_images_idx3_ubyte", idx(np.zeros((4, 3, 3), np.uint8)), r"\(3, 3\) pixels, the oth"),
        # 4 GiB announced, nothing there
        ("train_images_idx3_ubyte", b"\0\0\x08\1\xff\xff\xff\xff", "truncated: .* got 0"),
    ],
)
def test_a_malformed_idx_file_is_named(tmp_path, file, content, message):
    root = write_mnist(tmp_path / "mnist", **{file: content})
    name = file.replace("_", "-").replace("labels-idx1", "images-idx3")  # images come first
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        load_dataset("mnist", root=root)


def test_a_truncated_gzip_is_named(tmp_path):
    root = write_mnist(tmp_path / "mnist", packed=True)
    path = root / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz: truncated, or not packed"):
        load_dataset("mnist", root=root)
    path.write_bytes(b"not gzip")
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz: truncated, or not packed"):
        load_dataset("mnist", root=root)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="neither train-images-idx3-ubyte nor .* --root"):
        load_dataset("mnist", root=root)


def test_other_types_of_idx_have_their_bytes_in_order(tmp_path):
    path = tmp_path / "a"
    for code, dtype in ((11, ">i2"), (12, ">i4"), (13, ">f4"), (14, ">f8"), (9, "i1")):
        array = np.array([[1, -2], [3, 4]], dtype)
        path.write_bytes(idx(array, code))
        assert read_idx(path).tolist() == array.tolist()


def save_images(folder, **images):
    folder.mkdir(parents=True)
    for name, image in images.items():
        Image.fromarray(image).save(folder / f"{name}.png")


GRAY, RGB = np.full((2, 3), 7, np.uint8), np.full((2, 3, 3), (1, 2, 3), np.uint8)


def test_a_folder_of_images(tmp_path):
    save_images(tmp_path / "cat", a=GRAY, b=GRAY)
    save_images(tmp_path / "dog", a=GRAY)
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    data = load_dataset(f"folder:{tmp_path}")
    assert data.images.shape == (3, 1, 2, 3)
    assert (data.classes, data.y.tolist(), data.test) == (["cat", "dog"], [0, 0, 1], None)
    assert data.images[0].unique().tolist() == [7]
    save_images(tmp_path / "eel", a=RGB)
    data = load_dataset(f"folder:{tmp_path}")
    assert data.images.shape == (4, 3, 2, 3)  # a gray image has three channels among colored ones
    assert data.images[3, :, 0, 0].tolist() == [1, 2, 3]
    assert load_dataset(f"folder:{tmp_path}", image_size=5).images.shape == (4, 3, 5, 5)


def test_a_folder_with_a_test_part(tmp_path):
    for part in ("train", "test"):
        save_images(tmp_path / part / "cat", a=GRAY)
        save_images(tmp_path / part / "dog", a=GRAY, b=GRAY)
    data = load_dataset(f"folder:{tmp_path}")
    assert data.test.tolist() == [3, 4, 5]
    assert data.y.tolist() == [0, 1, 1, 0, 1, 1]


def test_what_is_wrong_in_a_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        load_dataset(f"folder:{tmp_path}/nowhere")
    with pytest.raises(ValueError, match="no images; expected one subfolder for each class"):
        load_dataset(f"folder:{tmp_path}")
    save_images(tmp_path / "cat", a=GRAY, b=np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"cat/b.png: 4 x 4 pixels, those before have 3 x 2; --im"):
        load_dataset(f"folder:{tmp_path}")
    (tmp_path / "cat" / "b.png").write_bytes((tmp_path / "cat" / "a.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"cat/b.png: not a readable image"):
        load_dataset(f"folder:{tmp_path}")
    save_images(tmp_path / "dog", a=np.zeros((2, 3), np.uint16))
    (tmp_path / "cat" / "b.png").unlink()
    with pytest.raises(ValueError, match=r"dog/a.png: .*expected 8 bits for each channel"):
        load_dataset(f"folder:{tmp_path}")


@pytest.mark.parametrize(
    ("shape", "images"),
    [((6, 4), None), ((6, 2, 3), (1, 2, 3)), ((6, 3, 2, 2), (3, 2, 2)), ((6, 5, 4, 3), (3, 5, 4))],
)
def test_npz_of_tables_and_images(tmp_path, shape, images):
    x = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    path = tmp_path / "a.npz"
    np.savez(path, x=x, y=np.array(["b", "a"] * 3))
    data = load_dataset(f"npz:{path}")
    assert data.shape == images
    assert (data.classes, data.y.tolist()) == (["a", "b"], [1, 0] * 3)
    if len(shape) == 4 and shape[-1] == 3:
        assert data.images[0, 1, 0, 0] == x[0, 0, 0, 1]  # channels come first
    np.savez(path, x_train=x[:4], y_train=range(4), x_test=x[4:], y_test=[0, 1])
    assert load_dataset(f"npz:{path}").test.tolist() == [4, 5]
    if images is None:
        np.savez(path, x=x, y=np.arange(6) / 2)
        assert load_dataset(f"npz:{path}").classes is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros(3)}, "no x_train among a"),
        ({"x": np.zeros((3, 2))}, "no y among x"),
        ({"x": np.zeros((3, 2)), "y": np.zeros(2)}, "as many targets"),
        ({"x": np.zeros(3), "y": np.zeros(3)}, "2 to 4 dimensions"),
        ({"x": np.full((3, 2), np.nan), "y": np.arange(3)}, "row 1, column 1: nan is not finite"),
        ({"x": np.full((3, 2, 2), -1.0), "y": np.arange(3)}, "expected pixels from 0 on, got -1"),
        ({"x": np.array([["a"]]), "y": np.zeros(1)}, "expected numbers like x's, got <U1"),
        ({"x": np.array([[{}]]), "y": np.zeros(1)}, "not an .npz file of arrays"),
    ],
)
def test_a_malformed_npz_is_named(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=f"a.npz: .*{message}"):
        load_dataset(f"npz:{tmp_path}/a.npz")


def test_an_npz_that_is_none(tmp_path):
    (tmp_path / "a.npz").write_text("no zip")
    with pytest.raises(ValueError, match=r"a.npz: not an .npz file"):
        load_dataset(f"npz:{tmp_path}/a.npz")
    with pytest.raises(FileNotFoundError):
        load_dataset(f"npz:{tmp_path}/none.npz")


@pytest.mark.skipif(
    not Path("/usr/share/datasets/fashion-mnist").exists(),
    reason="waits for Debian's dataset-fashion-mnist",
)
def test_fashion_mnist_itself():
    data = load_dataset("fashion-mnist")
    assert (len(data.y), len(data.test), data.shape) == (70_000, 10_000, (1, 28, 28))
    assert data.classes[data.y[0]] == "Ankle boot"  # as everybody's first example shows
    assert data.y.bincount().tolist() == [7000] * 10


# Adapters, with the collections' interfaces in their place.


class FakeSet:
    """As torchvision's CIFAR10: pairs of a picture and a number."""

    classes = ("cat", "dog")

    def __init__(self, root, train=True, download=False):
        self.pairs = [(Image.fromarray(RGB), i % 2) for i in range(4 if train else 2)]

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        return self.pairs[index]


def test_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    datasets = ModuleType("torchvision.datasets")
    datasets.CIFAR10 = FakeSet
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    data = load_dataset("torchvision:CIFAR10")
    assert data.images.shape == (6, 3, 2, 3)
    assert (data.classes, data.test.tolist()) == (["cat", "dog"], [4, 5])
    with pytest.raises(ValueError, match=r"torchvision.datasets has no set 'MNOST'"):
        load_dataset("torchvision:MNOST")


@pytest.mark.parametrize("name", ["torchvision:MNIST", "hf:imdb"])
def test_a_missing_collection_says_what_to_install(name, monkeypatch):
    for module in ("torchvision", "torchvision.datasets", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    source = name.split(":")[0]
    package = "torchvision" if source == "torchvision" else "datasets"
    with pytest.raises(ImportError, match=f"{name}: .*pip install {package}"):
        load_dataset(name)


class ClassLabel:
    names = ("no", "yes")
    dtype = "int64"


class Value:
    def __init__(self, dtype):
        self.dtype = dtype


class Split(dict):
    """As a split of Hugging Face's: columns by name, and their types."""

    def __init__(self, features, **columns):
        super().__init__(columns)
        self.features = features

    def __len__(self):
        return len(next(iter(self.values())))


def install_hub(monkeypatch, **splits):
    datasets = ModuleType("datasets")
    datasets.load_dataset = lambda name, cache_dir=None: splits
    monkeypatch.setitem(sys.modules, "datasets", datasets)


def test_hugging_face_texts_images_and_numbers(monkeypatch):
    features = {"text": Value("string"), "label": ClassLabel()}
    train = Split(features, text=["a", "b"], label=[1, 0])
    install_hub(monkeypatch, train=train, test=Split(features, text=["c"], label=[1]))
    data = load_dataset("hf:imdb")
    assert (data.x, data.y.tolist(), data.classes) == (["a", "b", "c"], [1, 0, 1], ["no", "yes"])
    assert data.test.tolist() == [2]

    picture = type("Image", (), {})()
    features = {"image": picture, "label": ClassLabel()}
    install_hub(monkeypatch, train=Split(features, image=[Image.fromarray(RGB)] * 2, label=[0, 1]))
    assert load_dataset("hf:cats").images.shape == (2, 3, 2, 3)

    features = {"a": Value("float32"), "b": Value("int64"), "y": Value("float64")}
    install_hub(monkeypatch, train=Split(features, a=[1.0, 2.0], b=[3, 4], y=[0.5, 1.5]))
    data = load_dataset("hf:table", target="y")
    assert (data.x.tolist(), data.y.tolist(), data.classes) == ([[1, 3], [2, 4]], [0.5, 1.5], None)
    with pytest.raises(ValueError, match="hf:table: no column 'label'; --target names one of"):
        load_dataset("hf:table")
    install_hub(monkeypatch, validation=None)
    with pytest.raises(ValueError, match="expected a split `train`, it has validation"):
        load_dataset("hf:table")
