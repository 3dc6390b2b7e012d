"""The Lightning side: a classifier, its data, callbacks, the torch twin and the run."""

try:
    import lightning.pytorch as _lightning  # noqa: F401
    import torchmetrics as _torchmetrics  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        f"torchref.training: {error.name} is missing: pip install 'torchref-triton[train]'"
    ) from error

from torchref.training.checkpoint import AtomicCheckpointIO as AtomicCheckpointIO
from torchref.training.checkpoint import LastCheckpoint as LastCheckpoint
from torchref.training.checkpoint import read_checkpoint as read_checkpoint
from torchref.training.config import Config as Config
from torchref.training.convert import ConvertCallback as ConvertCallback
from torchref.training.convert import SyncBatchNormPlugin as SyncBatchNormPlugin
from torchref.training.cross_validate import CrossValidation as CrossValidation
from torchref.training.curves import plot_learning_curves as plot_learning_curves
from torchref.training.data_module import DataModule as DataModule
from torchref.training.decision import coverage_curve as coverage_curve
from torchref.training.decision import decide as decide
from torchref.training.decision import log_loss as log_loss
from torchref.training.early_stopping import EarlyStopping as EarlyStopping
from torchref.training.early_stopping import RestoreBest as RestoreBest
from torchref.training.gradient_flow import GradientFlowCallback as GradientFlowCallback
from torchref.training.history import History as History
from torchref.training.mlp import build_mlp as build_mlp
from torchref.training.mlp import build_normalizer as build_normalizer
from torchref.training.mlp import build_optimizer as build_optimizer
from torchref.training.module import Classifier as Classifier
from torchref.training.module import MLPClassifier as MLPClassifier
from torchref.training.module import MLPRegressor as MLPRegressor
from torchref.training.module import Regressor as Regressor
from torchref.training.module import Supervised as Supervised
from torchref.training.non_finite import StopOnNonFinite as StopOnNonFinite
from torchref.training.parity import Parity as Parity
from torchref.training.probes import learning_rate_range as learning_rate_range
from torchref.training.probes import overfit_one_batch as overfit_one_batch
from torchref.training.report import write_report as write_report
from torchref.training.resume import ExactResume as ExactResume
from torchref.training.resume import ResumableDataLoader as ResumableDataLoader
from torchref.training.run import Run as Run
from torchref.training.size_curve import learning_curve_over_size as learning_curve_over_size
