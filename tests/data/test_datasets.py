import csv
import gzip
import os
import re
import shutil
import struct
import subprocess
import sys
import time
import zipfile
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
from torchref.data.table import Column, read_table

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
        ("1,2,a\n3,1_0,b\n", "row 2, column 2: '1_0' is not a finite number"),
        (f"1,2,a\n3,1{'0' * 40},b\n", "row 2, column 2: '10+' is not a finite number"),
        (f"1{'0' * 40},a\n2{'0' * 40},b\n", "row 1, column 1: '10+' is not a finite number"),
        ('1,"2,a\n', "row 1: not a CSV file"),
        ('1,2,a\n3,4,"b"x\n', "row 2: not a CSV file"),
        ("a;b;y\n1;2;0\n", "got 1 column; the delimiter must be a comma"),
        ("a\tb\ty\n1\t2\t0\n", "got 1 column; the delimiter must be a comma"),
        ("a;y\n1,5;0\n", "row 2: expected 1 columns, got 2; the delimiter must be a comma"),
        ("f,g,y\n1,,a\n2,-,b\n", "a.csv: no value in column g; --drop g leaves it out"),
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
        (np.zeros((3, 2, 2)), r"got float64 of shape \(3, 2, 2\)"),
        (np.zeros((0, 2)), r"expected one sample or more, got shape \(0, 2\)"),
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
        ({"time": "shop"}, "row 2, column 4: 'a' is no time; expected numbers, or ISO dates"),
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
    for options in ({}, {"drop": ["f"]}):
        with pytest.raises(ValueError, match=r"a.csv: row 1: two columns are called 'f'"):
            load_dataset(write(tmp_path / "a.csv", "f,f,y\n1,2,a\n1,2,b\n"), **options)


HEADERS = {  # real files' first line and what is below
    "iris with a header": ("length,width,kind", "5.1,3.5,setosa\n6,3,virginica\n"),
    "pandas' index": (",a,y", "0,1.5,u\n1,2.5,v\n"),
    "words alone": ("outlook,windy,play", "sunny,no,yes\nrainy,no,no\n"),
    "one sample below": ("a,b", "1,2\n"),
}


@pytest.mark.parametrize(("first", "below"), HEADERS.values(), ids=HEADERS)
def test_a_header(tmp_path, first, below):
    (tmp_path / "a.csv").write_text(f"{first}\n{below}")
    table = read_table(tmp_path / "a.csv")
    assert table.header
    assert table.names == [name or "1" for name in first.split(",")]
    assert len(table.rows) == len(below.splitlines())


DATA = {
    "iris": "5.1,3.5,setosa\n6,3,virginica\n",
    "the class first": "setosa,5.1,3.5\nvirginica,6,3\n",
    "years in a column": "ford,1999,2001\nbmw,2003,2005\n",
    "one year": "ford,1999\nbmw,2500\n",
    "numbers like years": "1999,2001\n15,20\n",
    "a gap": "5.1,,setosa\n6,3,virginica\n",
    "gaps first": ",,setosa\n6,3,virginica\n",
    "one sample": "red,7\n",
    "one gap": '""\n1\n',
}


@pytest.mark.parametrize("text", DATA.values(), ids=DATA)
def test_no_header(tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    table = read_table(tmp_path / "a.csv")
    assert not table.header
    assert len(table.rows) == len(text.splitlines())


@pytest.mark.parametrize(
    ("text", "odd"),
    [
        ("country,2019,2020\na,0.5,2\nb,1.5,1950\n", "2019"),
        (",2019,2020\n0,0.5,2\n1,1.5,3\n", "2019"),
        ("150,4,setosa,versicolor\n5.1,3.5,1.4,0\n", "150"),  # as in scikit-learn's iris.csv
        ("a,b,,y\n1,2,3,u\n3,4,5,v\n", ""),
        ("a,b,NA,y\n1,,3,u\n3,4,5,v\n", "NA"),
    ],
)
def test_what_may_be_a_header_is_refused(tmp_path, text, odd):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"a.csv: row 1: .* a header, but '{odd}' is no name"):
        read_table(tmp_path / "a.csv")


def test_a_table_of_pandas(tmp_path):
    name = write(tmp_path / "a.csv", ",a,y,b\n0,1.5,u,3\n1,2.5,v,4\n")
    data = load_dataset(name, target="y", drop=["1"])
    assert ([c.name for c in data.columns], data.classes) == (["a", "b"], ["u", "v"])


def test_equal_numbers_among_words_have_one_order(tmp_path):
    name = write(tmp_path / "a.csv", "k,y\n1,01\n01,1.0\n1.0,1\na,b\n")
    code = (
        "from torchref.data import load_dataset as load;"
        f"data = load({name!r}, categories=['k'], task='classification');"
        "print(data.classes, data.columns[0].categories)"
    )
    for seed in "01":
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "['01', '1', '1.0', 'b'] ('01', '1', '1.0', 'a')\n"


def test_equal_numbers_are_one_class_one_category_and_one_group(tmp_path):
    """Put together by pandas, a file has both spellings."""
    rows = ["1,a,7,0", "1.0,b,7.0,1", "0.0,b,8,0.0", "2,a,8.0,1.0"]
    name = write(tmp_path / "a.csv", "\n".join(["k,l,g,y", *rows]))
    data = load_dataset(name, categories=["k"], group="g")
    assert (data.classes, data.y.tolist()) == (["0", "1"], [0, 1, 0, 1])
    assert data.columns[0].categories == ("0.0", "1", "2")
    assert data.x.tolist() == [[0, 1, 0, 1, 0], [0, 1, 0, 0, 1], [1, 0, 0, 0, 1], [0, 0, 1, 1, 0]]
    assert data.groups.tolist() == [0, 0, 1, 1]
    write(tmp_path / "b.csv", "k,l\n0,a\n2.0,b\n")
    features = read_features(tmp_path / "b.csv", data.columns)
    assert features.tolist() == [[1, 0, 0, 1, 0], [0, 0, 1, 0, 1]]


def test_numbers_that_only_a_float_makes_equal_are_two_classes(tmp_path):
    name = write(tmp_path / "a.csv", f"k,y\n1,{2**53}\n2,{2**53 + 1}\n")
    assert load_dataset(name).classes == [str(2**53), str(2**53 + 1)]


@pytest.fixture
def five_hours_west(monkeypatch):
    """The machine's zone must not matter."""
    monkeypatch.setenv("TZ", "XST+5")
    if hasattr(time, "tzset"):
        time.tzset()
    yield
    monkeypatch.undo()
    if hasattr(time, "tzset"):
        time.tzset()


@pytest.mark.parametrize(
    ("cells", "times"),
    [
        (["1700000001", "1700000000.25"], [1700000001, 1700000000.25]),
        (["20240128", "20240127"], [20240128, 20240127]),
        (["2024-01-28", "2024-01-27"], [1706400000, 1706313600]),
        (["2024-01-27T10:00", "2024-01-27T10:00:00.5+01:00"], [1706349600, 1706346000.5]),
    ],
)
def test_times_keep_their_digits(tmp_path, cells, times, five_hours_west):
    rows = "".join(f"{cell},{i},{'ab'[i]}\n" for i, cell in enumerate(cells))
    data = load_dataset(write(tmp_path / "a.csv", f"when,f,y\n{rows}"), time="when")
    assert data.times.dtype == torch.float64
    assert data.times.tolist() == times


@pytest.mark.parametrize("cell", ["yesterday", "", "inf", "nan", "1_0", "2024-13-01", "3"])
def test_what_is_no_time_is_named(tmp_path, cell):
    first = "2024-01-27" if cell in ("3", "2024-13-01") else "5"
    name = write(tmp_path / "a.csv", f"when,f,y\n{first},1,a\n{cell},2,b\n")
    with pytest.raises(ValueError, match=f"row 3, column 1: '{cell}' is no time; expected numbers"):
        load_dataset(name, time="when")


@pytest.mark.parametrize("cell", ["", "?", "NA", "n/a", "NaN", "null"])
def test_a_missing_target_is_named(tmp_path, cell):
    words = write(tmp_path / "a.csv", f"f,y\n1,u\n2,v\n3,{cell}\n")
    numbers = write(tmp_path / "b.csv", f"f,y\n1,1\n2,2\n3,{cell}\n")
    place = rf"row 4, column 2: '{re.escape(cell)}'"
    with pytest.raises(ValueError, match=f"{place} is no class; leave the row out"):
        load_dataset(words)
    for options in ({}, {"task": "regression"}):
        with pytest.raises(ValueError, match=f"{place} is missing; leave the row out"):
            load_dataset(numbers, **options)


def test_none_and_a_dash_can_be_classes(tmp_path):
    name = write(tmp_path / "a.csv", "f,y\n1,none\n2,-\n3,u\n")
    assert load_dataset(name).classes == ["-", "none", "u"]


@pytest.mark.parametrize(
    ("targets", "refused"),
    [
        (range(20), False),
        (range(21), True),
        ([*range(100)] * 2, False),
        ([*range(101)] * 2, True),
        (["100000.0", *range(20)], True),
        ([f"u{i}" for i in range(200)], False),
        ([i + 0.5 for i in range(200)], False),
    ],
)
def test_many_whole_numbers_are_neither_classes_nor_values(tmp_path, targets, refused):
    name = write(tmp_path / "a.csv", "f,y\n" + "".join(f"1,{target}\n" for target in targets))
    if refused:
        count = len(set(targets))
        with pytest.raises(ValueError, match=rf"a.csv: column y: {count} different whole numbers"):
            load_dataset(name)
        assert load_dataset(name, task="regression").classes is None
        assert len(load_dataset(name, task="classification").classes) == count
    else:
        load_dataset(name)


def test_names_of_rows_are_no_categories(tmp_path):
    def table(count, distinct):
        return "id,y\n" + "".join(f"u{i % distinct},{i % 2}\n" for i in range(count))

    for count, distinct in ((101, 101), (2002, 1001)):
        name = write(tmp_path / "a.csv", table(count, distinct))
        with pytest.raises(ValueError, match=rf"a.csv: {distinct} cat.* {count} rows of column id"):
            load_dataset(name)
    for count, distinct in ((100, 100), (102, 101), (2000, 1000)):
        data = load_dataset(write(tmp_path / "a.csv", table(count, distinct)))
        assert data.x.shape == (count, distinct)


def test_a_row_without_a_group_is_named(tmp_path):
    name = write(tmp_path / "a.csv", "g,f,y\nu,1,a\n,2,b\n")
    with pytest.raises(ValueError, match="row 3, column 1: '' is no group"):
        load_dataset(name, group="g")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("iris", {"target": "y", "drop": ["z"]}, "target, drop: without meaning for iris, which"),
        ("digits", {"missing": "impute"}, "missing: without meaning for digits, .* no option"),
        ("reviews", {"categories": ["k"]}, "categories: without"),
        ("npz:a.npz", {"time": "t", "group": "g"}, "group, time: without .* which knows task"),
        ("folder:d", {"target": "y"}, "target: without .* knows image_size"),
        ("csv:a.csv", {"image_size": 3}, "image_size: without meaning for csv:a.csv"),
        ("csv:a.csv", {"root": "d"}, "root: without"),
        ("mnist", {"image_size": 3}, "image_size: without"),
        ("text:a.csv", {"drop": ["z"]}, "drop: without"),
        ("torchvision:MNIST", {"target": "y"}, "target: without"),
        ("hf:imdb", {"missing": "impute"}, "missing: without"),
        ("iris", {"task": "regression"}, "task: expected auto or classification for iris, got reg"),
        ("diabetes", {"task": "classification"}, "task: expected auto or regression for diabetes"),
        ("text:a.csv", {"task": "regression"}, "task: expected auto or classification for text"),
        ("folder:d", {"task": "regression"}, "task: expected auto or classification for folder"),
        ("folder:d", {"image_size": 0}, "image_size: expected > 0, got 0"),
        ("folder:d", {"image_size": -3}, "image_size: expected > 0, got -3"),
    ],
)
def test_options_without_effect_are_refused(name, options, message):
    """Before anything is read: none of these files exists."""
    with pytest.raises(ValueError, match=message):
        load_dataset(name, **options)


def test_a_task_that_a_set_has_anyhow():
    assert load_dataset("iris", task="classification").classes
    assert load_dataset("diabetes", task="regression").classes is None


def test_a_quote_after_a_space_and_a_long_cell(tmp_path):
    long = "w" * 200_000
    (tmp_path / "a.csv").write_text(f'text, label\n"one, two", a\n"{long}", "b"\n')
    data = load_dataset(f"text:{tmp_path}/a.csv")
    assert (data.x, data.classes) == (["one, two", long], ["a", "b"])


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "a.csv").write_bytes("f,y\n1,a\n2,ä\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a.csv: row 3: not a CSV file in UTF-8"):
        load_dataset(f"csv:{tmp_path}/a.csv")


def test_samples_to_predict_with_their_classes(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("y,f,g\na,1,2\n")
    assert read_features(path, target="y").tolist() == [[1, 2]]
    unnamed = [Column("1"), Column("2")]  # of a table without a header
    assert read_features(path, unnamed, target="y").tolist() == [[1, 2]]
    with pytest.raises(ValueError, match=r"a.csv: expected 2 columns \(1, 2\), got 3"):
        read_features(path, unnamed)
    path.write_text("1,2,a\n3,4,b\n")
    assert read_features(path, unnamed, target="3").tolist() == [[1, 2], [3, 4]]
    assert read_features(path, [Column("f"), Column("g")], target="3").tolist() == [[1, 2], [3, 4]]
    with pytest.raises(ValueError, match=r"a.csv: no column 'y'; it has 1, 2, 3"):
        read_features(path, target="y")


def test_a_model_without_gaps_is_told_of_none_it_could_impute(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("f,color\n1,\n")
    columns = [Column("f"), Column("color", ("blue", "red"))]
    assert read_features(path, columns, missing="impute").tolist() == [[1, 0, 0]]
    for text, message in (
        (
            "f,color\n1,\n",
            "row 2, column 2: '' is missing, and the model was trained without gaps$",
        ),
        ("f,color\n?,red\n", "row 2, column 1: '.' is missing, and the model was trained without"),
        ("f,color\nx,red\n", "row 2, column 1: 'x' is not a finite number$"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_features(path, columns)


def test_samples_to_predict_are_encoded_as_the_table_was(tmp_path):
    columns = load_dataset(write(tmp_path / "a.csv"), drop=["id"], missing="impute").columns[:2]
    path = tmp_path / "new.csv"
    path.write_text("size,other,color\n5,x,blue\n,y,red\n")
    read = read_features(path, columns, missing="impute")
    assert read.nan_to_num(-1).tolist() == [[1, 0, 5], [0, 1, -1]]
    with pytest.raises(
        ValueError, match=r"row 3, column 1: '' is missing, and the model was train"
    ):
        read_features(path, columns)
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
    (tmp_path / "a.txt").write_bytes("\ufeffone\u2028line\r\n\nlast".encode())
    assert read_texts(tmp_path / "a.txt") == ["one\u2028line", "", "last"]
    path.write_text("label,review\nham,see you\nspam,buy now\n")
    data = load_dataset(f"text:{path}", target="label")
    assert (data.x, data.classes) == (["see you", "buy now"], ["ham", "spam"])
    assert read_texts(path, "label") == data.x
    path.write_text("review\nalone\n")
    assert read_texts(path, "review") == ["alone"]
    path.write_text("review,label\ngood,a\nbad,a\n")
    with pytest.raises(
        ValueError, match=r"column label: expected two classes or more, got \['a'\]"
    ):
        load_dataset(f"text:{path}")
    path.write_text("review,label\ngood,a\nbad,\n")
    with pytest.raises(ValueError, match=r"row 3, column 2: '' is no class"):
        load_dataset(f"text:{path}")
    path.write_text("text;label\nalone;a\n")
    with pytest.raises(ValueError, match="one of classes; the delimiter must be a comma"):
        load_dataset(f"text:{path}")
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
        ("train_images_idx3_ubyte", idx(np.zeros((6, 0, 3), np.uint8)), "expected images and as"),
        ("train_images_idx3_ubyte", idx(np.zeros((6, 2, 3), ">f4"), 13), "expected unsigned bytes"),
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


def test_a_hidden_folder_is_no_class(tmp_path):
    for name in ("cat", "dog", ".ipynb_checkpoints"):
        save_images(tmp_path / name, a=GRAY)
    assert load_dataset(f"folder:{tmp_path}").classes == ["cat", "dog"]


def test_what_is_wrong_in_a_folder_is_named(tmp_path):
    for part, second in (("train", "dog"), ("test", "eel")):
        save_images(tmp_path / "split" / part / "cat", a=GRAY)
        save_images(tmp_path / "split" / part / second, a=GRAY)
    with pytest.raises(ValueError, match=r"split: test: expected classes .* has, got 'eel'"):
        load_dataset(f"folder:{tmp_path}/split")
    shutil.rmtree(tmp_path / "split")
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        load_dataset(f"folder:{tmp_path}/nowhere")
    with pytest.raises(ValueError, match="no images; expected one subfolder for each class"):
        load_dataset(f"folder:{tmp_path}")
    save_images(tmp_path / "one" / "cat", a=GRAY)
    with pytest.raises(ValueError, match=r"one: expected two classes or more, got \['cat'\]"):
        load_dataset(f"folder:{tmp_path}/one")
    shutil.rmtree(tmp_path / "one")
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
    ("content", "message"),
    [
        (b"", "no rows; expected a text each"),
        (b"good\nb\0ad\n", "row 2: not a text: a NUL"),
        (b"good\n" * 5000 + b"\xff\n", "row 5001: not a text in UTF-8: invalid start byte"),
    ],
    ids=["empty", "nul", "latin"],
)
def test_what_is_no_file_of_texts_is_named(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"a.txt: {message}"):
        read_texts(tmp_path / "a.txt")


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
        ({"x": np.full((3, 2), np.nan), "y": np.arange(3)}, "gaps are imputed in a table alone"),
        ({"x": np.zeros((3, 2)), "y": np.zeros(3, int)}, r"y: expected two classes or more, got"),
        ({"x": np.zeros((2, 2)), "y": np.array([0.5, np.nan])}, "y: row 2: 'nan' is missing"),
        ({"x": np.zeros((2, 2)), "y": np.array([0.5, np.inf])}, "y: row 2: 'inf' is not a finite"),
        (
            {
                "x_train": np.zeros((2, 2)),
                "y_train": np.array([0.5, 1]),
                "x_test": np.zeros((2, 2)),
                "y_test": np.array([0.5, np.nan]),
            },
            "y_test: row 2: 'nan' is missing",
        ),
        ({"x": np.zeros((2, 2)), "y": np.array([1j, 2])}, "y: expected .* names, got complex128"),
        (
            {
                "x_train": np.zeros((2, 2)),
                "y_train": np.array([0, 1]),
                "x_test": np.zeros((2, 2)),
                "y_test": np.array(["2024-01-27", "2024-01-28"], "M8[D]"),
            },
            r"y_test: expected numbers or names, got datetime64\[D\]",
        ),
        (
            {
                "x_train": np.zeros((2, 2)),
                "y_train": np.array([0, 1]),
                "x_test": np.zeros((2, 2)),
                "y_test": np.array(["a", "b"]),
            },
            "y_train, y_test: expected numbers or names in both, got int64 and <U1",
        ),
        (
            {
                "x_train": np.zeros((3, 2)),
                "y_train": np.array([0, 1, 2]),
                "x_test": np.zeros((3, 2)),
                "y_test": np.array([4, 1, 3]),
            },
            "y_test: expected classes that the training part has, got '3', '4'",
        ),
        ({"x": np.zeros((2, 0)), "y": np.arange(2)}, "2 to 4 dimensions"),
        ({"x": np.array([["a"]]), "y": np.zeros(1)}, "expected numbers like x's, got <U1"),
        ({"x": np.array([[{}]]), "y": np.zeros(1)}, "not an .npz file of arrays"),
    ],
)
def test_a_malformed_npz_is_named(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=f"a.npz: .*{message}"):
        load_dataset(f"npz:{tmp_path}/a.npz")


def test_npz_of_values_bytes_and_black_images(tmp_path):
    path = tmp_path / "a.npz"
    images = np.zeros((4, 2, 3), np.float32)
    np.savez(path, x=images, y=np.arange(4) / 2)
    data = load_dataset(f"npz:{path}")
    assert (data.kind, data.classes, data.y.tolist()) == ("image", None, [0, 0.5, 1, 1.5])
    assert data.high == 1
    np.savez(path, x=images, y=np.arange(4))
    assert load_dataset(f"npz:{path}", task="regression").classes is None
    np.savez(path, x=images, y=np.array([b"cat", "hä".encode(), b"\xff", b"cat"]))
    assert load_dataset(f"npz:{path}").classes == ["\\xff", "cat", "hä"]


ARRAYS = {
    "rows": lambda x: x.reshape(len(x), -1),
    "NCHW": lambda x: x,
    "NHWC": lambda x: x.transpose(0, 2, 3, 1),
}


@settings(deadline=None, max_examples=50)
@given(st.sampled_from([1, 3]), st.integers(1, 4), st.integers(1, 4), st.sampled_from([*ARRAYS]))
def test_images_to_predict_have_the_order_of_the_models(
    tmp_path_factory, channels, height, width, order
):
    path = tmp_path_factory.mktemp("images") / "a.npy"
    shape = (channels, height, width)
    x = np.arange(2 * channels * height * width).reshape(2, *shape)
    array = ARRAYS[order](x)
    np.save(path, array)
    read = read_features(path, shape=shape)
    if array.shape == x.shape:  # the order of the model's wins where both fit
        x = array
    assert torch.equal(read, torch.tensor(x.reshape(2, -1), dtype=torch.float32))


def test_gray_images_and_other_shapes(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.arange(12).reshape(2, 2, 3))
    assert read_features(path, shape=(1, 2, 3)).shape == (2, 6)
    message = r"expected shape \(N, 18\), \(N, 3, 2, 3\) or \(N, 2, 3, 3\), got \(2, 2, 3\)"
    with pytest.raises(ValueError, match=message):
        read_features(path, shape=(3, 2, 3))
    with pytest.raises(
        ValueError, match=r"\(N, 6\), \(N, 1, 3, 2\), \(N, 3, 2\) or \(N, 3, 2, 1\)"
    ):
        read_features(path, shape=(1, 3, 2))
    np.save(path, np.zeros((0, 2, 3)))
    with pytest.raises(ValueError, match=r"one sample or more, got shape \(0, 2, 3\)"):
        read_features(path, shape=(1, 2, 3))
    np.save(path, np.arange(-1, 5).reshape(1, 2, 3))
    with pytest.raises(ValueError, match=r"a.npy: expected pixels from 0 on, got -1"):
        read_features(path, shape=(1, 2, 3))


def test_an_npz_that_is_none(tmp_path):
    (tmp_path / "a.npz").write_text("no zip")
    with pytest.raises(ValueError, match=r"a.npz: not an .npz file"):
        load_dataset(f"npz:{tmp_path}/a.npz")
    np.save(tmp_path / "y.npy", [0, 1])
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("x.npy", "0,1")  # NumPy gives what is no array as bytes
        archive.write(tmp_path / "y.npy", "y.npy")
    with pytest.raises(ValueError, match=r"b.npz: expected arrays x and y, .* no x_train among y"):
        load_dataset(f"npz:{tmp_path}/b.npz")
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

    class FakeData(FakeSet):
        def __init__(self, size=4):
            self.pairs = FakeSet("data").pairs[:size]

    datasets.FakeData = FakeData
    data = load_dataset("torchvision:FakeData")
    assert (len(data.y), data.test) == (4, None)


def _unknown_split(self, root, split, **options):
    assert options == {"download": True}
    raise ValueError(f"Unknown value '{split}' for argument split")


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"__init__": _unknown_split}, "test part: Unknown value 'train' for argument split"),
        ({"__getitem__": lambda self, i: (self.pairs[i][0], torch.zeros(40))}, "expected pairs"),
        ({"__getitem__": lambda self, i: (self.pairs[i][0], 0.5)}, "expected pairs"),
        ({"__getitem__": lambda self, i: (torch.zeros(3, 2, 3), 1)}, "expected pairs"),
        ({"__getitem__": lambda self, i: (*self.pairs[i], 1)}, "expected pairs"),
        ({"__getitem__": lambda self, i: (self.pairs[i][0], 1)}, "expected two classes or more"),
    ],
)
def test_what_is_no_set_of_classes_is_named(monkeypatch, methods, message):
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    datasets = ModuleType("torchvision.datasets")
    datasets.Other = type("Other", (FakeSet,), methods)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    with pytest.raises(ValueError, match=rf"^torchvision:Other: .*{message}"):
        load_dataset("torchvision:Other")


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
    datasets.__version__ = "4.0.0"
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


def test_a_hub_that_runs_code_is_refused(monkeypatch):
    install_hub(monkeypatch)
    monkeypatch.setattr(sys.modules["datasets"], "__version__", "3.6.0")
    with pytest.raises(ImportError, match=r"hf:imdb: datasets 3.6.0 may run code that a set bring"):
        load_dataset("hf:imdb")


def test_hidden_labels_of_hugging_face(monkeypatch):
    features = {"text": Value("string"), "label": ClassLabel()}
    train = Split(features, text=["a", "b"], label=[1, 0])
    install_hub(monkeypatch, train=train, test=Split(features, text=["c"], label=[-1]))
    with pytest.warns(UserWarning, match="hf:sst2: the labels of its test part are hidden"):
        data = load_dataset("hf:sst2")
    assert (data.x, data.y.tolist(), data.test) == (["a", "b"], [1, 0], None)
    for labels, test in (([0, 1, -1], [1]), ([0, 1, 1], [0, -1]), ([0, 1, 2], [1]), ([None], [0])):
        train = Split(features, text=["a"] * len(labels), label=labels)
        install_hub(monkeypatch, train=train, test=Split(features, text=["c"] * 2, label=test))
        with pytest.raises(
            ValueError, match=r"column label, sample \d: expected a label in \[0, 1\]"
        ):
            load_dataset("hf:sst2")


def test_the_task_of_a_table_of_hugging_face(monkeypatch):
    features = {"a": Value("float32"), "y": Value("int64")}
    install_hub(monkeypatch, train=Split(features, a=[1.0, 2.0], y=[3, 4]))
    assert load_dataset("hf:table", target="y").classes == ["3", "4"]
    assert load_dataset("hf:table", target="y", task="regression").y.tolist() == [3, 4]
    features["y"] = ClassLabel()
    monkeypatch.setattr(ClassLabel, "names", [str(i) for i in range(150)])
    numbers = [float(i) for i in range(150)]
    install_hub(monkeypatch, train=Split(features, a=numbers, y=[*range(150)]))
    assert (
        len(load_dataset("hf:table", target="y").classes) == 150
    )  # they say that they are classes
