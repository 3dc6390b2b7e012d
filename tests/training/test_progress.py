import sys

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

from torchref.training import Classifier
from torchref.training.progress import EpochProgress

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),  # Lightning on torch's newer pytree
]


def fit(epochs):
    loader = DataLoader(TensorDataset(torch.zeros(4, 2), torch.arange(4) % 2), batch_size=2)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[EpochProgress()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(torch.nn.Linear(2, 2), 2), loader, loader)
    return trainer


def test_a_bar_over_all_steps_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    fit(3)
    err = capsys.readouterr().err
    assert "100%" in err
    assert "6/6" in err
    assert "val_loss" in err


def test_few_lines_elsewhere(capsys):
    fit(40)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == [f"{epoch}/40" for epoch in range(0, 40, 4)]
    assert "val_accuracy" in lines[0]


def test_a_reader_that_has_gone_ends_no_training(monkeypatch):
    def write(text):
        raise BrokenPipeError

    monkeypatch.setattr(sys.stderr, "write", write)
    assert fit(2).current_epoch == 2
