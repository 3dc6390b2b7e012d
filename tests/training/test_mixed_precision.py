"""GradScaler and gradient clipping as Lightning's 16-mixed precision does them."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader, TensorDataset

import torchref

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),  # Lightning on torch's newer pytree
]


class Regression(LightningModule):
    def __init__(self, optimizer) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(4, 1)
        self.make_optimizer = optimizer

    def training_step(self, batch):
        x, y = batch
        return torch.nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


def fit(optimizer, **options):
    """Weights after ten steps, one of which overflows in float16."""
    x = torch.randn(80, 4, generator=torch.Generator().manual_seed(1))
    x[24:32] *= 1e4
    data = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model = Regression(optimizer)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model, data)
    assert scaler.get_scale() < 1024.0  # it has seen the overflow
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adam", "AdamW"])
def test_clipping_by_lightning(name):
    ours, theirs = getattr(torchref.optim, name), getattr(torch.optim, name)
    actual = fit(lambda params: ours(params, lr=0.1), gradient_clip_val=0.5)
    assert torch.equal(actual, fit(lambda params: theirs(params, lr=0.1), gradient_clip_val=0.5))


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_fused_clips_by_itself_where_lightning_cannot(name):
    ours, theirs = getattr(torchref.optim, name), getattr(torch.optim, name)
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(lambda params: ours(params, lr=0.1, fused=True), gradient_clip_val=0.5)
    actual = fit(lambda params: ours(params, lr=0.1, fused=True, max_norm=0.5))
    expected = fit(lambda params: theirs(params, lr=0.1), gradient_clip_val=0.5)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
