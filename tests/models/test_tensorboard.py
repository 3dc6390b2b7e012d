import pytest

from torchref.training import Config, Run

pytest.importorskip("tensorboard", reason="waits for tensorboard: pip install -e '.[models]'")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),  # Lightning on torch's newer pytree
    pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:google.*"),
]


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_run_writes_its_metrics_for_tensorboard(tmp_path):
    config = Config(dataset="iris", epochs=3, width=8, accelerator="cpu", parity=False)
    for _ in range(2):  # a new run of the name replaces the old one's
        run = Run(config, root=tmp_path, progress=False)
        run.execute()
        logged = scalars(run.path)
        expected = [row["val_loss"] for row in run.history.rows]
        assert logged["val_loss"] == pytest.approx(expected)
