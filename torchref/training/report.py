"""One page for each run: what it was, how it went, and what to do about it."""

import platform
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from html import escape
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from torch import Tensor

from torchref.diagnostics.drawing import new_figure
from torchref.diagnostics.gradient_flow import plot_gradient_flow
from torchref.diagnostics.learning_curves import Diagnosis, diagnose, majority_error
from torchref.diagnostics.predictions import (
    class_scores,
    confused_pairs,
    confusion_matrix,
    highest_loss,
    most_confused,
    plot_confusion,
    plot_reliability,
    plot_worst_images,
    reliability,
    worst_values,
)
from torchref.training.checkpoint import write_text
from torchref.training.curves import plot_learning_curves
from torchref.training.module import MLPRegressor

if TYPE_CHECKING:
    from torchref.training.run import Run

GOOD = ("good fit", "healthy")
DOUBTFUL = ("unclear",)
DRAWN_CLASSES = 30  # a larger matrix is no picture
LONGEST_TEXT = 300
_numbers = count()


def write_report(run: "Run", metrics: dict[str, Any], path: str | Path) -> None:
    """Write a page that needs no network and no other file.

    It holds the scores, why training stopped, the diagnosis of the learning curves, the gradient
    flow, predictions on the validation part (the test part is for its score alone), the parity
    line, the configuration, versions and a fingerprint of the data. Whatever the data say is
    escaped.

    Args:
        run: after it was executed.
        metrics: what that returned.
        path: of the page.

    Raises:
        OSError: the page cannot be written, on a full disk say.
    """
    parts = [
        ("Result", _result(run, metrics)),
        ("Learning curves", _curves(run, metrics)),
        ("Gradient flow", _flow(run)),
        ("Predictions", _predictions(run)),
        ("Data", _data(run)),
        ("Configuration", _configuration(run, metrics)),
    ]
    parts = [(title, content) for title, content in parts if content]
    links = "".join(f'<li><a href="#{_key(title)}">{title}</a></li>' for title, _ in parts)
    body = "".join(
        f'<section aria-labelledby="{_key(title)}"><h2 id="{_key(title)}">{title}</h2>'
        f"{content}</section>"
        for title, content in parts
    )
    style = files("torchref.training").joinpath("report.css").read_text("utf-8")
    name = escape(run.path.name)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name} - torchref</title><style>{style}</style></head><body>"
        f'<header><h1>{name}</h1><nav aria-label="Contents"><ul>{links}</ul></nav></header>'
        f"<main>{body}</main></body></html>\n"
    )
    write_text(Path(path), page)


def _result(run: "Run", metrics: dict[str, Any]) -> str:
    scores = {
        f"test {name.removeprefix('test_')}": metrics[name]
        for name in metrics
        if name.startswith("test_") and name != "test_opened"
    }
    scores["best validation loss"] = metrics["best_val_loss"]
    items = "".join(
        f"<li><b>{_shown(v)}</b><span>{escape(k)}</span></li>" for k, v in scores.items()
    )
    lines = [
        f"Stopped: {metrics['stop_reason']}. {metrics['epochs']} epochs, {metrics['seconds']} s."
    ]
    if metrics["parity_max_loss_diff"] is not None:
        diff = metrics["parity_max_loss_diff"]
        lines.append(
            f"Parity: the loss of the same network made of torch.nn differed by {diff:.3g} at most."
        )
    else:
        why = "--no-parity" if run.parity is None else run.parity.off or "no step was finite"
        lines.append(f"Parity with torch: off, {why}.")
    if metrics.get("test_opened", 1) > 1:
        lines.append(
            f"The test part was opened {metrics['test_opened']} times; what was chosen since the "
            "first has seen it."
        )
    return f'<ul class="scores">{items}</ul>' + "".join(f"<p>{escape(line)}</p>" for line in lines)


def _curves(run: "Run", metrics: dict[str, Any]) -> str:
    rows = run.history.rows
    if not rows:
        return ""
    diagnosis = _diagnosis(run)
    picture = _figure(
        lambda path: plot_learning_curves(rows, path, metrics["best_epoch"]),
        "Training and validation loss and score against the epoch.",
        "The dashed line is the epoch whose weights were kept.",
    )
    if diagnosis is None:
        return picture
    notes = list(diagnosis.notes)
    if run.stopping.stopping_reason is EarlyStoppingReason.PATIENCE_EXHAUSTED:
        notes.append("Early stopping ended the training; a larger --patience lets it go on.")
    return _verdict(diagnosis.verdict, diagnosis.explanation, notes, diagnosis.fixes) + picture


def _diagnosis(run: "Run") -> Diagnosis | None:
    y = run.data.val.y
    baseline = None if run.dataset.classes is None else majority_error(y)
    if baseline == 0:  # one class alone
        return None
    return diagnose(run.history.rows, baseline=baseline, val_samples=len(y))


def _flow(run: "Run") -> str:
    if not run.gradients.rows:
        return "" if run.gradients.off is None else f"<p>Not read: {escape(run.gradients.off)}.</p>"
    flow = run.gradients.flow
    verdict = flow.verdict
    rows = [
        [x.layer, x.grad_norm, x.weight_norm, x.update_ratio, x.saturated, x.dead]
        for x in flow.layers
    ]
    head = ["layer", "gradient", "weights", "update / weights", "saturated", "dead units"]
    picture = _figure(
        lambda path: plot_gradient_flow(flow, path),
        "Norm of the gradient and size of a step of each layer.",
        "From the input on the left to the output on the right, on a logarithmic axis.",
    )
    notes = []
    if run.stopping.stopping_reason is EarlyStoppingReason.NON_FINITE_METRIC:
        notes.append(f"{run.stopping.reason}; what was read before says little.")
    said = _verdict(verdict.name, verdict.reason, notes, verdict.remedies)
    return said + picture + _table(head, rows)


def _predictions(run: "Run") -> str:
    where = "<p>Of the validation part; the test part is for its score alone.</p>"
    x, y = run.data.val.x, run.data.val.y
    if isinstance(run.model, MLPRegressor):
        predicted = run.model.predict(x)
        return (
            where + _values(predicted, y, run.data.parts[1]) if predicted.isfinite().all() else ""
        )
    classes = run.dataset.classes or []
    p = run.model.predict_proba(x)
    if not p.isfinite().all():
        return ""
    matrix = confusion_matrix(p.argmax(-1), y, len(classes))
    parts = [where]
    if len(classes) <= DRAWN_CLASSES:
        parts.append(
            _figure(
                lambda path: plot_confusion(matrix, path, classes),
                "Confusion matrix: true classes in rows, predicted ones in columns.",
                "Colors are shares of the true class.",
            )
        )
    scores = class_scores(matrix)
    columns = (scores.precision, scores.recall, scores.f1, scores.support)
    rows = zip(classes, *(column.tolist() for column in columns), strict=True)
    parts.append(_table(["class", "precision", "recall", "F1", "samples"], rows))
    parts += _confused(matrix, classes)
    found = reliability(p, y)
    parts.append(
        "<h3>Is its confidence right?</h3>"
        + _figure(
            lambda path: plot_reliability(found, path),
            f"Accuracy against confidence; expected calibration error {found.ece:.3f}.",
            "Bars below the dashed line are overconfident.",
        )
    )
    return "".join(parts) + _worst(run, p, y)


def _confused(matrix: Tensor, classes: list[str]) -> list[str]:
    pairs = confused_pairs(matrix)
    if not pairs:
        return []
    rows = [[classes[q.true], classes[q.predicted], q.count, f"{q.share:.1%}"] for q in pairs]
    return ["<h3>Most confused</h3>", _table(["true", "taken for", "samples", "share"], rows)]


def _worst(run: "Run", p: Tensor, y: Tensor) -> str:
    """The samples with the highest loss, as images, texts or rows of a table."""
    classes, samples = run.dataset.classes or [], highest_loss(p, y)
    title = "<h3>Highest losses</h3>"
    shape = run.dataset.shape
    if shape is not None and shape[0] in (1, 3):
        x: Any = run.data.val.x
        images, high = x.unflatten(1, shape), run.dataset.high
        hardest = _figure(
            lambda path: plot_worst_images(images, samples, path, classes, high),
            "The validation images with the highest loss.",
            "With what each is, what it was taken for and how probable that was.",
        )
        undecided = _figure(
            lambda path: plot_worst_images(images, most_confused(p, y), path, classes, high),
            "The validation images between two classes.",
            "Those of which the two most probable classes are closest.",
        )
        return f"{title}{hardest}<h3>Least certain</h3>{undecided}"
    rows = []
    for s in samples:
        row = [int(run.data.parts[1][s.index]), classes[s.true], classes[s.predicted]]
        rows.append([*row, s.probability, s.loss])
        if run.dataset.kind == "text":
            rows[-1].append(str(run.data.val.x[s.index])[:LONGEST_TEXT])
    head = ["sample (from 0)", "true", "predicted", "probability", "loss"]
    return title + _table(head + ["text"] * (run.dataset.kind == "text"), rows)


def _values(predicted: Tensor, y: Tensor, places: Tensor) -> str:
    worst = worst_values(predicted, y)
    rows = [[int(places[s.index]), s.true, s.predicted, s.residual] for s in worst]
    picture = _figure(
        lambda path: _draw_values(predicted, y, path),
        "Predicted against true values.",
        "On the dashed line they are equal.",
    )
    head = ["sample (from 0)", "true", "predicted", "residual"]
    return f"{picture}<h3>Largest residuals</h3>{_table(head, rows)}"


def _draw_values(predicted: Tensor, y: Tensor, path: Path) -> None:
    figure, axes = new_figure((5, 5))
    ends = [min(predicted.min(), y.min()).item(), max(predicted.max(), y.max()).item()]
    axes.plot(ends, ends, "--", color="0.4", linewidth=1)
    axes.plot(y.tolist(), predicted.tolist(), ".", color="#1f77b4", alpha=0.7)
    axes.set_xlabel("true")
    axes.set_ylabel("predicted")
    figure.savefig(path)


def _data(run: "Run") -> str:
    dataset = run.dataset
    parts = {name: getattr(run.data, name) for name in ("train", "val", "test")}
    head = ["part", "samples"]
    rows: list[list[Any]] = [[name, len(part)] for name, part in parts.items()]
    if dataset.classes is not None and len(dataset.classes) <= 20:
        head += dataset.classes
        for row, part in zip(rows, parts.values(), strict=True):
            row += part.y.bincount(minlength=len(dataset.classes)).tolist()
    about = f"{dataset.kind}s, fingerprint of samples and targets: {dataset.fingerprint}"
    return f"<p>{escape(run.config.dataset)}: {escape(about)}</p>{_table(head, rows)}"


def _configuration(run: "Run", metrics: dict[str, Any]) -> str:
    every = asdict(run.config)
    defaults = asdict(type(run.config)())
    chosen = {k: v for k, v in every.items() if str(v) != str(defaults[k])}  # "32" from YAML is 32
    shown = ", ".join(f"{name} {value}" for name, value in chosen.items()) or "none"
    options = [[name, "" if value is None else str(value)] for name, value in every.items()]
    versions = {**metrics["versions"], "platform": platform.platform()}
    return (
        f"<p>Seed {metrics['seed']}. Other than the defaults: {escape(shown)}.</p>"
        f"<details><summary>All options</summary>{_table(['option', 'value'], options)}</details>"
        + "<h3>Versions</h3>"
        + _table(["package", "version"], [[k, v] for k, v in versions.items()])
    )


def _verdict(name: str, reason: str, notes: Sequence[str], fixes: Sequence[str]) -> str:
    kind = "good" if name in GOOD else "doubt" if name in DOUBTFUL else "bad"
    advice = "".join(f"<li>{escape(fix)}</li>" for fix in fixes)
    return (
        f'<div class="verdict {kind}"><p><strong>{escape(name)}</strong>: {escape(reason)}</p>'
        + "".join(f"<p>{escape(note)}</p>" for note in notes)
        + (f"<p>What to do, in this order:</p><ol>{advice}</ol>" if fixes else "")
        + "</div>"
    )


def _table(head: Iterable[str], rows: Iterable[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        number = value is None or isinstance(value, int | float)
        return f'<td class="number">{_shown(value)}</td>' if number else f"<td>{_shown(value)}</td>"

    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    lines = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{titles}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))


def _figure(draw: Callable[[Path], None], alt: str, caption: str) -> str:
    """A drawing in the page's own colors."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "drawing.svg"
        draw(path)
        svg = _inlined(path.read_text("utf-8"), alt)
    text = f"{escape(alt)} {escape(caption)}"
    width, height = map(float, re.findall(r'(?:width|height)="([\d.]+)pt"', svg)[:2])
    wide = " wide" if width > 1.5 * height else ""
    return (
        f'<figure><div class="scroll{wide}" tabindex="0">{svg}</div>'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _inlined(svg: str, alt: str) -> str:
    """Without a background, in the color of the text, and with names of its own."""
    prefix = f"d{next(_numbers)}-"
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", svg)
    background = re.compile(
        r'(<g id="[^"]*patch_\d+">\s*<path [^>]*style=")fill: #ffffff', re.DOTALL
    )
    svg = background.sub(r"\1fill: none", svg)
    svg = svg.replace("#000000", "currentColor")
    label = escape(alt, quote=True)
    root = f'<svg role="img" aria-label="{label}" fill="currentColor" '
    return svg.replace("<svg ", root, 1)


def _key(title: str) -> str:
    return title.lower().replace(" ", "-")
