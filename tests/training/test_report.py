"""The page of a run: whole, safe and readable."""

import importlib.util
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from killing import full_disk

from torchref.data.datasets import Dataset
from torchref.training import Config, Run, write_report

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),  # Lightning on torch's newer pytree
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]

SMALL = Config(dataset="iris", epochs=12, batch_size=16, width=16, accelerator="cpu")
VOID = {"meta", "path", "use", "image", "br", "stop", "rect"}


@pytest.fixture(autouse=True)
def _threads():
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


class Page(HTMLParser):
    """What a page holds; every element that is opened has to be closed in its turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "defs"):
            self.text += data

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(tmp_path, config=SMALL, **arguments):
    run = Run(config, root=tmp_path, progress=False, **arguments)
    metrics = run.execute()
    path = run.path / "report.html"
    write_report(run, metrics, path)
    return run, metrics, path.read_text()


@pytest.fixture(scope="module")
def iris(tmp_path_factory):
    return page_of(tmp_path_factory.mktemp("iris"))


def test_it_says_how_it_went(iris):
    run, metrics, text = iris
    page = Page(text)
    shown = " ".join(page.text.split())
    assert f"{metrics['test_accuracy']:.4g}" in shown
    assert metrics["stop_reason"] in shown
    assert f"differed by {metrics['parity_max_loss_diff']:.3g} at most" in shown
    assert run.dataset.fingerprint in shown
    assert metrics["versions"]["torch"] in shown
    assert "Seed 0. Other than the defaults: dataset iris, epochs 12" in shown
    titles = ["Result", "Learning curves", "Gradient flow", "Predictions", "Data", "Configuration"]
    for title in titles:
        assert title in shown
    for name in ("setosa", "versicolor", "virginica"):
        assert name in shown


def test_it_needs_nothing_else(iris):
    """Neither a network nor another file, and no script."""
    page = Page(iris[2])
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "img"), tag
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), value
        assert not any(name.startswith("on") for name in attributes)
    assert "@import" not in iris[2]
    assert not re.search(r"url\((?!#)", iris[2])
    assert len(iris[2]) < 5e6


def test_it_can_be_read_by_everyone(iris):
    page = Page(iris[2])
    assert page.of("html")[0]["lang"] == "en"
    assert "width=device-width" in str(page.of("meta"))
    pictures = page.of("svg")
    assert len(pictures) >= 4
    for attributes in pictures:
        assert attributes["role"] == "img"
        assert len(attributes["aria-label"]) > 20
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names))
    links = [attributes["href"][1:] for attributes in page.of("a")]
    assert set(links) <= set(names)
    used = [a["xlink:href"][1:] for a in page.of("use") if "xlink:href" in a]
    assert set(used) <= set(names)
    assert "prefers-color-scheme: dark" in iris[2]
    assert "@media print" in iris[2]


def contrast(a, b):
    """WCAG's ratio of two colors."""

    def luminance(color):
        digits = color[1:] if len(color) == 7 else "".join(c * 2 for c in color[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_light_and_dark_have_contrast(iris):
    """4.5 is what WCAG 2.2 asks of text."""
    schemes = re.findall(r":root \{([^}]*)\}", iris[2])
    assert len(schemes) == 2
    for scheme in schemes:
        colors = dict(re.findall(r"--(\w+): (#\w+)", scheme))
        for text in ("text", "soft", "accent"):
            for back in ("back", "card"):
                assert contrast(colors[text], colors[back]) >= 4.5, (text, back)


def test_what_the_data_say_is_escaped(tmp_path):
    """A class, a text and names that would be elements of the page."""
    evil = '<script>alert("x")</script>'
    texts = [f"{evil} good {i}" if i % 2 else f"bad {i} & <b>so" for i in range(60)]
    data = Dataset(texts, torch.arange(60) % 2, [evil, '"><img src=x onerror=alert(1)>'])
    named = {what: f"<i onerror={what}>" for what in ("dataset", "name", "target", "stop")}
    config = replace(SMALL, dataset=named["dataset"], name=named["name"], epochs=2)
    run, metrics, _ = page_of(tmp_path, replace(config, target=named["target"]), dataset=data)
    write_report(run, metrics | {"stop_reason": named["stop"]}, tmp_path / "a.html")
    page = Page((tmp_path / "a.html").read_text())
    assert not page.of("script")
    assert not page.of("i")
    assert len(page.of("b")) == 4  # the scores alone
    assert all(not attributes.get("onerror") for _, attributes in page.elements)
    for text in (evil, *named.values()):
        assert text in page.text


def test_values_have_residuals(tmp_path):
    run, metrics, text = page_of(tmp_path, replace(SMALL, dataset="diabetes"))
    page = Page(text)
    assert f"{metrics['test_rmse']:.4g}" in page.text
    predicted, y = run.model.predict(run.data.val.x), run.data.val.y
    worst = int(run.data.parts[1][(predicted - y).abs().argmax()])
    assert f">{worst}<" in text
    assert "Confusion" not in page.text


def test_images_are_shown(tmp_path):
    config = replace(SMALL, dataset="digits", epochs=2, batch_size=256)
    _, _, text = page_of(tmp_path, config)
    images = Page(text).of("image")
    assert len([a for a in images if a["xlink:href"].startswith("data:image/png;base64,")]) >= 9
    assert len(text) < 5e6


def test_a_diverged_run_has_a_page(tmp_path):
    config = replace(SMALL, lr=1e30, optimizer="sgd", epochs=2, parity=False)
    _, _, text = page_of(tmp_path, config)
    shown = Page(text).text
    assert "val_loss became NaN" in shown
    assert "unclear" in shown


def test_a_single_class_in_the_validation_part_has_no_diagnosis(tmp_path):
    parts = [torch.arange(0, 120), torch.arange(120, 130), torch.arange(130, 150)]
    _, _, text = page_of(tmp_path, SMALL, parts=parts)
    assert "Gradient flow" in Page(text).text


def test_a_full_disk_is_one_line_and_leaves_the_last_page(tmp_path, monkeypatch, capsys):
    path = Path(__file__).parents[2] / "scripts" / "train.py"
    spec = importlib.util.spec_from_file_location("train_script_of_report", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "runs" / "iris" / "report.html"
    write = full_disk(60_000)(script.write_report)  # more than a drawing, less than the page
    monkeypatch.setattr(script, "write_report", write)
    monkeypatch.setattr(script, "summarize", lambda run, metrics: page.write_text("whole"))
    with pytest.raises(SystemExit) as stopped:
        script.main(["--dataset", "iris", "--epochs", "2", "--no-parity", "--width", "16"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "train.py: error: runs/iris/report.html: File too large"
    )
    assert page.read_text() == "whole"
    assert not list(page.parent.glob(".*.new"))
