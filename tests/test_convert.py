"""A model of torch's whose modules become ours and torch's again, and keeps everything else."""

import contextlib
import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import torchref
from torchref.convert import FUNCTIONS, OURS
from torchref.testing import assert_parity


class Net(nn.Module):
    """Tied and shared modules, an attribute that is a function, functions in forward."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.again = self.act
        self.drop = nn.Dropout(0.2)
        self.first = nn.Linear(36, 36)
        self.second = nn.Linear(36, 36)
        self.second.weight = self.first.weight
        self.head = nn.Linear(36, 5)
        self.squash = torch.tanh
        self.softmax = F.log_softmax

    def forward(self, x):
        x = self.drop(self.act(self.norm(self.conv(x)))).unflatten(1, (2, 2)).flatten(1)
        x = F.gelu(self.second(self.again(self.first(x)))) + torch.sigmoid(x) + x.relu()
        return self.softmax(self.squash(self.head(x)), dim=1)


def batch(size=6):
    return torch.randn(size, 1, 5, 5), torch.randint(0, 5, (size,))


def classes(model):
    return {name: type(module) for name, module in model.named_modules()}


@contextlib.contextmanager
def counting():
    """The names of our functions that functional=True runs."""
    names, functions = [], dict(FUNCTIONS)

    def counted(function):
        def count(*args, **kwargs):
            names.append(function.__name__)
            return function(*args, **kwargs)

        return count

    FUNCTIONS.update({theirs: counted(ours) for theirs, ours in functions.items()})
    try:
        yield names
    finally:
        FUNCTIONS.update(functions)


def test_every_module_of_ours_is_found():
    ours = {name for name, cls in vars(torchref.nn).items() if isinstance(cls, type)}
    assert {cls.__name__ for cls in OURS.values()} == {n for n in ours if hasattr(nn, n)}
    derived = {cls for theirs, cls in OURS.items() if issubclass(cls, theirs)}
    assert derived == set(OURS.values()) - {torchref.nn.SyncBatchNorm}
    names = [n for n in vars(torchref.nn.functional) if n[0] != "_" and hasattr(F, n)]
    assert {getattr(F, name) for name in names} <= FUNCTIONS.keys()


def test_classes_change_and_nothing_else():
    model = Net()
    handle = model.norm.register_forward_hook(lambda *_: None)
    before = model.state_dict(keep_vars=True)
    model.drop.eval()
    report = torchref.convert(model)
    assert type(model) is Net
    assert type(model.conv) is nn.Conv2d
    for name in ("norm", "act", "drop", "first", "second", "head"):
        assert type(getattr(model, name)) is getattr(torchref.nn, report.swapped[name])
    assert model.again is model.act
    assert model.second.weight is model.first.weight
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[key] is before[key] for key in before)
    assert handle.id in model.norm._forward_hooks
    assert model.training
    assert not model.drop.training
    assert model.squash is torchref.nn.functional.tanh


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_numbers_stay(training, functional):
    theirs = Net().train(training)
    ours = copy.deepcopy(theirs)
    torchref.convert(ours, functional=functional)
    x, _ = batch()
    assert_parity(ours, theirs, x.requires_grad_())


@pytest.mark.parametrize("functional", [False, True])
def test_an_optimizer_made_before_goes_on(functional):
    pair = [Net().double() for _ in range(2)]
    pair[1].load_state_dict(pair[0].state_dict())
    optimizers = [torch.optim.Adam(model.parameters(), 0.01) for model in pair]
    torchref.convert(pair[0], functional=functional)
    for _ in range(5):
        x, target = batch()
        losses = []
        for model, optimizer in zip(pair, optimizers, strict=True):
            torch.manual_seed(1)
            loss = F.nll_loss(model(x.double()), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-10)  # float64 roundings, grown
    for name, tensor in pair[1].state_dict().items():
        torch.testing.assert_close(pair[0].state_dict()[name], tensor, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("functional", [False, True])
def test_revert_restores_every_class_and_attribute(functional):
    model = Net()
    before, attributes = classes(model), vars(model).copy()
    numbers = model.eval()(batch_of_ones := torch.ones(2, 1, 5, 5))
    torchref.convert(model.train(), functional=functional)
    torchref.revert(model)
    assert classes(model) == before
    assert vars(model) == attributes
    assert torch.equal(model.eval()(batch_of_ones), numbers)


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize(
    "copied",
    [
        copy.copy,
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: torch.load(_saved(model), weights_only=False),
    ],
    ids=["copy", "deepcopy", "pickle", "torch.save"],
)
def test_copies_are_converted_and_revert(copied, functional):
    model = Net().eval()
    torchref.convert(model, functional=functional)
    x, _ = batch()
    other = copied(model)
    assert classes(other) == classes(model)
    with counting() as called:
        assert torch.equal(other(x), model(x))
    assert (called.count("gelu") == 2) is functional
    torchref.revert(other)
    assert not any(cls.__module__.startswith("torchref") for cls in classes(other).values())
    assert other.squash is torch.tanh


def _saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def test_state_dicts_load_across_weights_only():
    model, original = Net(), Net()
    torchref.convert(model, functional=True)
    original.load_state_dict(torch.load(_saved(model.state_dict()), weights_only=True))
    model.load_state_dict(torch.load(_saved(original.state_dict()), weights_only=True))


def test_the_report_is_a_table():
    model = Net()
    report = torchref.convert(model, exclude=["head"])
    assert report.left == {"conv": ("Conv2d", "no piece here"), "head": ("Linear", "excluded")}
    assert str(report).splitlines() == [
        "tanh            1  swapped",
        "log_softmax     1  swapped",
        "BatchNorm2d     1  swapped",
        "ReLU            1  swapped",
        "Dropout         1  swapped",
        "Linear          2  swapped",
        "Conv2d          1  left: no piece here",
        "Linear          1  left: excluded",
    ]


def test_the_report_leaves_containers_out():
    net = nn.Sequential(nn.ModuleList(), nn.ModuleDict(), nn.Sequential(), nn.Flatten())
    assert torchref.convert(net).left == {"3": ("Flatten", "no piece here")}


def test_a_second_conversion_says_that_nothing_is_left_to_do():
    model = Net()
    torchref.convert(model)
    before = classes(model)
    report = torchref.convert(model)
    assert classes(model) == before
    assert report.swapped == {}
    assert report.already == 6
    assert str(report).startswith("nothing to swap; modules that were ours before: 6")
    assert type(model.norm) is torchref.nn.BatchNorm2d


def blocks():
    return nn.Sequential(*[nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in range(2)])


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (["0.1"], {"0.1"}),
        (["0"], {"0.0", "0.1"}),
        (["*.1"], {"0.1", "1.1"}),
        ([nn.ReLU], {"0.1", "1.1"}),
        ([nn.Sequential], {"0.0", "0.1", "1.0", "1.1"}),
        ([nn.Tanh], set()),
        ([""], {"0.0", "0.1", "1.0", "1.1"}),
        (["1", nn.ReLU], {"0.1", "1.0", "1.1"}),
    ],
)
def test_exclude(exclude, left):
    model = blocks()
    report = torchref.convert(model, exclude=exclude)
    assert report.left == {k: (type(model.get_submodule(k)).__name__, "excluded") for k in left}
    assert {name for name, m in model.named_modules() if type(m) in OURS} == left


def test_exclude_a_module():
    model = Net()
    torchref.convert(model, exclude=[model.act, model])
    assert not any(cls in OURS.values() for cls in classes(model).values())
    assert model.squash is torch.tanh
    torchref.convert(model, exclude=["again"])  # one object under two names
    assert type(model.act) is nn.ReLU


@pytest.mark.parametrize("item", ["2", "*.weight", nn.ReLU(), 3])
def test_exclude_what_is_not_there(item):
    model = blocks()
    with pytest.raises(ValueError, match=r"convert: expected modules of the model in `exclude`"):
        torchref.convert(model, exclude=[item])
    assert type(model[0][0]) is nn.Linear


def test_subclasses_stay():
    class Mine(nn.Linear):
        pass

    model = nn.ModuleDict({"mine": Mine(2, 2), "attention": nn.MultiheadAttention(4, 2)})
    report = torchref.convert(model)
    why = "a subclass of Linear"
    assert report.left == {
        "mine": ("Mine", why),
        "attention.out_proj": ("NonDynamicallyQuantizableLinear", why),
    }
    assert not report.swapped


@pytest.mark.parametrize("function", [F.relu, torch.relu, F.gelu, torch.Tensor.sigmoid])
def test_functions_kept_as_attributes(function):
    layer = nn.Identity()
    layer.activation = function
    report = torchref.convert(layer)
    name = function.__name__
    assert layer.activation is getattr(torchref.nn.functional, name)
    assert report.swapped == {"activation": name}
    torchref.revert(pickle.loads(pickle.dumps(layer)))
    torchref.revert(layer)
    assert layer.activation is function
    assert "_torchref_replaced" not in vars(layer)


def test_an_attribute_set_anew_stays():
    layer = nn.Identity()
    layer.activation = F.relu
    torchref.convert(layer)
    layer.activation = F.hardtanh
    torchref.convert(layer)
    torchref.revert(layer)
    assert layer.activation is F.hardtanh


def test_other_callables_stay():
    layer = nn.Identity()
    layer.activation = kept = lambda x: F.relu(x)
    layer.names = [F.relu]  # not hashable
    assert not torchref.convert(layer).swapped
    assert layer.activation is kept


@pytest.mark.filterwarnings("ignore:.*nested.tensor")
@pytest.mark.parametrize("activation", ["relu", "gelu", torch.relu])
@pytest.mark.parametrize("training", [True, False])
def test_a_transformer(training, activation):
    options = {"dim_feedforward": 16, "activation": activation, "batch_first": True}
    layer = nn.TransformerEncoderLayer(8, 2, **options)
    theirs = nn.TransformerEncoder(layer, 2).train(training)
    ours = copy.deepcopy(theirs)
    report = torchref.convert(ours)
    assert "fast path" in str(report)
    assert ours.layers[0].activation.__module__ == "torchref.nn.activation"
    assert_parity(ours, theirs, torch.randn(3, 4, 8, requires_grad=True))
    with torch.no_grad():
        x = torch.randn(3, 4, 8)
        if not training:
            assert torch.equal(ours(x), theirs(x))  # the fast path itself
    torchref.revert(ours)
    assert classes(ours) == classes(theirs)
    assert ours.layers[1].activation is theirs.layers[1].activation


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("normalize", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_norms_of_weights_by_hooks(normalize):
    theirs = nn.Sequential(normalize(nn.Linear(5, 4)), nn.Tanh())
    x = torch.randn(3, 5)
    results = []
    for net in (theirs.eval(), theirs):  # such a module cannot be copied
        net(x).square().sum().backward()
        results.append([net(x), *(p.grad.clone() for p in net.parameters())])
        net.zero_grad()
        torchref.convert(theirs)
    assert type(theirs[0]) is torchref.nn.Linear
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("normalize", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_parametrizations(normalize, functional):
    theirs = nn.Sequential(normalize(nn.Linear(5, 5)), nn.Tanh())
    ours = copy.deepcopy(theirs)
    keys = list(ours.state_dict())
    report = torchref.convert(ours, functional=functional)
    assert report.swapped["0"] == "ParametrizedLinear"
    assert isinstance(ours[0], torchref.nn.Linear)
    assert list(ours.state_dict()) == keys
    assert not torchref.convert(ours, functional=functional).swapped
    x = torch.randn(3, 5)
    assert_parity(ours, theirs, x)
    assert type(ours[0]).__name__ == "ParametrizedLinear"
    torchref.revert(ours)
    assert type(ours[0]).__bases__ == (nn.Linear,)
    assert torch.equal(ours(x), theirs(x))
    torchref.convert(ours)
    parametrize.remove_parametrizations(ours[0], "weight")
    assert type(ours[0]) is torchref.nn.Linear


@pytest.mark.parametrize("functional", [False, True])
def test_a_root_that_is_a_layer(functional):
    x = torch.randn(2, 3)
    for layer in (nn.Linear(3, 3), parametrizations.weight_norm(nn.Linear(3, 3))):
        name, y = type(layer).__name__, layer(x)
        torchref.convert(layer, functional=functional)
        assert isinstance(layer, torchref.nn.Linear)
        report = torchref.convert(layer, functional=functional)
        assert (report.swapped, report.already) == ({}, 1)
        torch.testing.assert_close(layer(x), y)
        torchref.revert(layer)
        assert not isinstance(layer, torchref.nn.Linear)
        assert type(layer).__name__ == name


def test_parametrized_after_conversion():
    model = nn.Sequential(nn.Linear(3, 3))
    torchref.convert(model, functional=True)
    parametrizations.weight_norm(model[0])
    torchref.revert(model)
    assert type(model) is nn.Sequential
    assert type(model[0]).__bases__ == (nn.Linear,)


def test_lazy_modules_become_ours():
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    report = torchref.convert(model)
    assert report.swapped == {"0": "Linear (lazy)", "1": "BatchNorm1d (lazy)"}
    assert type(model[0]) is nn.LazyLinear
    assert torchref.convert(model).already == 2
    early = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    torchref.convert(early)
    torchref.revert(early)
    for net, library in ((model, torchref.nn), (early, nn)):
        net(torch.randn(5, 3))
        assert type(net[0]) is library.Linear
        assert type(net[1]) is library.BatchNorm1d
    torchref.revert(model)
    assert classes(model) == classes(early)
    assert "cls_to_become" not in vars(model[0])
    assert torchref.convert(nn.LazyLinear(2), exclude=[""]).left == {"": ("LazyLinear", "excluded")}


def test_what_was_built_of_ours_reverts_unless_its_options_compute_something_else():
    model = nn.Sequential(torchref.nn.BatchNorm1d(3), torchref.nn.Dropout(0.5))
    torchref.revert(model)
    assert classes(model) == classes(nn.Sequential(nn.BatchNorm1d(3), nn.Dropout()))
    assert vars(model[1]).keys() == vars(nn.Dropout()).keys()
    model = nn.Sequential(nn.ReLU(), torchref.nn.Dropout(0.5, scale_at="inference"))
    torchref.convert(model)
    with pytest.raises(ValueError, match="revert: torch has no scale_at='inference', as '1' has"):
        torchref.revert(model)
    assert type(model[0]) is torchref.nn.ReLU  # nothing was half done


class Calls(nn.Module):
    def forward(self, x, target):
        x = F.relu(x) + torch.relu(x) + x.relu() + F.sigmoid(x) + torch.sigmoid(x) + x.tanh()
        x = F.silu(F.gelu(x, approximate="tanh")) + F.softplus(x) + F.elu(x) + F.selu(x)
        x = torch.softmax(x, -1, torch.float64).to(x.dtype) + x.log_softmax(-1) + F.softmax(x, -1)
        x = F.dropout(F.linear(x, torch.ones(5, 5).to(x)), 0.5, self.training)
        x = F.batch_norm(x, None, None, training=True)
        return F.cross_entropy(x, target) + F.mse_loss(x, x.detach().flip(0)) + F.l1_loss(x, x * 2)


def test_functional_routes_what_forward_calls():
    theirs = Calls()
    ours = copy.deepcopy(theirs)
    report = torchref.convert(ours, functional=True)
    assert "functions called in forward run ours" in str(report)
    assert isinstance(ours, Calls)
    assert repr(ours) == repr(theirs)
    x, target = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 4, 2])
    with counting() as called:
        assert_parity(ours, theirs, x, target)
    expected = """batch_norm cross_entropy dropout elu gelu l1_loss linear _log_softmax mse_loss
        relu relu relu selu sigmoid sigmoid silu _softmax softmax softplus tanh"""
    assert sorted(called, key=lambda name: name.strip("_")) == expected.split()
    torchref.revert(ours)
    assert type(ours) is Calls
    with counting() as called:
        ours(x, target)
    assert called == []


def test_functional_leaves_results_written_elsewhere():
    class Out(nn.Module):
        def forward(self, x):
            return torch.sigmoid(x, out=torch.empty_like(x))

    model = Out()
    torchref.convert(model, functional=True)
    x = torch.randn(3)
    with counting() as called:
        assert torch.equal(model(x), x.sigmoid())
    assert called == []


def test_functional_ends_with_forward_even_in_an_error():
    model = Calls()
    torchref.convert(model, functional=True)
    with pytest.raises(TypeError):
        model()
    with pytest.raises(ValueError, match="cross_entropy: expected `target`"):
        model(torch.ones(4, 5), torch.zeros(3).long())
    with counting() as called:
        F.relu(torch.ones(2))
    assert called == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_functional_beside_checkpointing(reentrant):
    """Backward recomputes outside of forward: ours there and torch's here would not fit."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def inner(self, x):  # square, so that no shape tells the weight from its transpose
            return F.dropout(F.linear(F.linear(x, self.weight), self.weight), 0.5)

        def forward(self, x):
            return F.silu(checkpoint(self.inner, F.gelu(x), use_reentrant=reentrant))

    theirs = Net()
    ours = copy.deepcopy(theirs)
    torchref.convert(ours, functional=True)
    with counting() as called:
        assert_parity(ours, theirs, torch.randn(4, 4, requires_grad=True))
    assert called == ["gelu", "silu"]


@pytest.mark.parametrize("functional", [False, True])
def test_compiled_whole(functional):
    model = Net().eval()
    torchref.convert(model, functional=functional)
    x, _ = batch()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    gradients = []
    for net in (compiled, model):
        model.zero_grad()
        net(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("function", [torchref.convert, torchref.revert])
def test_what_is_no_module(function):
    with pytest.raises(
        TypeError, match=r"expected a torch.nn.Module as `model`, got <class 'list'>"
    ):
        function([nn.ReLU()])


def test_wrapped_models():
    model = nn.Sequential(nn.Linear(2, 2))
    fsdp = type("FSDPModule", (nn.Linear,), {"__module__": "torch.distributed.fsdp"})
    sharded = nn.Sequential(nn.Linear(2, 2))
    sharded[0].__class__ = type("FSDPLinear", (fsdp,), {"__module__": "torch.distributed.fsdp"})
    for wrapped, message in (
        (nn.DataParallel(model), "convert: DataParallel wraps the model; convert it before"),
        (nn.Sequential(nn.DataParallel(model)), "convert: DataParallel wraps the model"),
        (sharded, "convert: FSDPLinear wraps the model; convert it before"),
        (torch.compile(model), "convert: torch.compile holds the model; convert it before"),
    ):
        with pytest.raises(TypeError, match=message):
            torchref.convert(wrapped)
    model.compile()
    with pytest.raises(TypeError, match="revert: torch.compile holds the model; revert it before"):
        torchref.revert(model)
    assert type(model[0]) is nn.Linear
