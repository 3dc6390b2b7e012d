"""torch's names and positional signatures; ours may only add keyword-only arguments."""

import inspect
import pickle

import pytest
import torch
from torch.utils.data import DataLoader

import torchref

# What torch does not have, or not before 2.13, has no signature to compare.
FUSED = {"batch_norm_act", "bias_act_dropout", "linear_cross_entropy"}
FUSED_MODULES = {
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "LinearActDropout",
    "LinearCrossEntropyLoss",
    "SyncBatchNormAct",
}
NAMES = [name for name in vars(torchref.nn.functional) if name[0] != "_"]
FUNCTIONS = [n for n in NAMES if n not in FUSED or hasattr(torch.nn.functional, n)]
MODULES = [
    name
    for name, module in vars(torchref.nn).items()
    if isinstance(module, type)
    if name not in FUSED_MODULES or hasattr(torch.nn, name)
]
INITIALIZERS = [
    name
    for name, value in vars(torchref.nn.init).items()
    if inspect.isfunction(value) and hasattr(torch.nn.init, name)
]
# torch's builtins that no signature can be read from
BUILTINS = {
    "gelu": "(input, *, approximate='none')",
    "softplus": "(input, beta=1, threshold=20)",
    "linear": "(input, weight, bias=None)",
}
# what a torch older than the one these were written against does not have yet
NEWER = {"weight": ("mse_loss", "l1_loss"), "generator": INITIALIZERS}


def arguments(signature: inspect.Signature) -> list[tuple[str, object, object]]:
    return [(p.name, p.kind, p.default) for p in signature.parameters.values()]


def check(name, ours, theirs):
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    names = {argument for argument, _, _ in theirs}
    required = [p for p in theirs if p[1] not in kinds]
    positional = [p for p in ours if p[1] not in kinds]
    if positional != required:
        extra = [p[0] for p in positional if p[0] not in names]
        assert all(name in NEWER.get(argument, ()) for argument in extra), (positional, required)
        assert [p for p in positional if p[0] in names] == required
    for argument, kind, default in theirs:
        if kind is inspect.Parameter.KEYWORD_ONLY:
            assert (argument, kind, default) in ours or ours[-1][1] is kinds[1]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    ours = inspect.signature(getattr(torchref.nn.functional, name))
    if name in BUILTINS:
        names = [(p.name, p.kind) for p in ours.parameters.values()]
        scope = {}
        exec(f"def f{BUILTINS[name]}: ...", scope)  # a signature of ours, not a user's text
        assert names == [
            (p.name, p.kind) for p in inspect.signature(scope["f"]).parameters.values()
        ]
    else:
        theirs = inspect.signature(getattr(torch.nn.functional, name))
        check(name, arguments(ours), arguments(theirs))


@pytest.mark.parametrize("name", INITIALIZERS)
def test_initializers(name):
    pair = [inspect.signature(getattr(m, name)) for m in (torchref.nn.init, torch.nn.init)]
    check(name, *map(arguments, pair))


@pytest.mark.parametrize("name", MODULES)
def test_modules(name):
    ours, theirs = getattr(torchref.nn, name), getattr(torch.nn, name)
    pair = [inspect.signature(cls.__init__) for cls in (ours, theirs)]
    check(name, *map(arguments, pair))
    # DistributedDataParallel refuses subclasses of torch's on a CPU
    assert issubclass(ours, theirs) or name == "SyncBatchNorm"
    assert ours.__doc__.startswith(f"Drop-in for :class:`torch.nn.{name}`")


@pytest.mark.parametrize("name", MODULES)
def test_a_change_of_class_swaps_and_swaps_back(name):
    """Modules add no state, so torch's module becomes ours by `__class__`, keys and all."""
    ours, theirs = getattr(torchref.nn, name), getattr(torch.nn, name)
    args = (3, 3) if "Linear" in name else (3,) if "Norm" in name else ()
    module = theirs(*args)
    before = {k: id(v) for k, v in module.state_dict(keep_vars=True).items()}
    module.__class__ = ours
    inputs = [torch.rand(4, 3, *[2] * (int(name[-2]) if name.startswith("Batch") else 0))]
    if "Loss" in name:
        index = name in ("CrossEntropyLoss", "NLLLoss")
        inputs.append(torch.tensor([0, 1, 2, 0]) if index else torch.rand(4, 3))
    if "Softmax" in name:
        module.dim = 1
    y = module(*inputs)
    assert {k: id(v) for k, v in module.state_dict(keep_vars=True).items()} == before
    assert repr(module) == repr(module).replace("torchref", "")
    copied = pickle.loads(pickle.dumps(module))
    assert type(copied) is ours
    if name != "Dropout" and "Norm" not in name:
        torch.testing.assert_close(copied(*inputs), y)
    module.__class__ = theirs
    assert type(module) is theirs


def test_state_dicts_load_both_ways():
    for name in ("BatchNorm1d", "Linear"):
        args = (3, 3) if name == "Linear" else (3,)
        ours, theirs = (getattr(m, name)(*args) for m in (torchref.nn, torch.nn))
        ours.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())
        assert list(ours.state_dict()) == list(theirs.state_dict())


def test_modules_work_in_dataloader_workers():
    data = [torch.full((2,), -1.0)] * 4
    loader = DataLoader(data, batch_size=2, num_workers=1, collate_fn=_collate)
    assert all(not batch.any() for batch in loader)


def _collate(batch):
    return torchref.nn.functional.relu(torch.stack(batch))


def test_every_public_function_says_what_it_should():
    for module in (torchref.nn.functional, torchref.nn.init):
        for name, function in vars(module).items():
            if inspect.isfunction(function) and name[0] != "_" and name != "initialize":
                assert ">>>" in function.__doc__, name
    for name in NAMES:
        doc = getattr(torchref.nn.functional, name).__doc__
        for part in (".. math::", "Args:", "Returns:", "Raises:", "Example:", "Source:"):
            assert part in doc, (name, part)
        assert "dx" in doc, name  # the gradient
