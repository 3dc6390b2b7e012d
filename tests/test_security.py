"""Nothing that is read runs code, takes all memory or writes where it should not."""

import ast
import gzip
import importlib
import json
import os
import pickle
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from torchref.data import images, load_dataset
from torchref.data.images import read_folder
from torchref.data.reading import HARMLESS
from torchref.training import AtomicCheckpointIO, read_checkpoint
from torchref.training.config import Config

ROOT = Path(__file__).parent.parent
FILES = [
    path
    for folder in ("torchref", "triton_kernels", "scripts")
    for path in sorted((ROOT / folder).rglob("*.py"))
]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),  # Lightning on torch's newer pytree
]


# What is nowhere in the code.

PICKLES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
CALLS = {
    *("eval", "exec", "compile", "__import__"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load"),
    "tempfile.mktemp",
}
LOADERS = {"load_from_checkpoint", "fit", "test", "validate", "predict"}  # of Lightning


def dangers(code: str) -> list[str]:
    """Each import or call that could run what a file or a user says."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {(node.module or "").split(".")[0]}
            names |= {alias.name for alias in node.names if f"{node.module}.{alias.name}" in CALLS}
        else:
            names = set()
        if names & (PICKLES | {call.split(".")[-1] for call in CALLS}):
            found.append(ast.unparse(node))
        if isinstance(node, ast.Call) and is_dangerous(node):
            found.append(ast.unparse(node))
    return found


def is_dangerous(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    given = {word.arg: ast.unparse(word.value) for word in call.keywords}  # None is **
    if name in CALLS or "shell" in given or "trust_remote_code" in given:
        return True
    if name.startswith("subprocess."):
        return not call.args or isinstance(call.args[0], ast.Constant | ast.JoinedStr)
    if name in ("np.load", "numpy.load"):
        return given.get("allow_pickle") != "False"
    if name == "Image.open":  # some formats start a program
        return "formats" not in given
    last = name.split(".")[-1]
    loads = name == "torch.load" or last == "load_from_checkpoint"
    loads |= last in LOADERS and bool({"ckpt_path", None} & set(given))
    return loads and given.get("weights_only") != "True"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_code_runs_nothing_that_it_reads(path):
    assert dangers(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "from os import system",
        "import yaml; yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "os.system('ls')",
        "subprocess.run('ls')",
        "subprocess.run(f'ls {path}')",
        "subprocess.run(['ls'], shell=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "MLPClassifier.load_from_checkpoint(path)",
        "trainer.fit(model, ckpt_path=path)",
        "trainer.fit(model, **options)",
        "tempfile.mktemp()",
        "load_dataset(name, trust_remote_code=True)",
        "Image.open(path)",
    ],
)
def test_the_scan_finds(line):
    assert dangers(line)


# Files that run code where they are unpickled, or read as YAML of any kind.


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def attacks(marker: Path, folder: Path) -> dict[str, bytes]:
    """Contents by name, each of which makes ``marker`` where it is read carelessly."""
    torch.save({"state_dict": Touch(marker)}, folder / "zip")
    np.save(folder / "a.npy", np.array([Touch(marker)], object), allow_pickle=True)
    np.savez(folder / "a.npz", x=np.array([Touch(marker)], object), y=np.zeros(1))
    return {
        "pickle": pickle.dumps(Touch(marker)),
        "pickle of text": pickle.dumps(Touch(marker), protocol=0),
        "zip": (folder / "zip").read_bytes(),
        "npy": (folder / "a.npy").read_bytes(),
        "npz": (folder / "a.npz").read_bytes(),
        "yaml": f"!!python/object/apply:os.system ['touch {marker}']\n".encode(),
        "yaml of a name": f"name: !!python/object/apply:os.mkdir ['{marker}']\n".encode(),
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a run, a search and a cross-validation of iris."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        small = ["--dataset", "iris", "--epochs", "1", "--accelerator", "cpu", "--no-parity"]
        script("train").main(small)
        script("tune").main([*small, "--search", "lr=0.01,0.1", "--trials", "1"])
        script("cross_validate").main([*small, "--folds", "2"])
    return folder


def script(name: str):
    return importlib.import_module(name)


@pytest.fixture
def here(finished, tmp_path, monkeypatch):
    """A copy of that folder."""
    copied = tmp_path / "copy"
    shutil.copytree(finished, copied)
    monkeypatch.chdir(copied)
    (copied / "a.csv").write_text("1,2,3,4\n")
    count = torch.get_num_threads()
    yield copied
    torch.set_num_threads(count)


def refuses(name: str, arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """The one line that a script ends with, with status 2."""
    with pytest.raises(SystemExit) as stopped:
        script(name).main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1
    return error


READ = {  # every file that a script reads, and how
    "runs/iris/best.ckpt": ("train", "predict a.csv --run runs/iris"),
    "runs/iris/last.ckpt": ("train", "--resume --name iris --epochs 3"),
    "runs/iris/config.yaml": ("train", "--resume --name iris --epochs 3"),
    "runs/iris/metrics.json": ("compare", "runs/iris"),
    "x.csv": ("train", "--dataset csv:x.csv"),
    "y.csv": ("train", "--dataset text:y.csv"),
    "x.npz": ("train", "--dataset npz:x.npz"),
    "x.npy": ("train", "predict x.npy --run runs/iris"),
    "z.csv": ("train", "predict z.csv --run runs/iris"),
    "mnist/train-images-idx3-ubyte": ("train", "--dataset mnist --root mnist"),
    "mnist/train-images-idx3-ubyte.gz": ("train", "--dataset mnist --root mnist"),
    "pictures/cat/a.png": ("train", "--dataset folder:pictures"),
    "runs/cv-iris/cross_validation.yaml": ("cross_validate", "--dataset iris --resume"),
    "runs/tune-iris/search.yaml": ("tune", "--dataset iris --resume"),
    "runs/tune-iris/study.db": ("tune", "--dataset iris --resume"),
    "x.yaml": ("train", "--config x.yaml"),
    "x.json": ("report_benchmarks", "x.json"),
    "y.json": ("benchmark", "--compare y.json y.json"),
}


@pytest.mark.parametrize("file", READ)
def test_no_file_runs_code(here, tmp_path, capsys, file):
    marker, path = tmp_path / "marker", here / file
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in ("train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        path.with_name(name).touch()
    for name, content in attacks(marker, tmp_path).items():
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
        refuses(READ[file][0], READ[file][1].split(), capsys)
        assert not marker.exists(), name


@pytest.mark.parametrize("name", ["train", "tune", "cross_validate"])
def test_no_configuration_runs_code(here, tmp_path, capsys, name):
    marker = tmp_path / "marker"
    for attack in ("yaml", "yaml of a name"):
        (here / "a.yaml").write_bytes(attacks(marker, tmp_path)[attack])
        refuses(name, ["--config", "a.yaml"], capsys)
        assert not marker.exists(), attack


ALIASES = "a: &a [1, 1]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise("abcdefgh"))


@pytest.mark.parametrize(
    ("name", "file", "arguments"),
    [
        ("train", "x.yaml", "--config x.yaml"),
        ("tune", "x.yaml", "--config x.yaml"),
        ("cross_validate", "x.yaml", "--config x.yaml"),
        ("train", "runs/iris/config.yaml", "--resume --name iris --epochs 3"),
        ("compare", "runs/iris/config.yaml", "runs/iris"),
        ("tune", "runs/tune-iris/search.yaml", "--dataset iris --resume"),
        ("cross_validate", "runs/cv-iris/cross_validation.yaml", "--dataset iris --resume"),
    ],
)
def test_no_configuration_is_larger_than_its_file(here, capsys, name, file, arguments):
    """With 30 such lines it would have a billion numbers, and so deep a one takes hours."""
    (here / file).write_text("drop: " + "[" * 100_000)
    assert "expected values, not lists in lists, line 1" in refuses(name, arguments.split(), capsys)
    (here / file).write_text(ALIASES)
    assert "expected values, not aliases, got *a, line 2" in refuses(
        name, arguments.split(), capsys
    )


def test_no_search_runs_code(finished, here, tmp_path, capsys):
    """Neither what was asked for nor the database, whose values are JSON."""
    marker, arguments = tmp_path / "marker", ["--dataset", "iris", "--resume"]
    path = here / "runs" / "tune-iris" / "search.yaml"
    path.write_bytes(attacks(marker, tmp_path)["yaml"])
    refuses("tune", arguments, capsys)
    assert not marker.exists()
    shutil.copy(finished / "runs" / "tune-iris" / "search.yaml", path)
    database = sqlite3.connect(path.with_name("study.db"))
    for column in ("trial_user_attributes.value_json", "trial_params.distribution_json"):
        table, name = column.split(".")
        changed = database.execute(f"update {table} set {name} = ?", [pickle.dumps(Touch(marker))])
        assert changed.rowcount > 0
        database.commit()
    database.close()
    with pytest.raises((SystemExit, ValueError)):
        script("tune").main(arguments)
    assert not marker.exists()


def test_the_attacks_would_succeed(tmp_path):
    marker = tmp_path / "marker"
    for name, content in attacks(marker, tmp_path).items():
        (tmp_path / name).write_bytes(content)
        if name.startswith("yaml"):
            yaml.unsafe_load(content)
        elif name == "zip":
            torch.load(tmp_path / name, weights_only=False)
        else:
            loaded = np.load(tmp_path / name, allow_pickle=True)
            _ = loaded["x"] if name == "npz" else loaded
        assert marker.exists(), name
        marker.rmdir() if marker.is_dir() else marker.unlink()


def test_a_checkpoint_names_no_function(here, tmp_path, capsys, monkeypatch):
    """Lightning imports and calls what `_instantiator` names; since 2.6.6 its own alone."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    path = here / "runs" / "iris" / "best.ckpt"
    saved = read_checkpoint(path)
    saved["hyper_parameters"]["_instantiator"] = "evil.make"
    torch.save(saved, path)
    refuses("train", ["predict", "a.csv", "--run", "runs/iris"], capsys)
    assert not (tmp_path / "marker").exists()


@pytest.fixture
def soon():
    """Reading a pipe that nobody writes to would wait forever."""

    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="waits for pipes with names")
@pytest.mark.parametrize("file", ["last.ckpt", "config.yaml", "metrics.json"])
def test_a_pipe_is_no_file_of_a_run(here, soon, capsys, file):
    (here / "runs" / "iris" / file).unlink()
    os.mkfifo(here / "runs" / "iris" / file)
    error = refuses("train", ["--resume", "--name", "iris", "--epochs", "3"], capsys)
    assert f"{file}: expected a file, got a pipe" in error


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="waits for pipes with names")
def test_a_pipe_is_no_checkpoint(tmp_path, soon):
    os.mkfifo(tmp_path / "best.ckpt")
    for read in (read_checkpoint, AtomicCheckpointIO().load_checkpoint):
        with pytest.raises(ValueError, match=r"best.ckpt: expected a file, got a pipe"):
            read(tmp_path / "best.ckpt")


def test_a_checkpoint_in_part_ends_in_one_line(here, capsys):
    path = here / "runs" / "iris" / "last.ckpt"
    saved = read_checkpoint(path)
    for name in ("state_dict", "optimizer_states", "ExactResume", "loops"):
        AtomicCheckpointIO().save_checkpoint({k: saved[k] for k in saved if k != name}, path)
        error = refuses("train", ["--resume", "--name", "iris", "--epochs", "3"], capsys)
        assert name in error


# Where files go.


def test_runs_stay_in_their_folders(finished):
    found = {str(path.relative_to(finished)) for path in finished.glob("*/*")}
    assert found == {"runs/iris", "runs/tune-iris", "runs/cv-iris"}
    assert [path.name for path in finished.iterdir()] == ["runs"]


@pytest.mark.parametrize("folder", ["../up", "a/b", "/tmp/up", ".", "..", ""])
@pytest.mark.parametrize("name", ["train", "tune", "cross_validate", "overfitting"])
def test_a_name_is_no_path(tmp_path, monkeypatch, capsys, name, folder):
    monkeypatch.chdir(tmp_path)
    flag = "--folder" if name == "overfitting" else "--name"
    assert "expected a plain folder name" in refuses(name, [flag, folder], capsys)
    assert not list(tmp_path.iterdir())


def test_a_data_set_from_elsewhere_stays_below_runs():
    for dataset in ("csv:../../up.csv", "csv:/tmp/up.csv", "csv:..", "folder:/tmp/..", "hf:a/b"):
        assert "/" not in Config(dataset=dataset).folder


# Readers.

BOUND = 2**29
"""Bytes that a refusal may take. A row's 2**24 characters have four bytes each in csv's buffer,
which doubles, and one in the string; a million cells are strings of 60 bytes in two rows, and in
one their bytes, of 40."""

REFUSALS = """
import json, resource, sys
from pathlib import Path
import PIL.Image
from torchref.data import load_dataset, read_features, read_texts
from torchref.data.images import read_idx

READERS = {"read_idx": read_idx, "read_features": read_features, "read_texts": read_texts}
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for line in sys.stdin:
    reader, path = json.loads(line)
    try:
        READERS[reader](path) if reader in READERS else load_dataset(f"{reader}:{path}")
    except ValueError as error:
        print(error, flush=True)
"""


def png(width: int, height: int, bits: int = 8) -> bytes:
    """A gray picture with pixels for one row."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(1 + width * bits // 8)))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


def npy(shape: tuple[int, ...]) -> bytes:
    """The header of an array, and 64 bytes of it."""
    header = str({"descr": "<f8", "fortran_order": False, "shape": shape}).encode().ljust(117)
    return b"\x93NUMPY\1\0" + struct.pack("<H", 118) + header + b"\n" + bytes(64)


def idx(*shape: int) -> bytes:
    return bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)


def write_refused(folder: Path) -> dict[str, tuple[str, str]]:
    """Files by name, with who reads them and what that says."""
    wide = ",".join(map(str, range(10**6)))
    contents = {
        "promise.idx": idx(2**20, 2**20),
        # 10 MB that unpack to 10 GB
        "bomb.gz": gzip.compress(idx(10, 2**30)) + gzip.compress(bytes(10 * 2**20)) * 2**10,
        "promise.npy": npy((2**40, 4)),
        "overflow.npy": npy((2**62, 2**62)),
        "line.csv": b"a" * (2**24 + 1),
        "quote.csv": b'a,b\n"' + b"c\n" * 2**23,
        "nul.csv": b"1,2\n3,\0\n",
        "columns.csv": f"{wide}\n{wide}\n1\n".encode(),
        "pictures.16/cat/a.png": png(2, 2, bits=16),
        "pictures.cut/cat/a.png": png(200, 200)[:50],
        "pictures.bomb/cat/a.png": png(50_000, 50_000),
        "pictures.eps/cat/a.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n\n",
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for name in ("sparse.csv", "sparse.txt"):
        (folder / name).touch()
        os.truncate(folder / name, 2**34)
    with zipfile.ZipFile(folder / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", bytes(HARMLESS + 1))
    for name in (
        "pipe.csv",
        "pipe.txt",
        "pipe.npy",
        "pipe.npz",
        "pipe.idx",
        "pictures.pipe/a/a.png",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(folder / name)
    os.symlink("/dev/zero", folder / "zero.csv")
    pipe, picture = "expected a file, got a pipe, a socket or a device", "not a readable image"
    return {
        "promise.idx": ("read_idx", "truncated: shape (1048576, 1048576)"),
        "bomb.gz": ("read_idx", "10,737,418,240 bytes of data in a file of"),
        "promise.npy": ("read_features", "mmap length is greater than file size"),
        "overflow.npy": ("read_features", "not a .npy file of numbers"),
        "bomb.npz": ("npz", "268,435,457 bytes of data in a file of"),
        "line.csv": ("csv", "row 1: not a CSV file: over 16777216 characters"),
        "quote.csv": ("csv", "not a CSV file: over 16777216 characters"),
        "sparse.csv": ("csv", "row 1: not a CSV file: over 16777216 characters"),
        "sparse.txt": ("read_texts", "row 1: not a text: over 16777216 characters"),
        "nul.csv": ("csv", "row 2: not a CSV file: a NUL"),
        "columns.csv": ("csv", "row 3: expected 1000000 columns, got 1"),
        "pictures.16": ("folder", f"cat/a.png: {picture}: expected 8 bits for each channel"),
        "pictures.cut": ("folder", f"cat/a.png: {picture}"),
        "pictures.bomb": ("folder", f"cat/a.png: {picture}: Image size (2500000000 pixels)"),
        "pictures.eps": ("folder", f"cat/a.png: {picture}: cannot identify"),
        "pictures.pipe": ("folder", f"a/a.png: {pipe}"),
        "pipe.csv": ("csv", pipe),
        "pipe.txt": ("read_texts", pipe),
        "pipe.npy": ("read_features", pipe),
        "pipe.npz": ("npz", pipe),
        "pipe.idx": ("read_idx", pipe),
        "zero.csv": ("text", pipe),
    }


@pytest.mark.skipif(sys.platform != "linux", reason="waits for another system's limit of memory")
def test_what_is_refused_takes_little_memory(tmp_path):
    cases = write_refused(tmp_path)
    lines = [json.dumps([reader, str(tmp_path / name)]) for name, (reader, _) in cases.items()]
    done = subprocess.run(
        [sys.executable, "-c", REFUSALS, str(BOUND)],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == len(cases)
    for line, (name, (_, message)) in zip(said, cases.items(), strict=True):
        assert line.startswith(str(tmp_path / name))
        assert message in line


@pytest.mark.parametrize("form", ["%.4f", "%d"])
def test_a_table_takes_six_times_its_file_at_most(tmp_path, form):
    """A short number is a byte or two and a comma: features of 4 bytes, a length of 4 for each
    cell, its text, and one column as strings of 50 bytes beside all columns."""
    path = tmp_path / "a.csv"
    rng = np.random.default_rng(0)
    np.savetxt(path, 30 * rng.random((5_000, 20)) // (form == "%d" or 1e-4) % 30, form, ",")
    load_dataset(f"csv:{path}", task="regression")  # what is imported at first use is no cell's
    tracemalloc.start()
    try:
        load_dataset(f"csv:{path}", task="regression")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * path.stat().st_size


def test_of_other_files_in_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    (tmp_path / "cat").mkdir()
    others = (SimpleNamespace(name=f"{i}.txt") for i in range(10**5))
    listed = {
        tmp_path: [SimpleNamespace(name="cat", is_dir=lambda: True)],
        tmp_path / "cat": others,
    }
    monkeypatch.setattr(images.os.DirEntry, "is_dir", lambda entry: True, raising=False)
    monkeypatch.setattr(images.os, "scandir", lambda path: nullcontext(listed[path]))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="no images"):
            read_folder(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10**5  # a byte for each


def test_a_table_with_far_more_features_than_bytes_is_refused(tmp_path):
    """Each of 900 categories in 100 columns is a feature: 360 kB for a row of 300 bytes."""
    rows = [",".join([str(i % 900)] * 100 + ["ab"[i % 2]]) for i in range(1800)]
    (tmp_path / "a.csv").write_text("\n".join(rows))
    names = [str(i) for i in range(1, 101)]
    with pytest.raises(ValueError, match=r"a.csv: 648,000,000 bytes of data in a file of"):
        load_dataset(f"csv:{tmp_path}/a.csv", categories=names)
