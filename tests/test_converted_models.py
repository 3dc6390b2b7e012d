"""What PyTorch users do to a model, done to converted models beside their originals.

One model is convolutional and one a small transformer. In float64 both agree to its roundings, so
that anything done another way shows; other dtypes are used where a tool asks for them.
"""

import contextlib
import copy
import io
import os

import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
from pieces import PIECES
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, prune

import torchref

pytestmark = pytest.mark.cpu
MODELS = pytest.mark.parametrize("kind", ["images", "tokens"])
# torch's own export, of itself
EXPORTS = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.hidden = nn.Linear(36, 8)
        self.act = nn.GELU()
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(8, 5)
        self.out = nn.LogSoftmax(1)
        self.loss = nn.NLLLoss()

    def forward(self, x, target=None):
        x = self.drop(self.act(self.hidden(self.features(x))))
        x = self.out(self.head(x))
        return x if target is None else self.loss(x, target)


class Tokens(nn.Module):
    """A block with torch's attention, one with its own, and a loss with smoothed targets."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.softmax = nn.Softmax(-1)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 8))
        self.act = F.silu
        self.head = nn.Linear(8, 5)
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, tokens, target=None):
        x = self.embedding(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.softmax(q @ k.mT / 8**0.5) @ v
        x = self.head(self.act(x + self.mlp(x))).mean(1)
        return x if target is None else self.loss(x, target)


def make(kind, dtype=torch.float64):
    """A model of torch's with running statistics of its own, and its converted copy."""
    original = (Images() if kind == "images" else Tokens()).to(dtype)
    for module in original.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    converted = copy.deepcopy(original)
    assert len(torchref.convert(converted).swapped) >= 6
    return original, converted


def batch(kind, size=4, dtype=torch.float64):
    target = torch.randint(0, 5, (size,))
    if kind == "images":
        return torch.randn(size, 2, 6, 6, dtype=dtype), target
    return torch.randint(0, 11, (size, 7)), target


def close(mine, torchs):
    """Equal to float64's roundings, of some 1e-16, that grow a little on their way."""
    torch.testing.assert_close(mine, torchs, rtol=1e-10, atol=1e-12)


def step(model, x, target, seed=0, loss=None):
    """Loss, gradients by name and buffers after one pass of ``model``, or of ``loss`` around it."""
    torch.manual_seed(seed)
    model.zero_grad()
    value = (model if loss is None else loss)(x, target)
    value.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return value.detach(), gradients, {k: b.clone() for k, b in model.named_buffers()}


def without_dropout(*models):
    """In training otherwise: torch.compile draws other random numbers than eager torch."""
    for model in models:
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
    torch._dynamo.reset()


@MODELS
@pytest.mark.parametrize("training", [True, False])
def test_eager(kind, training):
    original, converted = (model.train(training) for model in make(kind))
    x, target = batch(kind)
    close(step(converted, x, target), step(original, x, target))


@MODELS
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_for_two_batch_sizes(kind, dynamic):
    original, converted = make(kind)
    without_dropout(original, converted)
    compiled = torch.compile(converted, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in (4, 6):
        x, target = batch(kind, size)
        with torch._dynamo.config.patch(error_on_recompile=bool(dynamic)):
            close(step(converted, x, target, loss=compiled), step(original, x, target))


@MODELS
def test_compiled_by_inductor(kind):
    if kind == "tokens" and torch.__version__ < (2, 12):
        pytest.skip("torch 2.11 compiles no float64 attention on a CPU, its own neither")
    original, converted = make(kind)
    without_dropout(original, converted)
    compiled = torch.compile(converted, fullgraph=True, mode="reduce-overhead")
    x, target = batch(kind)
    close(step(converted, x, target, loss=compiled), step(original, x, target))


def test_compiled_in_place():
    original, converted = make("images")
    without_dropout(original, converted)
    converted.compile(fullgraph=True, backend="aot_eager")
    x, target = batch("images")
    close(step(converted, x, target), step(original, x, target))


@EXPORTS
@MODELS
@pytest.mark.parametrize("strict", [True, False])
def test_exported_for_any_batch_size(kind, strict):
    original, converted = (model.eval() for model in make(kind))
    x, target = batch(kind)
    size = torch.export.Dim("size", min=2)
    program = torch.export.export(
        converted, (x, target), dynamic_shapes=({0: size}, {0: size}), strict=strict
    )
    x, target = batch(kind, 6)
    close(program.module()(x, target), original(x, target))
    close(program.run_decompositions().module()(x, target), original(x, target))
    assert dict(program.state_dict).keys() == original.state_dict().keys()


@MODELS
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11's, of its file
def test_exported_and_saved(kind, strict):
    original, converted = (model.eval() for model in make(kind))
    x, _ = batch(kind)
    file = io.BytesIO()
    torch.export.save(torch.export.export(converted, (x,), strict=strict), file)
    file.seek(0)
    close(torch.export.load(file).module()(x), original(x))


@EXPORTS
@MODELS
def test_aot_inductor(kind, tmp_path):
    original, converted = (model.eval() for model in make(kind))
    x, _ = batch(kind)
    package = torch._inductor.aoti_compile_and_package(
        torch.export.export(converted, (x,)), package_path=str(tmp_path / "model.pt2")
    )
    close(torch._inductor.aoti_load_package(package)(x), original(x))


@EXPORTS
@MODELS
def test_onnx(kind, tmp_path):
    why = "the exporter and the runtime of ONNX: pip install -e '.[models]'"
    runtime = pytest.importorskip("onnxruntime", reason=why)
    pytest.importorskip("onnxscript", reason=why)
    original, converted = (model.eval() for model in make(kind, torch.float32))
    x, _ = batch(kind, dtype=torch.float32)
    path = tmp_path / "model.onnx"
    torch.onnx.export(converted, (x,), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    # float32's roundings, in sums of up to 72 terms that ONNX Runtime adds in an order of its own
    torch.testing.assert_close(torch.from_numpy(y), original(x).detach(), rtol=1e-5, atol=1e-5)


@contextlib.contextmanager
def attention_in_parts():
    """torch's attention without its fused kernels, which have no forward mode and no vmap."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def functions_of(model):
    """The loss as a function of parameters, and the parameters."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = {name: b.detach() for name, b in model.named_buffers()}

    def loss(parameters, x, target):
        return torch.func.functional_call(model, (parameters, buffers), (x, target))

    return loss, parameters


@MODELS
@pytest.mark.parametrize("transform", ["grad", "per sample", "jvp", "hvp", "ensemble"])
def test_torch_func(kind, transform):
    x, target = batch(kind)
    original, converted = (model.eval() for model in make(kind))
    tangents = {name: torch.randn_like(p) for name, p in original.named_parameters()}

    def transformed(model):
        loss, parameters = functions_of(model)
        if transform == "grad":
            return torch.func.grad(loss)(parameters, x, target)
        if transform == "per sample":
            of_one = torch.func.grad(lambda p, x, t: loss(p, x[None], t[None]))
            return torch.vmap(of_one, (None, 0, 0))(parameters, x, target)
        if transform == "ensemble":
            stacked = {k: torch.stack([p, p + 0.1 * tangents[k]]) for k, p in parameters.items()}
            return torch.vmap(loss, (0, None, None))(stacked, x, target)
        of_parameters = lambda p: loss(p, x, target)  # noqa: E731
        f = torch.func.grad(of_parameters) if transform == "hvp" else of_parameters
        return torch.func.jvp(f, (parameters,), (tangents,))

    with attention_in_parts():
        close(transformed(converted), transformed(original))


def outputs(model, call):
    """What each submodule returns while ``call`` runs, by name."""
    seen, handles = {}, []
    for name, module in model.named_modules():

        def hook(module, args, output, name=name):
            seen[name] = output[0] if isinstance(output, tuple) else output

        handles.append(module.register_forward_hook(hook))
    call()
    for handle in handles:
        handle.remove()
    return seen


@MODELS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_autocast(kind, dtype, training):
    original, converted = (model.train(training) for model in make(kind, torch.float32))
    x, target = batch(kind, dtype=torch.float32)
    seen, gradients = [], []
    for model in (converted, original):

        def call(model=model):
            with torch.autocast("cpu", dtype):
                loss = model(x, target)
            loss.backward()

        torch.manual_seed(0)
        seen.append(outputs(model, call))
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    mine, torchs = seen
    assert mine.keys() == torchs.keys()
    assert {n: y.dtype for n, y in mine.items()} == {n: y.dtype for n, y in torchs.items()}
    assert {y.dtype for y in mine.values()} == {dtype, torch.float32}
    # Values are of order 1. A layer may round to the neighbor, and some ten follow each other.
    few = 10 * torch.finfo(dtype).eps
    torch.testing.assert_close(mine, torchs, rtol=few, atol=few)
    torch.testing.assert_close(*gradients, rtol=few, atol=few)


ON_CUDA = [piece for piece in PIECES if piece.autocast]


@pytest.fixture
def autocast_of_cuda():
    """What ``torch.autocast("cuda")`` sets, without its question whether there is a device."""
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.float16)
    yield
    torch.set_autocast_enabled("cuda", False)
    torch.set_autocast_dtype("cuda", before)
    torch.clear_autocast_cache()


@pytest.mark.parametrize("piece", ON_CUDA, ids=lambda p: p.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_types_under_autocast_on_cuda(piece, dtype, autocast_of_cuda):
    """On a CPU: fake tensors go through torch's own dispatcher, with its lists, as CUDA's.

    Without gradients, because autograd would ask for the device. Both refuse binary cross-entropy.
    """
    types = []
    for f in (piece.ours, piece.theirs):
        inputs = piece.inputs(dtype)
        with FakeTensorMode(), torch.no_grad():
            fake = [torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in inputs]
            if piece.name == "binary_cross_entropy":
                with pytest.raises(RuntimeError, match="unsafe"):
                    f(*fake)
            else:
                types.append(f(*fake).dtype)
    assert len(set(types)) <= 1


@MODELS
def test_grad_scaler(kind):
    """An overflow, in the third of five steps, is skipped in both and halves the scale."""
    x, target = batch(kind, dtype=torch.float32)
    runs = []
    for model in make(kind, torch.float32)[::-1]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        run = []
        for i in range(5):
            torch.manual_seed(i)
            before = copy.deepcopy(model.state_dict())
            with torch.autocast("cpu", torch.float16):
                loss = model(x, target)
            scaler.scale(loss * 1e6 if i == 2 else loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            moved = any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
            run.append((moved, scaler.get_scale()))
        runs.append((run, model.state_dict()))
    assert runs[0][0] == runs[1][0]
    assert [moved for moved, _ in runs[0][0]] == [True, True, False, True, True]
    assert runs[0][0][-1][1] == 128.0
    # four steps of 0.05, whose gradients are of order 1 and have float16's digits in every layer
    few = 4 * torch.finfo(torch.float16).eps
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=few, atol=few)


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@MODELS
def test_checkpoints_of_both_go_to_the_other(kind):
    x, _ = batch(kind)
    for trained, fresh in (make(kind), make(kind)[::-1]):
        other = copy.deepcopy(fresh)
        for p in other.parameters():
            p.data.zero_()
        other.load_state_dict(saved(trained.state_dict()), strict=True)
        assert list(other.state_dict()) == list(trained.state_dict())
        close(other.eval()(x), trained.eval()(x))


@MODELS
def test_averaged_weights(kind):
    """An average, its schedule, and the statistics of batch norm computed anew for it."""
    batches = [batch(kind) for _ in range(4)]
    runs = []
    for model in make(kind):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        averaged = torch.optim.swa_utils.AveragedModel(model)
        schedule = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.01, anneal_epochs=2)
        for i, (x, target) in enumerate(batches):
            step(model, x, target, seed=i)
            optimizer.step()
            averaged.update_parameters(model)
            schedule.step()
        torch.optim.swa_utils.update_bn([x for x, _ in batches], averaged)
        runs.append((averaged.state_dict(), schedule.get_last_lr(), averaged.eval()(batches[0][0])))
    close(*runs)


def quantizable():
    model = nn.Sequential(
        torch.ao.quantization.QuantStub(),
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 5),
        torch.ao.quantization.DeQuantStub(),
    )
    model.qconfig = torch.ao.quantization.default_qconfig
    return model.eval()


def quantized(model, x):
    """By torch's three steps: fuse, observe a batch, replace."""
    fused = torch.ao.quantization.fuse_modules(model, [["1", "2", "3"]])
    prepared = torch.ao.quantization.prepare(fused)
    prepared(x)
    return torch.ao.quantization.convert(prepared)


DEPRECATED = pytest.mark.filterwarnings(
    "ignore:.*torch.ao.quantization is deprecated:DeprecationWarning",
    "ignore:Please use quant_min and quant_max:UserWarning",
    "ignore:.*TypedStorage is deprecated:UserWarning",
    "ignore:.*reduce_range will be deprecated:UserWarning",
    "ignore:torch.quantize_per_tensor:UserWarning",
)


@DEPRECATED
def test_quantized_after_revert():
    original, x = quantizable(), torch.randn(8, 2, 6, 6)
    model = copy.deepcopy(original)
    torchref.convert(model)
    torchref.revert(model)
    results = [quantized(model, x) for model in (model, original)]
    classes = [[type(module) for module in model.modules()] for model in results]
    assert classes[0] == classes[1]
    assert torch.ao.nn.quantized.Linear in classes[0]
    assert torch.equal(results[0](x), results[1](x))


@DEPRECATED
def test_quantization_without_revert():
    """Tables of exact classes: a fusion raises, and a layer of ours stays in floating point."""
    model, x = quantizable(), torch.randn(8, 2, 6, 6)
    torchref.convert(model)
    with pytest.raises(AssertionError, match="did not find fuser method"):
        quantized(model, x)
    layer = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    torchref.convert(layer, exclude=["1"])
    dynamic = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear})
    assert type(dynamic[0]) is torchref.nn.Linear
    assert type(dynamic[1]) is torch.ao.nn.quantized.dynamic.Linear
    layer.qconfig = torch.ao.quantization.default_qconfig
    observers = torch.ao.quantization.prepare(layer)
    assert not hasattr(observers[0], "activation_post_process")
    assert hasattr(observers[1], "activation_post_process")


@MODELS
def test_hooks(kind):
    """Of every kind, made before and after, with the same arguments in the same order."""
    x, target = batch(kind)
    runs = []
    original, converted = make(kind)
    torchref.revert(converted)
    for model in (converted, original):
        calls = []

        def note(what, calls=calls):
            def hook(hooked, *values):
                values = torch.utils._pytree.tree_leaves(values)
                tensors = [v.detach().clone() for v in values if isinstance(v, torch.Tensor)]
                calls.append((what, type(hooked).__name__, tensors))

            return hook

        for module in (model, model.head, model.loss):
            module.register_forward_pre_hook(note("pre"), with_kwargs=True)
            module.register_forward_hook(note("forward"), with_kwargs=True, always_call=True)
        for module in (model.head, model.loss):
            module.register_full_backward_pre_hook(note("backward pre"))
        if model is converted:
            torchref.convert(model)
        for module in (model.head, model.loss):
            module.register_full_backward_hook(note("backward"))
        model.head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        model.head.weight.register_hook(lambda g: g * 3)
        model.head.weight.register_post_accumulate_grad_hook(
            lambda p, calls=calls: calls.append(("accumulated", "", [p.grad.clone()]))
        )
        gradients = step(model, x, None, loss=lambda x, _, m=model: m(x, target=target))
        runs.append((calls, gradients))
    assert [call[:2] for call in runs[0][0]] == [call[:2] for call in runs[1][0]]
    assert len(runs[0][0]) >= 11
    close([call[2] for call in runs[0][0]], [call[2] for call in runs[1][0]])
    close(runs[0][1], runs[1][1])


@MODELS
@pytest.mark.parametrize("first", ["convert", "change"])
@pytest.mark.parametrize("change", ["prune", "global", "spectral"])
def test_pruned_and_parametrized(kind, change, first):
    original, converted = make(kind)
    if first == "change":
        torchref.revert(converted)
    x, target = batch(kind)
    for model in (converted, original):
        layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not model.head]
        torch.manual_seed(1)
        if change == "prune":
            prune.l1_unstructured(model.head, "weight", amount=0.4)
            prune.ln_structured(layers[0], "weight", amount=2, n=2, dim=0)
        elif change == "global":
            pairs = [(model.head, "weight"), (model.head, "bias")]
            prune.global_unstructured(pairs, prune.L1Unstructured, amount=0.5)
        else:
            parametrizations.spectral_norm(model.head)
    if first == "change":
        torchref.convert(converted)
    assert isinstance(converted.head, torchref.nn.Linear)
    close(step(converted, x, target), step(original, x, target))
    close(converted.eval()(x), original.eval()(x))
    if change != "spectral":
        for model in (converted, original):
            prune.remove(model.head, "weight")
    assert converted.state_dict().keys() == original.state_dict().keys()
    close(converted(x), original(x))


@MODELS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_moved_to_another_dtype(kind, dtype):
    original, converted = (model.eval().to(dtype) for model in make(kind, torch.float32))
    x, target = batch(kind, dtype=dtype)
    mine, torchs = step(converted, x, target), step(original, x, target)
    # Values are of order 1. A layer may round to the neighbor, and some ten follow each other.
    few = 10 * torch.finfo(dtype).eps
    torch.testing.assert_close(mine, torchs, rtol=few, atol=few)
    assert {g.dtype for g in mine[1].values()} == {dtype}


def test_channels_last():
    original, converted = make("images")
    x, target = batch("images")
    layouts = []
    for model in (converted, original):
        model.to(memory_format=torch.channels_last)
        call = lambda m=model: m(x.to(memory_format=torch.channels_last))  # noqa: E731
        layouts.append({name: y.stride() for name, y in outputs(model.eval(), call).items()})
    assert layouts[0] == layouts[1]
    assert layouts[0]["features.2"][1] == 1  # from the convolution through batch norm and ReLU
    x = x.to(memory_format=torch.channels_last)
    close(step(converted.train(), x, target), step(original.train(), x, target))


def test_moved_to_meta_and_back():
    original, converted = make("images")
    x, _ = batch("images")
    state = converted.state_dict()
    empty = converted.to("meta")
    assert empty(x.to("meta")).shape == (4, 5)
    empty.to_empty(device="cpu").load_state_dict(original.state_dict())
    assert empty.state_dict().keys() == state.keys()
    close(empty.eval()(x), original.eval()(x))


def gradients_of(model, x, target):
    model.zero_grad()
    model(x, target).backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def averaged_gradients(model, batches):
    """What data parallelism shall give: of batches of one size, the mean over them."""
    parts = [gradients_of(model, *one) for one in batches]
    return {name: torch.stack([part[name] for part in parts]).mean(0) for name in parts[0]}


def process(rank, world, file):
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    store = f"file://{file}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world,))
    torch.manual_seed(0)  # one model and the same batches in every process
    for kind in ("images", "tokens"):
        original, converted = (model.eval() for model in make(kind))
        batches = [batch(kind) for _ in range(world)]
        expected = averaged_gradients(original, batches)
        parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(converted))
        close(gradients_of(parallel, *batches[rank]), expected)
        with pytest.raises(TypeError, match="DistributedDataParallel wraps the model"):
            torchref.revert(parallel)

        for layer in (converted.head, converted):
            fully_shard(layer, mesh=mesh)
        sharded = gradients_of(converted, *batches[rank])
        close({name: g.full_tensor() for name, g in sharded.items()}, expected)
        with pytest.raises(TypeError, match="wraps the model"):
            torchref.revert(converted)
        torchref.optim.SGD(converted.parameters(), lr=0.1).step()
        for (name, p), q in zip(converted.named_parameters(), original.parameters(), strict=True):
            close(p.full_tensor(), q.detach() - 0.1 * expected[name])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # at an ordinary exit a thread of gloo's that is still there aborts the process


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("world", [1, 2])
def test_data_parallel_and_sharded(world, tmp_path):
    torch.multiprocessing.spawn(process, (world, tmp_path / "store"), nprocs=world)


def train_shared(model, x, target):
    """In a second process, whose threads may not be those of the first."""
    torch.set_num_threads(1)
    model(x, target).backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad


def test_shared_with_another_process():
    original, converted = (model.eval() for model in make("images"))
    x, target = batch("images")
    converted.share_memory()
    context = torch.multiprocessing.get_context("spawn")
    other = context.Process(target=train_shared, args=(converted, x, target))
    other.start()
    other.join()
    assert other.exitcode == 0
    gradients = gradients_of(original, x, target)
    for name, p in converted.named_parameters():
        close(p.detach(), original.get_parameter(name).detach() - 0.1 * gradients[name])
