"""A checkpoint is whole or not there; a damaged one is noticed, named, and another one offered."""

import errno
import io
import math
import os
import shutil
import zipfile
from dataclasses import replace

import pytest
import torch
from killing import full_disk
from lightning.pytorch import Trainer

from torchref.training import (
    AtomicCheckpointIO,
    Classifier,
    Config,
    DataModule,
    EarlyStopping,
    LastCheckpoint,
    RestoreBest,
    Run,
    read_checkpoint,
)
from torchref.training import checkpoint as writing
from torchref.training.checkpoint import previous, write_text

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")  # Lightning on torch's newer pytree

SAVED = {"weights": torch.arange(5000.0), "epoch": 3, "text": "whole"}
IRIS = Config("iris", epochs=2, parity=False, accelerator="cpu")


@pytest.fixture
def path(tmp_path):
    found = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(SAVED, found)
    return found


def same(found, expected=SAVED):
    return found.keys() == expected.keys() and torch.equal(found["weights"], expected["weights"])


def test_a_checkpoint_is_torch_s_own_file(path):
    assert same(read_checkpoint(path))
    told = SAVED | {"AtomicCheckpointIO": "sha256"}
    assert same(torch.load(path, weights_only=True), told)
    assert same(torch.load(path, weights_only=True, mmap=True), told)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"sha256:")


def test_a_compressed_checkpoint_is_refused(path):
    """Torch would unpack 268 MB of zeros from 262 kB; it compresses nothing itself."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    assert torch.load(path, weights_only=True)["epoch"] == 3
    refused_by_both(path, r"last.ckpt: 'archive/data.pkl' is compressed")


def test_files_of_torch_and_lightning_are_read(tmp_path):
    torch.save(SAVED, tmp_path / "torch.pt")
    assert same(read_checkpoint(tmp_path / "torch.pt"))
    assert same(AtomicCheckpointIO().load_checkpoint(tmp_path / "torch.pt", weights_only=True))
    torch.save(SAVED, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert same(read_checkpoint(tmp_path / "old.pt"))


def refused_by_both(path, message):
    with pytest.raises(ValueError, match=message):
        read_checkpoint(path)
    with pytest.raises(ValueError, match=message):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=True)


def test_every_changed_byte_is_noticed(path):
    """Torch's own reader takes a changed weight as it is."""
    AtomicCheckpointIO().save_checkpoint({"weights": torch.arange(5.0)}, path)
    whole = path.read_bytes()
    for place in range(len(whole)):  # to the end: in the sum itself and in what marks it, too
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        refused_by_both(path, r"last.ckpt is damaged: its checksum (does not match|is missing)")


@pytest.mark.parametrize(
    "lose",
    [lambda b: b + bytes(16), lambda b: b[:-71] + bytes(71), lambda b: b[:-5]],
    ids=["appended", "zeroed", "cut"],
)
def test_a_changed_weight_is_noticed_where_the_sum_is_lost(path, lose):
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 64
    path.write_bytes(lose(bytes(damaged)))
    assert not torch.equal(torch.load(path, weights_only=True)["weights"], SAVED["weights"])
    refused_by_both(path, r"last.ckpt is damaged: its checksum is missing")


def test_what_is_read_is_what_was_saved(path):
    """Written by torch again, it promises no sum."""
    torch.save(read_checkpoint(path), path)
    assert same(read_checkpoint(path))
    assert same(AtomicCheckpointIO().load_checkpoint(path, weights_only=True))


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_truncated_file_is_noticed(path, share):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"last.ckpt is damaged: it ends too early"):
        read_checkpoint(path)
    with pytest.raises(ValueError, match=r"last.ckpt is damaged: it ends too early"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=True)


def test_what_is_no_checkpoint_is_refused(path):
    for content in (b"", b"text"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"last.ckpt is damaged: it is no checkpoint"):
            read_checkpoint(path)
    AtomicCheckpointIO().save_checkpoint({"run": Config()}, path)
    with pytest.raises(ValueError, match=r"last.ckpt holds other than names and tensors"):
        read_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"last.ckpt is damaged: it is no checkpoint"):
        read_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        read_checkpoint(path.with_name("none.ckpt"))


def test_the_replaced_checkpoint_stays(path):
    for number in (1, 2):
        AtomicCheckpointIO().save_checkpoint(SAVED | {"epoch": number}, path)
    assert read_checkpoint(path)["epoch"] == 2
    assert read_checkpoint(previous(path))["epoch"] == 1
    assert {file.name for file in path.parent.iterdir()} == {"last.ckpt", "last.ckpt.previous"}


def test_without_hard_links_a_copy_stays(path, monkeypatch):
    def refused(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    AtomicCheckpointIO().save_checkpoint(SAVED | {"epoch": 9}, path)
    assert read_checkpoint(path)["epoch"] == 9
    assert read_checkpoint(previous(path))["epoch"] == 3


def test_it_is_on_the_disk_before_it_has_its_name(path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, c=call, n=name: (calls.append(n), c(*a))[1])
    AtomicCheckpointIO().save_checkpoint(SAVED, path)
    assert calls == ["fsync", "replace", "replace", "fsync"]  # file, both names, folder


@pytest.mark.parametrize("call", ["fsync", "replace", "link"])
def test_an_error_leaves_what_was_there(path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = path.read_bytes()
    monkeypatch.setattr(writing.os, call, full)
    monkeypatch.setattr(writing.shutil, "copyfile", full)
    with pytest.raises(OSError, match=r"No space left on device: .*last.ckpt'"):
        AtomicCheckpointIO().save_checkpoint(SAVED | {"epoch": 9}, path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir() if file.name.endswith(".new")] == []


def test_an_interrupt_leaves_nothing_behind(path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(writing.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().save_checkpoint(SAVED, path)
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_what_stops_a_write_is_what_is_raised(error):
    """Torch's writer makes a RuntimeError of it, "unexpected pos"."""

    class Stopping(io.BytesIO):
        def write(self, data):
            if self.tell() > 500:
                raise error
            return super().write(data)

    with pytest.raises(type(error)) as raised:
        writing._save(SAVED, Stopping())
    assert raised.value is error


def test_an_error_of_torchs_own_is_not_taken_for_the_one_that_is_handled(monkeypatch):
    def broken(*_):
        raise RuntimeError("torch's own")

    monkeypatch.setattr(torch, "save", broken)
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(RuntimeError, match="torch's own"):
            writing._save(SAVED, io.BytesIO())


def test_the_checkpoint_that_training_came_from_stays(path):
    """The one in its way is the damaged one."""
    AtomicCheckpointIO().save_checkpoint(SAVED | {"epoch": 4}, path)
    path.write_bytes(b"damaged")
    plugin = AtomicCheckpointIO()
    assert plugin.load_checkpoint(previous(path), weights_only=True)["epoch"] == 3
    plugin.save_checkpoint(SAVED | {"epoch": 5}, path)
    assert read_checkpoint(previous(path))["epoch"] == 3
    plugin.save_checkpoint(SAVED | {"epoch": 6}, path)
    assert read_checkpoint(previous(path))["epoch"] == 5


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    Run(IRIS, root=tmp_path, progress=False).execute()
    last = tmp_path / "iris" / "last.ckpt"
    before = last.read_bytes()
    longer = Run(replace(IRIS, epochs=4), resume="last", root=tmp_path, progress=False)
    with full_disk(4096), pytest.raises(OSError, match=r"File too large: .*last.ckpt'"):
        longer.execute()
    assert last.read_bytes() == before
    metrics = Run(replace(IRIS, epochs=4), resume="last", root=tmp_path, progress=False).execute()
    assert metrics["epochs"] == 4


def test_another_checkpoint_is_offered_where_the_last_is_damaged(tmp_path):
    Run(IRIS, root=tmp_path, progress=False).execute()
    folder = tmp_path / "iris"
    (folder / "metrics.json").unlink()  # as if it had been killed
    whole = (folder / "last.ckpt").read_bytes()
    (folder / "last.ckpt").write_bytes(whole[:-3000])
    offer = r"last.ckpt.previous is whole \(epoch 0, step 2\): --resume previous goes on from there"
    with pytest.raises(ValueError, match=rf"resume: .*last.ckpt is damaged: .*; .*{offer}"):
        Run(IRIS, resume="last", root=tmp_path)
    (folder / "last.ckpt").unlink()
    with pytest.raises(FileNotFoundError, match=rf"resume: no checkpoint .*last.ckpt; .*{offer}"):
        Run(IRIS, resume="last", root=tmp_path)
    metrics = Run(IRIS, resume="previous", root=tmp_path, progress=False).execute()
    assert metrics["epochs"] == 2
    (folder / "last.ckpt.previous").write_bytes(b"broken")
    (folder / "last.ckpt").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"last.ckpt is damaged: it is no checkpoint$"):
        Run(IRIS, resume="last", root=tmp_path)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    Run(IRIS, root=tmp_path, progress=False).execute()
    AtomicCheckpointIO().save_checkpoint(SAVED, tmp_path / "iris" / "last.ckpt")
    with pytest.raises(ValueError, match=r"last.ckpt is no run's checkpoint: no 'loops'"):
        Run(IRIS, resume="last", root=tmp_path)


GENERATORS = ("ExactResume", 0, "generators")
STOPPING = ("callbacks", EarlyStopping("val_loss").state_key)
SHAPE = r"state_dict: net.0.weight: expected shape \(128, 4\), got"
BEST = SHAPE.replace("state_dict", "best_state")
MISFITS = {  # where something else stands, None for nothing, and what is said
    "no weights": (("state_dict",), None, "no 'state_dict'"),
    "weights in a list": (("state_dict",), [], "'state_dict' is of type list"),
    "a weight of another shape": (("state_dict", "net.0.weight"), torch.ones(3), SHAPE),
    "a weight is missing": (("state_dict", "net.0.weight"), None, SHAPE),
    "an unknown weight": (("state_dict", 1), "x", "state_dict: 1: expected nothing of that name"),
    "no optimizer": (("optimizer_states",), None, "no 'optimizer_states'"),
    "optimizer: none": (("optimizer_states",), [], "expected the state of one optimizer, got 0"),
    "optimizer: a number": (("optimizer_states",), [5], "optimizer_states: AttributeError: 'int'"),
    "optimizer: no groups": (
        ("optimizer_states", 0, "param_groups"),
        None,
        "optimizer_states: KeyError: 'param_groups'",
    ),
    "no schedules": (("lr_schedulers",), None, "no 'lr_schedulers'"),
    "loops: a text": (("loops",), "x", "is no run's checkpoint: no 'fit_loop'"),
    "epochs: a text": (
        ("loops", "fit_loop", "epoch_progress", "current", "processed"),
        "x",
        "'processed' is of type str",
    ),
    "batches: an older state": (
        ("loops", "fit_loop", "state_dict", "combined_loader"),
        [{"epoch": 1, "batches": 1}],
        "state_dict: samples: expected 106, got None",
    ),
    "stopping: nothing": ((*STOPPING, "best_score"), None, "EarlyStopping: KeyError: 'best_score'"),
    "stopping: a best weight of another shape": (
        (*STOPPING, "best_state", "net.0.weight"),
        torch.ones(3),
        BEST,
    ),
    "stopping: a number": ((*STOPPING, "best_state"), 5, "'best_state' is of type int"),
    "history: nothing": (("callbacks", "History"), {}, "History: KeyError: 'rows'"),
    "gradients: nothing": (
        ("callbacks", "GradientFlowCallback"),
        None,
        "no 'GradientFlowCallback'",
    ),
    "no ExactResume": (("ExactResume",), None, "ExactResume: expected a state of each process"),
    "ExactResume: empty": (("ExactResume",), [], r"a state of each process, got \[\]"),
    "ExactResume: a number": (("ExactResume",), [5], "ExactResume: damaged: TypeError"),
    "generators: none": (GENERATORS, {}, "ExactResume: damaged: KeyError: 'torch'"),
    "generators: torch": (
        (*GENERATORS, "torch"),
        torch.zeros(3, dtype=torch.uint8),
        "ExactResume: damaged: RuntimeError: Expected a CPUGeneratorImplState of size",
    ),
    "generators: a place NumPy does not have": (
        (*GENERATORS, "numpy", 2),
        10**6,
        r"numpy: expected a place in \[0, 624\], got 1000000",
    ),
    "generators: GPUs": ((*GENERATORS, "cuda"), ["x"], "cuda: expected bytes, got 'x'"),
    "metrics: no tensor": (
        ("ExactResume", 0, "metrics"),
        {"val_scores.accuracy": {"tp": "x"}},
        "val_scores.accuracy: expected tensors, of a state that the metric has, got 'tp'",
    ),
    "metrics: unknown": (
        ("ExactResume", 0, "metrics"),
        {"val_scores.accuracy": {"update": torch.ones(1)}},
        "val_scores.accuracy: expected tensors, of a state that the metric has, got 'update'",
    ),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    Run(IRIS, root=root, progress=False).execute()
    return root / "iris"


@pytest.fixture
def finished(trained, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(trained, tmp_path / "iris")


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_changes(finished, misfit):
    (*names, last), value, message = MISFITS[misfit]
    saved = inner = read_checkpoint(finished / "last.ckpt")
    for name in names:
        inner = inner[name]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    AtomicCheckpointIO().save_checkpoint(saved, finished / "last.ckpt")
    before = {file: file.read_bytes() for file in finished.iterdir()}
    with pytest.raises(ValueError, match=rf"^resume: .*last.ckpt .*{message}"):
        Run(replace(IRIS, epochs=4), resume="last", root=finished.parent, progress=False)
    assert {file: file.read_bytes() for file in finished.iterdir()} == before


@pytest.mark.parametrize(
    "text",
    [
        '{"test_opened": 1e400, "seconds": 1}',
        '{"test_opened": -1, "seconds": 1}',
        '{"test_opened": 1, "seconds": 1e400}',
        '{"test_opened": 1, "seconds": -1}',
    ],
)
def test_counts_and_times_that_cannot_be_are_refused(finished, text):
    (finished / "metrics.json").write_text(text)
    with pytest.raises(ValueError, match=r"resume: .*metrics.json is damaged"):
        Run(replace(IRIS, epochs=4), resume="last", root=finished.parent, progress=False)


def test_a_damaged_configuration_is_named(tmp_path):
    Run(IRIS, root=tmp_path, progress=False).execute()
    for text in ("", "a: [", "just a text"):
        (tmp_path / "iris" / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"iris.config.yaml is damaged"):
            Run(replace(IRIS, epochs=4), resume="last", root=tmp_path)


def test_a_finished_run_has_nothing_to_resume(tmp_path):
    config = replace(IRIS, epochs=30, patience=1, lr=0.5)
    done = Run(config, root=tmp_path, progress=False).execute()["epochs"]
    assert done < 30
    with pytest.raises(ValueError, match="patience: expected more than the 1 epochs it has waited"):
        Run(config, resume="last", root=tmp_path)
    more = Run(replace(config, patience=2), resume="last", root=tmp_path, progress=False)
    assert more.execute()["epochs"] > done


def test_files_are_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    path.write_text("old")
    monkeypatch.setattr(writing.os, "replace", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        write_text(path, "new")
    assert path.read_text() == "old"
    monkeypatch.undo()
    write_text(path, "new")
    assert path.read_text() == "new"


def test_the_last_checkpoint_is_written_every_so_many_batches(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(Trainer, "save_checkpoint", lambda *_, **__: saved.append(1))
    with pytest.raises(ValueError, match="save_every: expected >= 1, got 0"):
        LastCheckpoint(tmp_path, every=0)
    config = replace(IRIS, batch_size=16, save_every=2)  # 7 batches, so the ends are not among them
    Run(config, root=tmp_path, progress=False).execute()
    assert len(saved) == 2 * (3 + 1) + 1  # 2, 4, 6 and the end of each epoch, and the best


@pytest.mark.parametrize(
    ("options", "at"),
    [
        ({}, [2, 4, 6, 8, 10]),
        ({"val_check_interval": 4}, [2, 6, 10]),
        ({"accumulate_grad_batches": 3}, [6]),
    ],
    ids=["plain", "validation", "accumulation"],
)
def test_no_checkpoint_where_lightning_could_not_go_on(tmp_path, monkeypatch, options, at):
    saved = []
    monkeypatch.setattr(
        Trainer,
        "save_checkpoint",
        lambda trainer, *_, **__: saved.append(trainer.fit_loop.batch_idx + 1),
    )
    data = DataModule(torch.randn(160, 4), torch.arange(160) % 2, batch_size=10)
    trainer = Trainer(
        max_epochs=1,
        callbacks=[LastCheckpoint(tmp_path, every=2)],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(Classifier(torch.nn.Linear(4, 2), classes=2), data)
    assert saved[:-1] == at


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LastCheckpoint("x", every="2"), TypeError, "save_every: expected an integer"),
        (lambda: LastCheckpoint("x", every=1.5), TypeError, "save_every: .*, got 1.5"),
        (lambda: LastCheckpoint("x", every=True), TypeError, "save_every: .*, got True"),
        (lambda: Run(replace(IRIS, save_every="2")), TypeError, "^save_every: .*, got '2'"),
        (lambda: EarlyStopping(patience="2"), TypeError, "patience: expected an integer, got '2'"),
        (lambda: EarlyStopping(patience=2.5), TypeError, "patience: .*, got 2.5"),
        (lambda: EarlyStopping(start_from_epoch=0.5), TypeError, "start_from_epoch: .* got 0.5"),
        (lambda: EarlyStopping(min_delta="0"), TypeError, "min_delta: expected a number, got '0'"),
        (lambda: EarlyStopping(min_delta=math.inf), ValueError, "min_delta: .* >= 0, got inf"),
        (lambda: EarlyStopping(min_delta=math.nan), ValueError, "min_delta: .* >= 0, got nan"),
        (lambda: EarlyStopping(monitor=None), TypeError, "monitor: .*name, got None"),
        (lambda: RestoreBest(monitor=3), TypeError, "monitor: .*name, got 3"),
    ],
)
def test_what_callbacks_are_not_made_with(make, error, message):
    with pytest.raises(error, match=message):
        make()
