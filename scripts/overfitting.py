"""Hidden layers of growing size on two moons: the boundary, and the errors, as they overfit.

python scripts/overfitting.py                         sizes 1 to 50, about 30 seconds
python scripts/overfitting.py --sizes 2 8 32 --samples 400
python scripts/overfitting.py --noise 0.2 --seeds 5 --epochs 2000 --folder less-noise
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torchref
import torchref.optim
from torchref._printing import printing
from torchref.diagnostics.drawing import new_figure
from torchref.diagnostics.learning_curves import CURVES
from torchref.training import build_mlp
from torchref.training.checks import check_range
from torchref.training.command_line import USER_ERRORS, OneLineParser, describe, interrupted

LR = 0.05  # Adam's, on all samples at once
VALIDATION = 1000  # samples, so many that their error is exact to about 0.01
PER_ROW = 4  # panels
GRID = 200  # points on a side of a panel, each with a value of every neuron at once
MOST_NEURONS = 10_000  # GRID * GRID * 4 bytes for each: 1.6 GB
MOST_SAMPLES = 100_000  # of MOST_NEURONS values: 4 GB
MOST_NOISE = 1000.0  # the moons are 3 wide


@dataclass(frozen=True)
class Trained:
    """A network with one hidden layer, and what it gets wrong."""

    net: nn.Module
    x: Tensor
    y: Tensor
    train_error: float
    val_error: float


def make_parser() -> OneLineParser:
    parser = OneLineParser(
        prog="overfitting.py",
        description="Train hidden layers of several sizes on two moons and show how they overfit.",
    )
    sizes = [1, 2, 3, 4, 5, 20, 50]
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=sizes,
        help=f"hidden neurons, > 0 and <= {MOST_NEURONS}",
    )
    parser.add_argument(
        "--samples", type=int, default=100, help=f"to train on, >= 4 and <= {MOST_SAMPLES}"
    )
    parser.add_argument(
        "--noise",
        type=float,
        default=0.3,
        help=f"deviation of each point, >= 0 and <= {MOST_NOISE:g}",
    )
    parser.add_argument("--seeds", type=int, default=3, help="data and weights to average, >= 1")
    parser.add_argument("--epochs", type=int, default=1500, help="steps of a training, > 0")
    parser.add_argument("--folder", type=str, default="overfitting", help="under runs/")
    return parser


def check(args) -> Path:
    in_range = all(0 < size <= MOST_NEURONS for size in args.sizes)
    check_range("sizes", args.sizes, f"> 0 and <= {MOST_NEURONS}", in_range)
    in_range = 4 <= args.samples <= MOST_SAMPLES
    check_range("samples", args.samples, f">= 4 and <= {MOST_SAMPLES}", in_range)
    in_range = 0 <= args.noise <= MOST_NOISE
    check_range("noise", args.noise, f">= 0 and <= {MOST_NOISE:g}", in_range)
    check_range("seeds", args.seeds, ">= 1", args.seeds >= 1)
    check_range("epochs", args.epochs, "> 0", args.epochs > 0)
    plain = Path(args.folder).name == args.folder and args.folder not in ("", ".", "..")
    check_range("folder", args.folder, "a plain folder name", plain)
    return Path("runs") / args.folder


def moons(samples: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import make_moons

    x, y = make_moons(samples, noise=noise, random_state=seed)
    return torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(y)


def train(size: int, samples: int, noise: float, seed: int, epochs: int) -> Trained:
    """No penalty, no dropout and no early stopping: nothing holds the network back."""
    x, y = moons(samples, noise, seed=2 * seed)
    torch.manual_seed(seed)
    net = build_mlp(2, 2, depth=1, width=size, activation="tanh", dropout=0, batch_norm=False)
    optimizer = torchref.optim.Adam(net.parameters(), lr=LR)
    loss = torchref.nn.CrossEntropyLoss()
    for _ in range(epochs):
        optimizer.zero_grad()
        loss(net(x), y).backward()
        optimizer.step()
    val = moons(VALIDATION, noise, seed=2 * seed + 1)
    return Trained(net, x, y, error(net, x, y), error(net, *val))


@torch.no_grad()
def error(net: nn.Module, x: Tensor, y: Tensor) -> float:
    return (net(x).argmax(-1) != y).double().mean().item()


def mean_errors(trained: Sequence[Trained]) -> dict[str, float]:
    return {
        name: sum(getattr(one, name) for one in trained) / len(trained)
        for name in ("train_error", "val_error")
    }


def plot_boundaries(shown: dict[int, Trained], path: Path) -> None:
    """A panel for each size with training points and boundary."""
    columns = min(PER_ROW, len(shown))
    rows = -(-len(shown) // columns)
    figure, _ = new_figure((3.2 * columns, 3 * rows), rows, columns)
    for axes in figure.axes[len(shown) :]:
        axes.set_axis_off()
    for axes, (size, one) in zip(figure.axes, shown.items(), strict=False):
        draw_boundary(axes, one)
        axes.set_title(
            f"hidden size {size}\ntraining {one.train_error:.2f}, validation {one.val_error:.2f}",
            fontsize="medium",
        )
    figure.savefig(path, dpi=120)


def draw_boundary(axes, one: Trained) -> None:
    low, high = one.x.amin(0) - 0.4, one.x.amax(0) + 0.4
    x, y = (torch.linspace(float(a), float(b), GRID) for a, b in zip(low, high, strict=True))
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
    with torch.no_grad():
        logits = one.net(points)
    margin = (logits[..., 1] - logits[..., 0]).numpy()  # 0 on the boundary
    colors = [color for color, _ in CURVES.values()]
    bound = abs(margin).max() + 1
    axes.contourf(
        x.numpy(), y.numpy(), margin, levels=[-bound, 0, bound], colors=colors, alpha=0.25
    )
    axes.contour(x.numpy(), y.numpy(), margin, levels=[0], colors="black", linewidths=1)
    for label, color in enumerate(colors):
        axes.scatter(
            *one.x[one.y == label].T.tolist(), s=14, color=color, edgecolor="white", linewidth=0.4
        )
    axes.set_xticks([])
    axes.set_yticks([])


def plot_errors(errors: dict[int, dict[str, float]], path: Path) -> None:
    figure, axes = new_figure((7, 4))
    for name, (color, label) in CURVES.items():
        points = [(size, error[name]) for size, error in sorted(errors.items())]
        axes.plot(*zip(*points, strict=True), color=color, label=label, marker="o", markersize=4)
    axes.set_xscale("log")
    axes.set_xticks(list(errors), [str(size) for size in errors])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_title("error over the hidden layer's size")
    axes.set_xlabel("hidden size")
    axes.set_ylabel("error")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        path = check(args)
        path.mkdir(parents=True, exist_ok=True)
    except USER_ERRORS as error:
        parser.error(describe(error))
    try:
        compare_sizes(parser, args, path)
    except KeyboardInterrupt:
        interrupted(parser)


def compare_sizes(parser: OneLineParser, args: Any, path: Path) -> None:
    torch.set_num_threads(1)  # for so small a network, faster than more
    first, errors = {}, {}
    with printing(parser):
        print("hidden size  train error  validation error")
    for size in dict.fromkeys(args.sizes):
        trained = [
            train(size, args.samples, args.noise, seed, args.epochs) for seed in range(args.seeds)
        ]
        first[size], errors[size] = trained[0], mean_errors(trained)
        train_error, val_error = errors[size].values()
        with printing(parser):
            print(f"{size:11}  {train_error:11.3f}  {val_error:16.3f}")
    try:
        plot_boundaries(first, path / "boundaries.png")
        plot_errors(errors, path / "errors.png")
    except OSError as error:
        parser.error(describe(error))
    with printing(parser):
        print(f"files        {path}/ (boundaries.png, errors.png)")


if __name__ == "__main__":
    main(sys.argv[1:])
