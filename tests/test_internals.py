"""Private names of torch's: all in one module, and what happens where torch has lost one."""

import ast
import importlib.util
import pkgutil
import subprocess
import sys
import warnings
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as theirs
from torch.utils.checkpoint import checkpoint

import torchref
import torchref.nn.functional as ours
from torchref import dispatch, internals
from torchref.diagnostics import check_symmetry, graph
from torchref.testing import assert_parity

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for folder in ("torchref", "triton_kernels")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name != "internals.py"
]
# Of Python, Optuna and Lightning. And where a kernel file, alone with torch, has a stand-in.
LAUNCHERS = "lightning.fabric.strategies.launchers"
OTHERS = {"_replace", "_asdict", "os._exit", "_trial_id", "_compiler_ctx"}
OTHERS |= {f"{LAUNCHERS}.subprocess_script._ChildProcessObserver"}
EXCEPTIONS = {("triton_kernels/_launch.py", "torch._subclasses.fake_tensor.FakeTensor")}


def calls_of_found():
    tree = ast.parse(Path(internals.__file__).read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call.args[0].value for call in calls if getattr(call.func, "id", "") == "found"]


NAMES = calls_of_found()
LAST = {name.replace(":", ".").split(".")[-1] for name in NAMES}


def is_private(name):
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def private_names(tree):
    """The private names that a file takes from elsewhere: by import, attribute or ``getattr``.

    In full where they belong to a module that is not ours.
    """
    modules = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            modules |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            if not str(node.module).startswith("torchref"):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                modules |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            whole = ast.unparse(node)
            names = [whole if whole.split(".")[0] in modules else node.attr]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
            names = [x.value for x in node.args[1:2] if isinstance(x, ast.Constant)]
        yield from filter(is_private, names)


def own_names(tree):
    """What a file defines itself, attributes of its objects among it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.attr if isinstance(node, ast.Attribute) else node.id
            if name not in LAST:
                yield name


TREES = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in SOURCES}
OWN = {name for tree in TREES.values() for name in own_names(tree)}


@pytest.mark.parametrize("file", TREES)
def test_private_names_are_in_one_module(file):
    foreign = [
        name
        for name in private_names(TREES[file])
        if name not in OWN | OTHERS | internals.SHARED and not name.startswith("torch._foreach_")
    ]
    assert {(file, name) for name in foreign} <= EXCEPTIONS


@pytest.mark.parametrize(
    "line",
    [
        "import torch._dynamo",
        "from torch._inductor.compile_fx import compile_fx",
        "from torch.optim.optimizer import _to_scalar",
        "torch._C._has_storage(x)",
        "getattr(x, '_base', None)",
    ],
)
def test_a_private_name_is_seen(line):
    assert [name for name in private_names(ast.parse(line)) if name not in OWN]


def test_names_that_are_shared_are_in_use():
    used = {name for tree in TREES.values() for name in private_names(tree)}
    strings = {
        node.value
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
    }
    assert used | OWN | strings >= internals.SHARED
    assert len(NAMES) > 25  # the list was read


@pytest.mark.parametrize("name", NAMES)
def test_torch_has_every_name(name):
    if name == "torch._dynamo.config:patch":
        assert callable(pkgutil.resolve_name(name))
    pkgutil.resolve_name(name)


# Without a name.


def lost(*names):
    """``pkgutil.resolve_name`` as it is where torch has none of these."""
    resolve = pkgutil.resolve_name

    def found(name):
        if name in names:
            raise AttributeError(name)
        return resolve(name)

    return found


@pytest.fixture
def without(monkeypatch):
    """Put a stand-in wherever our modules have bound what stands for a name of torch's."""

    def replace(*names):
        spec = importlib.util.spec_from_file_location("internals_without", internals.__file__)
        fresh = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, fresh)  # where Dynamo looks for globals
        monkeypatch.setattr(pkgutil, "resolve_name", lost(*names))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            spec.loader.exec_module(fresh)
        bound = {
            id(value): key
            for key, value in vars(internals).items()
            if callable(value) and not isinstance(value, type)
        }
        modules = [m for name, m in sys.modules.items() if name.split(".")[0] == "torchref"]
        for module in modules:
            for key, value in list(vars(module).items()):
                if module is not internals and id(value) in bound:
                    monkeypatch.setattr(module, key, getattr(fresh, bound[id(value)]))
        return [str(warning.message) for warning in said]

    torch.compiler.reset()
    yield replace
    torch.compiler.reset()


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), requires_grad=True)


def assert_gradients(f, g, *xs):
    for function in (f, g):  # what is raised in one is raised in the other
        function(*xs)
    for create_graph in (False, True):
        mine = torch.autograd.grad(f(*xs).sin().sum(), xs, create_graph=create_graph)
        expected = torch.autograd.grad(g(*xs).sin().sum(), xs, create_graph=create_graph)
        torch.testing.assert_close(mine, expected)
    if f is not g:
        second = [
            torch.autograd.grad(sum(d.square().sum() for d in ds), xs) for ds in (mine, expected)
        ]
        torch.testing.assert_close(*second)


TARGET = torch.tensor([0, 2, -100, 1])


def in_eager():
    x, w = draw(4, 3), draw(3)
    assert_gradients(
        lambda x, w: ours.batch_norm(x, None, None, w, training=True),
        lambda x, w: theirs.batch_norm(x, None, None, w, training=True),
        x,
        w,
    )
    for f in ("cross_entropy", "nll_loss"):
        assert_gradients(
            lambda x, f=f: getattr(ours, f)(x, TARGET),
            lambda x, f=f: getattr(theirs, f)(x, TARGET),
            x,
        )
    assert_gradients(lambda x: ours.selu(x * 1, True), lambda x: theirs.selu(x * 1, True), x)
    with pytest.raises(RuntimeError, match="leaf"):
        ours.relu(x, inplace=True)
    x = torch.ones(2, 50, requires_grad=True)
    whole = x * 1
    ours.dropout(whole[0], 0.5, inplace=True)  # into a view
    assert set(whole[0].tolist()) == {0.0, 2.0}
    assert torch.equal(torch.autograd.grad(whole.sum(), x)[0], whole)


def in_chunks():
    x, w = draw(8, 3), draw(5, 3)
    target = torch.arange(8) % 5
    options = type("Options", (), {"batch_chunk_size": 2})

    def chunked(x, w):
        return ours.linear_cross_entropy(x, w, target, options=options)

    def whole(x, w):
        return theirs.cross_entropy(theirs.linear(x, w), target)

    assert_gradients(chunked, whole, x, w)
    loss = chunked(x, w)
    twice = [torch.autograd.grad(loss, (x, w), retain_graph=keep) for keep in (True, False)]
    torch.testing.assert_close(*twice)
    batched = torch.autograd.functional.jacobian(chunked, (x, w), vectorize=True)
    torch.testing.assert_close(batched, twice[0])


def under_transforms():
    x = draw(4, 3).detach()

    def loss(x, library):
        return library.log_softmax(library.gelu(x), -1).square().sum()

    for transform in (
        lambda f: torch.func.vmap(torch.func.grad(f))(x),
        lambda f: torch.func.hessian(f)(x),
        lambda f: torch.func.jvp(f, (x,), (x,)),
    ):
        results = [transform(lambda x, m=m: loss(x, m)) for m in (ours, theirs)]
        torch.testing.assert_close(*results)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        tangents = [torch.autograd.forward_ad.unpack_dual(loss(dual, m)) for m in (ours, theirs)]
        torch.testing.assert_close(*tangents)


def under_autocast():
    x, w = draw(4, 3), draw(2, 3)

    def shares(library):
        return library.softmax(library.linear(x, w), -1)

    compiled = torch.compile(shares, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (shares(ours), compiled(ours)), shares(theirs)
    # torch rounds the product to bfloat16, 2**-9 of values up to 4; the softmax once more
    torch.testing.assert_close(found, (expected, expected), rtol=2**-7, atol=2**-7)


def in_models():
    net = torch.nn.Sequential(torch.nn.Conv1d(2, 3, 2), torch.nn.Flatten(), torch.nn.Linear(9, 3))
    assert torchref.nn.init.initialize(net).keys() == {"0", "2"}
    assert not check_symmetry(net, lambda: theirs.cross_entropy(net(draw(4, 2, 4)), TARGET)).copies
    x = draw(4, 3)

    class Model(torch.nn.Module):
        def forward(self, x):
            # ours saves other tensors than torch's, which checkpoint would see
            return checkpoint(theirs.cross_entropy, x, TARGET, use_reentrant=False)

    model = Model()
    expected = torch.autograd.grad(model(x).sum(), x)
    torchref.convert(model, functional=True)
    torch.testing.assert_close(torch.autograd.grad(model(x).sum(), x), expected)
    with pytest.raises(TypeError):
        assert_parity(torch.stack, torch.stack, [x, x])
    drawn = graph(lambda x: theirs.relu_(x * 2).sum(), x)
    assert [node.operation for node in drawn.nodes[1:]] == ["mul", "relu", "sum"]


OPTIMIZERS = [
    ("SGD", {"momentum": 0.9}),
    ("RMSprop", {}),
    ("AdamW", {}),
    ("Adam", {"lr": torch.tensor([0.01]), "foreach": False}),
    ("Adam", {"foreach": True}),
]


def stepped(library, cls, options):
    params = [draw(5), draw(2, 3), draw(3).detach().double().requires_grad_()]
    # a copy of the options: the scheduler writes into a tensor
    optimizer = getattr(library.optim, cls)(params, **{"lr": 0.01} | deepcopy(options))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for _ in range(3):
        for p in params:
            p.grad = p.detach().cos()
        optimizer.step()
        scheduler.step()
    return params


def stepped_with_gradient(library):
    x = draw(5)
    optimizer = library.optim.SGD([torch.nn.Parameter(x.detach())], 0.1, differentiable=True)
    (p,) = optimizer.param_groups[0]["params"] = [x.clone()]
    p.grad = x.cos()
    optimizer.step()
    return torch.autograd.grad(p.sum(), x)


def in_optimizers():
    for cls, options in OPTIMIZERS:
        found = [stepped(library, cls, options) for library in (torchref, torch)]
        torch.testing.assert_close(*found)
    torch.testing.assert_close(*map(stepped_with_gradient, (torchref, torch)))
    back = torchref.optim.revert(torchref.optim.SGD([draw(5)], 0.1))
    assert type(torchref.optim.convert(back)) is torchref.optim.SGD
    for foreach in (None, True, False):
        norms = []
        for clip in (torchref.optim.clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
            params = [draw(5), draw(2, 3)]
            for p in params:
                p.grad = p.detach().clone()
            norms.append((clip(params, 0.5, foreach=foreach), *[p.grad for p in params]))
        torch.testing.assert_close(*norms)


def under_compile(backend="aot_eager"):
    x, w = draw(4, 3), draw(3)

    def loss(x, w, library):
        y = library.batch_norm(library.silu(x), None, None, w, training=True)
        return library.cross_entropy(y, TARGET)

    compiled = torch.compile(lambda x, w: loss(x, w, ours), backend=backend, fullgraph=True)
    assert_gradients_of_first_order(compiled, lambda x, w: loss(x, w, theirs), x, w)


def assert_gradients_of_first_order(f, g, *xs):
    results = [(h(*xs), *torch.autograd.grad(h(*xs), xs)) for h in (f, g)]
    torch.testing.assert_close(*results)


def under_the_compiled_backend():
    x, y = draw(4, 3), draw(4, 3)
    with torchref.backend("compiled"):
        for _ in range(2):
            assert_gradients_of_first_order(ours.mse_loss, theirs.mse_loss, x, y)
        assert_gradients_of_first_order(
            lambda x: ours.gelu(x).sum(), lambda x: theirs.gelu(x).sum(), x
        )


WORK = [in_eager, in_chunks, under_transforms, under_autocast, in_models, in_optimizers]
COMPILERS = [name for name in NAMES if "_dynamo." in name or "_inductor" in name]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in COMPILERS])
def test_numbers_without_a_name(name, without):
    (said,) = without(name)
    assert name in said
    for work in (*WORK, under_compile):
        work()


def test_stand_ins_say_what_torch_says():
    """Where a wrong answer would only show in kernels, or in time."""
    plain = [torch.ones(3), torch.ones(2, 3).t(), torch.ones(3).double(), torch.ones(0)]
    for x in (*plain, torch.ones(3).to_sparse()):
        assert internals._has_readable_storage(x) == internals.has_storage(x)

    def batched(dy):  # as vmap of before torch.func makes it
        assert internals._has_readable_storage(dy) is internals.has_storage(dy) is False
        return dy

    x = draw(3)
    y = x * 1
    y.register_hook(batched)
    torch.autograd.grad(y, x, torch.eye(3), is_grads_batched=True)

    lists = [plain, [], list(range(4))]
    assert internals._grouped(lists) == {
        key: ([plain_, [], numbers], numbers)
        for key, plain_, numbers in (
            ((torch.device("cpu"), torch.float32), [plain[0], plain[1], plain[3]], [0, 1, 3]),
            ((torch.device("cpu"), torch.float64), [plain[2]], [2]),
        )
    }


UNSEEN = ["_are_functorch_transforms_active", "_len_torch_dispatch_stack", "_current_level"]


@pytest.mark.parametrize("name", [n for n in NAMES if n.split(":")[1] in UNSEEN])
def test_what_cannot_be_seen_takes_the_formula(name, without):
    x = torch.ones(3)
    assert dispatch.runs_opaque_code((x,))
    without(name)
    assert not dispatch.runs_opaque_code((x,))


@pytest.mark.parametrize("name", COMPILERS)
def test_the_compiled_backend_without_a_name(name, without, monkeypatch):
    monkeypatch.setattr(torchref.compilation, "_variants", {})
    without(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torchref: torch .* has no")
        under_the_compiled_backend()


WITHOUT_ALL = """
import pkgutil, sys, warnings
sys.path.insert(0, "tests")
resolve, gone = pkgutil.resolve_name, set(sys.argv[1:])

def lost(name):
    if name in gone:
        gone.remove(name)
        raise AttributeError(name)
    return resolve(name)

pkgutil.resolve_name = lost
warnings.simplefilter("ignore")
import test_internals
for work in (*test_internals.WORK, test_internals.under_compile):
    work()
assert not gone, gone
"""


def test_numbers_without_any_name():
    """In a process of its own, where classes and decorators are made of the stand-ins, too."""
    names = [name for name in NAMES if name not in COMPILERS]
    command = [sys.executable, "-c", WITHOUT_ALL, *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
