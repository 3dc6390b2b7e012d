from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer, seed_everything
from sklearn.datasets import make_circles, make_moons

from torchref.data.datasets import Dataset
from torchref.diagnostics.learning_curves import (
    FIXES,
    GOOD,
    OVERFITTING,
    UNCLEAR,
    UNDERFITTING,
    diagnose,
    diagnose_size,
    majority_error,
    plot_size_curve,
)
from torchref.training import Config, DataModule, History, MLPClassifier, size_curve
from torchref.training.size_curve import learning_curve_over_size

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),  # Lightning on torch's newer pytree
]
SEEDS = range(3)


@pytest.fixture(autouse=True)
def _one_thread():
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def moons(samples, noise, seed, make=make_moons, **options):
    x, y = make(samples, noise=noise, random_state=seed, **options)
    return torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(y)


def train(x, y, seed, epochs, ratios=(0.4, 0.55, 0.05), **network):
    """The rows of a training of classes, with no file written."""
    seed_everything(seed, verbose=False)
    data = DataModule(x, y, batch_size="full", ratios=ratios, seed=seed)
    options = {"width": 32, "dropout": 0.0, "batch_norm": False, "lr": 0.02, "normalize": "none"}
    model = MLPClassifier(2, ["no", "yes"], **{**options, **network})
    history = History()
    Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[history],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    ).fit(model, data)
    return history.rows


def curves(train_errors, val_errors, classes=True):
    """Rows with these errors; a single one stays as it is for 40 epochs."""
    pairs = [e if isinstance(e, list) else [e] * 40 for e in (train_errors, val_errors)]
    if not classes:
        return [{"train_loss": t, "val_loss": v} for t, v in zip(*pairs, strict=True)]
    return [
        {"train_loss": t, "val_loss": v, "train_accuracy": 1 - t, "val_accuracy": 1 - v}
        for t, v in zip(*pairs, strict=True)
    ]


# Planted.


@pytest.mark.parametrize("seed", SEEDS)
def test_a_linear_model_on_circles_underfits(seed):
    x, y = moons(300, 0.1, seed, make_circles, factor=0.4)
    rows = train(x, y, seed, 15, depth=0)
    found = diagnose(rows, baseline=majority_error(y), val_samples=165)
    assert found.verdict == UNDERFITTING, found
    assert found.fixes[0].startswith("Use a more complex model")


@pytest.mark.parametrize("seed", SEEDS)
def test_a_wide_model_on_few_noisy_moons_overfits(seed):
    x, y = moons(300, 0.4, seed)
    rows = train(x, y, seed, 60, ratios=(0.13, 0.82, 0.05), depth=2, width=64, lr=0.05)
    found = diagnose(rows, baseline=majority_error(y), val_samples=246)
    assert found.verdict == OVERFITTING, found
    assert found.fixes[0] == "Get more training data."
    assert found.best_epoch < 40
    assert "The validation loss has risen" in found.notes[-1]


@pytest.mark.parametrize("seed", SEEDS)
def test_enough_moons_and_neurons_fit(seed):
    x, y = moons(600, 0.1, seed)
    rows = train(x, y, seed, 40, depth=2, lr=0.05)
    found = diagnose(rows, baseline=majority_error(y), val_samples=330)
    assert (found.verdict, found.fixes) == (GOOD, ()), found
    few = diagnose(rows[:7], baseline=majority_error(y))
    assert few.verdict == UNCLEAR
    assert "There are 7 epochs, and 10 are needed" in few.explanation


# Rules.


@pytest.mark.parametrize(
    ("train_error", "val_error", "verdict"),
    [
        (0.4, 0.42, UNDERFITTING),
        (0.0, 0.2, OVERFITTING),
        (0.03, 0.05, GOOD),
        (0.18, 0.2, UNCLEAR),  # a third of the baseline: high or low?
        (0.02, 0.065, UNCLEAR),  # the gap is a tenth of the baseline
        (0.2, 0.4, UNCLEAR),  # in between, with a wide gap
        (0.4, 0.05, UNCLEAR),  # dropout, it seems
    ],
)
def test_the_table(train_error, val_error, verdict):
    found = diagnose(curves(train_error, val_error), baseline=0.5)
    assert found.verdict == verdict
    assert found.fixes == FIXES[verdict]
    assert (found.train_error, found.val_error) == pytest.approx((train_error, val_error))
    assert found.gap == pytest.approx(val_error - train_error)
    assert str(found).startswith(f"{verdict}: At the end the training error is ")


def test_the_courses_fixes_are_numbered_in_its_order():
    text = str(diagnose(curves(0.0, 0.2), baseline=0.5)).splitlines()[1:]
    words = ("more training data", "regularization", "augmentation", "simpler", "early stopping")
    for i, (line, word) in enumerate(zip(text, (*words, "cross-validation"), strict=True), 1):
        assert line.startswith(f"{i}. ")
        assert word in line
    text = " ".join(FIXES[UNDERFITTING])
    words = ("complex", "longer", "regularization", "features", "learning rate")
    assert sorted(words, key=text.index) == list(words)


@pytest.mark.parametrize(
    ("train_error", "val_error", "verdict"),
    [
        (0.13, 0.15, UNDERFITTING),  # without a target nobody could say
        (0.02, 0.08, OVERFITTING),
        (0.015, 0.019, GOOD),
        (0.06, 0.1, UNCLEAR),  # bias and variance alike
    ],
)
def test_with_a_target_the_larger_of_bias_and_variance_decides(train_error, val_error, verdict):
    found = diagnose(curves(train_error, val_error), baseline=0.5, target=0.02)
    assert found.verdict == verdict
    assert "of a target 0.02" in found.explanation


def test_what_would_settle_it_is_said():
    def reason(*errors, **options):
        return diagnose(curves(*errors), baseline=0.5, **options).explanation

    assert "which `target` of diagnose takes" in reason(0.18, 0.2)
    assert "more validation samples or cross-validate" in reason(0.02, 0.065)
    assert "evaluate the training part" in reason(0.4, 0.05)
    assert "still falling: train longer" in reason([0.5 - i / 100 for i in range(40)], 0.5)
    assert "target is missed within the noise" in reason(0.02, 0.03, target=0.02, val_samples=50)


def test_few_validation_samples_are_noise():
    rows = curves(0.05, 0.15)
    assert diagnose(rows, baseline=0.5).verdict == OVERFITTING
    assert diagnose(rows, baseline=0.5, val_samples=1000).verdict == OVERFITTING
    found = diagnose(rows, baseline=0.5, val_samples=20)
    assert found.verdict == UNCLEAR
    assert found.noise == pytest.approx((0.18182 * 0.81818 / 20) ** 0.5, rel=1e-3)


def test_errors_that_jump_between_epochs_are_noise():
    jumps = [0.02, 0.22] * 20
    assert diagnose(curves(0.02, jumps), baseline=0.5).verdict == UNCLEAR
    # both halves of a jump are of the noise: a step of 0.2 between values of deviation 0.14
    assert diagnose(curves(0.02, jumps), baseline=0.5).noise == pytest.approx(0.2 / 2**0.5)


def test_the_trend_is_that_of_the_validation_error():
    rising = [0.1 + i / 1000 for i in range(40)]  # two windows of 8 epochs: 0.008 apart
    assert diagnose(curves(0.0, rising), baseline=0.5).trend == pytest.approx(0.008)


def test_the_best_epoch_and_the_end_are_told_apart():
    val = [0.3, 0.1, *[0.3] * 38]
    found = diagnose(curves(0.0, val), baseline=0.5)
    assert (found.best_epoch, found.best_val_error) == (1, pytest.approx(0.1))
    assert found.val_error == pytest.approx(0.3)
    assert "risen from 0.1 (epoch 1) to 0.3" in found.notes[0]


def test_values_are_judged_by_the_loss_of_the_mean():
    assert diagnose(curves(0.9, 0.95, classes=False)).verdict == UNDERFITTING
    assert diagnose(curves(0.05, 0.6, classes=False)).verdict == OVERFITTING
    assert diagnose(curves(0.05, 0.08, classes=False)).verdict == GOOD
    assert diagnose(curves(4.0, 4.2, classes=False), baseline=100.0).verdict == GOOD


def test_a_training_error_above_validation_has_a_note():
    assert "dropout and augmentation" in diagnose(curves(0.06, 0.04), baseline=0.5).notes[0]
    assert diagnose(curves(0.04, 0.06), baseline=0.5).notes == ()


def test_a_loss_that_is_nan_is_unclear():
    rows = curves(0.1, [0.1] * 30 + [float("nan")] * 10)
    found = diagnose(rows, baseline=0.5)
    assert found.verdict == UNCLEAR
    assert "not finite: lower the learning rate" in found.explanation
    assert found.best_epoch == 0


@settings(deadline=None, max_examples=50)
@given(
    st.floats(0, 0.6), st.floats(0, 0.6), st.sampled_from([2.0, 10.0]), st.none() | st.just(0.01)
)
def test_units_do_not_matter(t, v, unit, target):
    one = diagnose(curves(t, v, classes=False), baseline=0.5, target=target)
    other = diagnose(
        curves(t * unit, v * unit, classes=False),
        baseline=0.5 * unit,
        target=target and target * unit,
    )
    near = min(
        abs(x - limit)
        for x in (t, v, v - t)
        for limit in (0, 0.01, 0.03, 0.06, 0.125, 0.25, 0.01 + abs(v - t) / 2, 0.01 + 2 * (v - t))
    )
    assert near < 1e-6 or one.verdict == other.verdict


def test_majority_error():
    assert majority_error(torch.tensor([2, 0, 2, 2, 1])) == pytest.approx(0.4)
    with pytest.raises(ValueError, match="majority_error: expected `y` with the class"):
        majority_error(torch.rand(3))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "expected a row for each epoch in `rows`, got none"),
        (curves(0.1, 0.1), {}, "expected `baseline`, of classes majority_error"),
        (curves(0.1, 0.1), {"baseline": 0.0}, "a finite `baseline` > 0, got 0"),
        (curves(0.1, 0.1), {"baseline": 0.5, "target": 0.5}, r"`target` in \[0, 0.5\), got 0.5"),
        (curves(0.1, 0.1), {"baseline": 0.5, "val_samples": 0}, "`val_samples` > 0, got 0"),
        ([{"val_loss": 1.0}], {}, "expected train_loss in each of `rows`, not in row 0"),
    ],
)
def test_what_cannot_be_judged_raises(rows, options, message):
    with pytest.raises(ValueError, match=f"diagnose: .*{message}"):
        diagnose(rows, **options)


# Over the number of samples.

SMALL = Config(
    dataset="moons",
    epochs=4,
    batch_size="full",
    width=8,
    depth=1,
    accelerator="cpu",
    ratios=[0.5, 0.3, 0.2],
)


def watched(monkeypatch):
    """The parts of each run, and a test part that must not be opened."""
    parts = []
    real = DataModule.__init__

    def init(self, *arguments, **options):
        real(self, *arguments, **options)
        parts.append(self.parts)

    def opened(self):
        raise AssertionError("the test part was opened")

    monkeypatch.setattr(DataModule, "__init__", init)
    monkeypatch.setattr(DataModule, "test_dataloader", opened)
    return parts


def test_subsets_are_nested_and_the_other_parts_stay(tmp_path, monkeypatch):
    parts = watched(monkeypatch)
    x, _ = moons(100, 0.2, 0)
    y = (torch.arange(100) % 5 == 0).long()  # one class in five
    rows = learning_curve_over_size(
        SMALL, (0.2, 0.6, 1.0), dataset=Dataset(x, y, ["no", "yes"]), root=tmp_path
    )
    assert [row["samples"] for row in rows] == [10, 30, 50]
    whole, *shares = parts
    for train_part, val, test in shares:
        assert torch.equal(val, whole[1])
        assert torch.equal(test, whole[2])
        assert y[train_part].double().mean() == pytest.approx(0.2)
    sets = [set(part[0].tolist()) for part in shares]
    assert sets[0] < sets[1] < sets[2] == set(whole[0].tolist())
    assert (tmp_path / "moons-size" / "30" / "metrics.json").exists()
    plot_size_curve(rows, tmp_path / "size.png")
    assert (tmp_path / "size.png").stat().st_size > 5000


def test_errors_are_of_the_model_as_it_predicts(tmp_path):
    """Logged training errors would be those of dropout."""
    x, y = moons(100, 0.2, 0)
    config = replace(SMALL, dropout=0.9, width=64, lr=0.05, epochs=8)
    rows = learning_curve_over_size(
        config, (1.0,), dataset=Dataset(x, y, ["no", "yes"]), root=tmp_path
    )
    metrics = torch.load(tmp_path / "moons-size" / "50" / "best.ckpt", weights_only=True)
    model = MLPClassifier(**metrics["hyper_parameters"])
    model.load_state_dict(metrics["state_dict"])
    data = DataModule(x, y, ratios=config.ratios, seed=config.seed)
    wrong = [model.predict(part.x) != part.y for part in (data.train, data.val)]
    assert [rows[0]["train_error"], rows[0]["val_error"]] == [
        part.double().mean().item() for part in wrong
    ]


def test_values_and_repeats(tmp_path, monkeypatch):
    parts = watched(monkeypatch)
    x = torch.randn(60, 2)
    data = Dataset(x, 1000 * x[:, 0], None)
    config = replace(SMALL, epochs=2, lr=1e-6)
    rows = learning_curve_over_size(config, (1.0,), dataset=data, root=tmp_path, repeats=2)
    assert len(parts) == 3
    assert 0.3 < rows[0]["train_error"] < 6  # not a million: in units of the variance
    assert set(rows[0]) == {"samples", "train_error", "val_error"}


def test_shares_of_ordered_and_grouped_samples():
    y, train_part = torch.arange(40) % 2, torch.arange(30)
    data = Dataset(torch.zeros(40, 1), y, ["a", "b"], groups=torch.arange(40) // 5)
    latest = size_curve._nested(data, train_part, "chronological", 0, 10)
    assert latest.tolist() == list(range(20, 30))
    grouped = size_curve._nested(data, train_part, "grouped", 0, 10)
    assert len(data.groups[grouped].unique()) == 2
    more = size_curve._nested(data, train_part, "grouped", 0, 20)
    assert set(grouped.tolist()) < set(more.tolist())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((), "rising `sizes`"), ((0.5, 0.1), "rising"), ((0.0, 1.0), "rising"), ((0.5, 2), "rising")],
)
def test_sizes_that_make_no_sense_raise(sizes, message):
    with pytest.raises(ValueError, match=message):
        learning_curve_over_size(SMALL, sizes)


def test_a_share_of_one_sample_raises(tmp_path):
    x, y = moons(100, 0.2, 0)
    data = Dataset(x, y, ["no", "yes"])
    with pytest.raises(ValueError, match="sizes: expected two samples or more in a share, got 1"):
        learning_curve_over_size(SMALL, (0.02,), dataset=data, root=tmp_path)
    with pytest.raises(ValueError, match="expected `repeats` >= 1, got 0"):
        learning_curve_over_size(SMALL, dataset=data, root=tmp_path, repeats=0)


def size_rows(*rows):
    return [dict(zip(("samples", "train_error", "val_error"), row, strict=True)) for row in rows]


@pytest.mark.parametrize(
    ("rows", "verdict"),
    [
        ([(20, 0.3, 0.5), (50, 0.38, 0.45), (100, 0.4, 0.42)], "more data does not help"),
        ([(20, 0.3, 0.5), (50, 0.38, 0.5), (100, 0.4, 0.5)], "more data does not help"),
        ([(20, 0.0, 0.2), (50, 0.02, 0.1), (100, 0.03, 0.05)], "more data does not help"),
        ([(20, 0.0, 0.3), (50, 0.0, 0.2), (100, 0.01, 0.15)], "more data helps"),
        ([(20, 0.0, 0.3), (50, 0.0, 0.2), (100, 0.0, 0.2)], UNCLEAR),  # a gap that stays
        ([(20, 0.1, 0.2), (50, 0.05, 0.2), (100, 0.0, 0.17)], UNCLEAR),  # one that grows
        ([(50, 0.0, 0.3), (100, 0.0, 0.15)], UNCLEAR),  # two sizes
    ],
)
def test_whether_more_data_helps(rows, verdict):
    assert diagnose_size(size_rows(*rows), baseline=0.5).verdict == verdict


def test_the_size_diagnosis_names_its_numbers():
    found = diagnose_size(size_rows((20, 0, 0.3), (40, 0, 0.2), (100, 0.01, 0.1)), baseline=0.5)
    assert "From 40 to 100 samples the validation error goes from 0.2 to 0.1" in found.explanation
    with pytest.raises(ValueError, match="diagnose_size: expected a finite `baseline`"):
        diagnose_size([], baseline=-1.0)
