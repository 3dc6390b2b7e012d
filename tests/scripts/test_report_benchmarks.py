import pytest
import report_benchmarks
from benchmarks import results
from benchmarks.targets import NO_GPU, TARGETS

CPU, GPU = "AMD EPYC", "NVIDIA H100 80GB HBM3"


def made_up(op, which, elements, *, shape=None, shared=None, **times):
    """The rows of a group, from milliseconds; a text is a note in place of them."""
    described = results.group("pieces", op, which, shape or str(elements), elements)
    times = {"torch": times["torch"], "torch again": times["torch"]} | times
    seconds = {
        name: [ms / 1e3 * factor for factor in (0.99, 1.0, 1.01)] * 5
        for name, ms in times.items()
        if isinstance(ms, float)
    }
    figures = {
        name: {"host_us": 12.0, "launches": 1} if name in seconds else {"note": times[name]}
        for name in times
    }
    return results.rows_of(described | (shared or {}), seconds, figures, 10.0 * elements, 3000.0)


def record(device, rows, **ceilings):
    environment = {"device": device, "torch": "2.13.0", "load": 0.0123, "commit": None}
    command = f"python scripts/benchmark.py --json {device.split()[0].lower()}.json"
    return {"command": command, "environment": environment, "ceilings": ceilings, "rows": rows}


def of_a_cpu():
    rows = []
    for elements in (2**14, 2**20):
        scale = elements / 2**20
        for which in ("forward", "forward+backward"):
            rows += made_up("relu", which, elements, torch=scale, formula=2 * scale)
            wrong = {"compiled": "wrong: output: error 1"}
            rows += made_up("gelu", which, elements, torch=scale, formula=0.5 * scale, **wrong)
    steps = {"torchref": 1.0, "torch fused": 0.5, "shared": {"section": "optimizers"}}
    rows += made_up("AdamW", "step", 25_557_032, shape="resnet50", torch=1.0, **steps)
    models = {"torch": 3.0, "converted": 2.0, "shared": {"section": "models"}}
    saved = made_up("mlp", "step", 1000, shape="8x125", **models)
    saved[0]["saved_bytes"] = 3 * 2**20
    return record(CPU, [*rows, *saved])


def of_a_gpu():
    shared = {"dtype": "bfloat16", "mode": "cold"}
    times = {"torch": 1.0, "torch.compile": 0.9, "kernel": 0.8}
    rows = []
    for op in ("relu", "gelu", "dropout"):
        for which in ("forward", "forward+backward"):
            rows += made_up(op, which, 2**28, shared=shared, **times)
    head = {"torch": 3.0, "torch.compile": 2.9, "kernel": 2.2, "floor": 2.0, "liger": 4.4}
    shape = {"shape": "4096x32768x4096", "shared": shared}
    rows += made_up("linear_cross_entropy", "forward+backward", 2**27, **shape, **head)
    wide = {"torch": 2.0, "torch.compile": 2.0, "kernel": 1.0, "liger": "absent: no liger"}
    rows += made_up("softmax", "forward", 2**29, shape="4096x131072", shared=shared, **wide)
    for mode in ("graph", "eager"):
        shared = {"dtype": "bfloat16", "mode": mode}
        rows += made_up("relu", "forward", 2**14, torch=0.01, kernel=0.02, shared=shared)
    return record(GPU, rows, copy_gbs=3000.0, read_gbs=3100.0, write_gbs=3050.0)


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The page that records make, and its folder."""
    monkeypatch.setattr(report_benchmarks, "DOCS", tmp_path / "docs")

    def page(*records):
        files = []
        for number, each in enumerate(records):
            files.append(tmp_path / f"{number}.json")
            results.write(files[-1], each)
        assert report_benchmarks.main([str(file) for file in files]) == 0
        return (tmp_path / "docs" / "benchmarks.md").read_text()

    return page


def table_line(text, *cells):
    """The cells of the first line that starts with these."""
    start = "| " + " | ".join(cells) + " |"
    return (
        next(line for line in text.splitlines() if line.startswith(start)).strip("| ").split(" | ")
    )


def test_a_cpu(page, tmp_path):
    text = page(of_a_cpu())
    assert f"## {CPU}\n\ntorch 2.13.0, load 0.01.\n" in text
    assert table_line(text, "gelu", "forward", "1048576")[-2:] == ["2.00", "wrong"]
    assert table_line(text, "relu", "forward", "1048576")[-2:] == ["0.50", "-"]
    assert "- **formula**: 1.00, faster than torch in 2 of 4, a tie in 0, slower in 2" in text
    assert table_line(text, "relu", "forward", "contiguous")[-1].endswith("; 1.00")
    assert table_line(text, "AdamW", "step", "resnet50")[-2:] == ["1.00~", "2.00"]
    assert "Memory that forward keeps for backward" in text
    assert table_line(text, "mlp", "step", "8x125", "float32", "contiguous", "3")
    assert "- gelu 1048576 float32 contiguous, compiled: wrong: output: error 1\n" in text
    for which in ("forward", "forward-backward"):
        name = f"benchmarks/amd-epyc-{which}-ratio-to-torch.png"
        assert f"({name})" in text
        assert (tmp_path / "docs" / name).stat().st_size > 5000


def test_every_table_has_its_command(page):
    text = page(of_a_cpu(), of_a_gpu())
    lines = text.splitlines()
    ends = [i for i, line in enumerate(lines) if line[:1] == "|" and lines[i + 1][:1] != "|"]
    assert len(ends) >= 10
    for end in ends:
        assert lines[end + 1] == ""
        assert lines[end + 2].startswith("    python scripts/benchmark.py --json ")


def test_a_gpu(page, tmp_path):
    text = page(of_a_gpu())
    assert "Bandwidth at 1 GiB: copy_gbs 3,000, read_gbs 3,100, write_gbs 3,050." in text
    shares = table_line(text, "relu", "forward", "268435456", "bfloat16", "contiguous", "0.895")
    assert shares[5:9] == ["0.895", "0.895", "0.994", "1.12"]  # the last is the kernel's
    assert "Kernels launched:" in text
    assert "- softmax 4096x131072 bfloat16 contiguous, liger: absent: no liger" in text
    charts = {path.name for path in (tmp_path / "docs" / "benchmarks").iterdir()}
    assert "nvidia-h100-80gb-hbm3-forward-fraction-of-copy.png" in charts


def test_targets_say_what_was_measured(page):
    text = page(of_a_cpu(), of_a_gpu())
    assert NO_GPU not in text
    assert table_line(text, "activations") == [
        *("activations", "0.97", "1.12 / 1.12", ">= 1.0", "1.25 / 1.25", ">= 1.0", "1.12 / 1.12")
    ]
    head = table_line(text, "linear layer + cross-entropy")
    assert (head[2], head[4], head[6]) == ("1.10", "1.36", "1.32; 2.00")
    assert table_line(text, "softmax, from 64K columns on")[4] == "2.00"
    assert table_line(text, "softmax, up to 32K columns")[2] == "not measured"
    assert table_line(text, "small tensors")[4] == "0.50"


def test_without_a_gpu_no_target_has_a_number(page):
    text = page(of_a_cpu())
    for target in TARGETS:
        cells = table_line(text, target.name)
        assert cells[2::2] == [NO_GPU] * 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file or directory"),
        ("{}", "not written by scripts/benchmark.py"),
        ("a table", "not a JSON file"),
    ],
)
def test_a_file_that_is_none_of_ours(text, message, tmp_path, capsys):
    file = tmp_path / "other.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        report_benchmarks.main([str(file)])
    error = capsys.readouterr().err
    assert (stopped.value.code, error.count("\n")) == (2, 1)
    assert f"{file}: {message}" in error
