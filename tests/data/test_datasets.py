import subprocess
import sys

import numpy as np
import pytest
import torch

from torchref.data import load_dataset, read_features

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
    with pytest.raises(ValueError, match="got 'mnist'"):
        load_dataset("mnist")


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
        ("1,2,a\n3,,b\n", "row 2, column 2: '' is not a finite number"),
        ("f,g,c\n1,2,a\nnan,4,b\n", "row 3, column 1: 'nan' is not a finite number"),
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
