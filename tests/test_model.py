"""Whole models: swapped for torch's, trained step by step beside them, compiled, exported."""

import copy

import pytest
import torch

import torchref


def convolutional(nn):
    layers = [
        torch.nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Dropout(0.2),
        torch.nn.Flatten(),
        nn.Linear(8 * 36, 16),
        nn.BatchNorm1d(16, momentum=None),
        nn.SiLU(),
        nn.Linear(16, 4),
    ]
    return torch.nn.Sequential(*layers), nn.CrossEntropyLoss(label_smoothing=0.1)


def perceptron(nn):
    layers = [nn.Linear(192, 32), nn.ELU(), nn.Dropout(), nn.Linear(32, 16), nn.Tanh()]
    layers += [nn.Linear(16, 16), nn.GELU("tanh"), nn.Linear(16, 4), nn.LogSoftmax(1)]
    return torch.nn.Sequential(torch.nn.Flatten(), *layers), nn.NLLLoss()


def batches(count):
    return [(torch.randn(16, 3, 8, 8), torch.randint(0, 4, (16,))) for _ in range(count)]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("optimizer", ["SGD", "RMSprop", "Adam", "AdamW"])
@pytest.mark.parametrize("make", [convolutional, perceptron])
def test_twenty_steps_beside_torch(make, optimizer, channels_last):
    losses, states = [], []
    data = batches(20)
    torch.manual_seed(1)
    start = make(torch.nn)[0].double().state_dict()
    for library in (torchref, torch):
        model, loss = make(library.nn)
        model.double().load_state_dict(start)
        if channels_last:
            model.to(memory_format=torch.channels_last)
        stepping = getattr(library.optim, optimizer)(model.parameters(), lr=0.01)
        torch.manual_seed(2)
        losses.append([])
        for x, target in data:
            stepping.zero_grad()
            value = loss(model(x.double()), target)
            value.backward()
            stepping.step()
            losses[-1].append(value.item())
        states.append(model.state_dict())
        with torch.no_grad():
            losses[-1].append(loss(model.eval()(x.double()), target).item())
    # float64 roundings, grown by twenty steps
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    for name, tensor in states[1].items():
        torch.testing.assert_close(states[0][name], tensor, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("make", [convolutional, perceptron])
def test_compiled_training_steps(make):
    model, loss = make(torchref.nn)
    for layer in model:
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0  # torch.compile draws other numbers
    pair = [model, copy.deepcopy(model)]
    compiled = [torch.compile(pair[0], fullgraph=True), pair[1]]
    for x, target in batches(3):
        gradients = []
        for run, net in zip(compiled, pair, strict=True):
            net.zero_grad()
            loss(run(x), target).backward()
            gradients.append([p.grad for p in net.parameters()])
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*[net.state_dict() for net in pair], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [convolutional, perceptron])
def test_export_in_eval(make):
    model = make(torchref.nn)[0].eval()
    x = torch.randn(16, 3, 8, 8)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    for size in (16, 5):
        torch.testing.assert_close(program.module()(x[:size]), model(x[:size]))


def test_state_dicts_cross_between_libraries():
    pair = [convolutional(library.nn)[0] for library in (torchref, torch)]
    for source, target in (pair, pair[::-1]):
        target.load_state_dict(source.state_dict())
    x = torch.randn(16, 3, 8, 8)
    torch.testing.assert_close(pair[0].eval()(x), pair[1].eval()(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_under_autocast(dtype):
    losses = []
    data = batches(5)
    torch.manual_seed(1)
    start = convolutional(torch.nn)[0].state_dict()
    for library in (torchref, torch):
        model, loss = convolutional(library.nn)
        model.load_state_dict(start)
        stepping = library.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(2)
        for x, target in data:
            stepping.zero_grad()
            with torch.autocast("cpu", dtype):
                value = loss(model(x), target)
            value.backward()
            stepping.step()
        losses.append(value.item())
    assert losses[0] == pytest.approx(losses[1], rel=0.02)  # half precision's three digits
