"""Models that nobody here wrote, converted: Hugging Face's, pytorchcv's and torch's own.

They are small and drawn at random; nothing is downloaded.
"""

import copy
import os
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchref
from torchref.convert import FUNCTIONS
from torchref.testing import measure_parity

os.environ["HF_HUB_OFFLINE"] = "1"  # before the import, which reads it
transformers = pytest.importorskip(
    "transformers", reason="no transformers: pip install -e '.[models]' brings it"
)

PAGE = Path(__file__).parent.parent.parent / "docs" / "migration.md"
WIDTHS = {"hidden_size": 32, "intermediate_size": 64}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
CLASSES = torch.tensor([0, 2, 1, 1])


class WithLoss(nn.Module):
    """A model that returns scores, with the loss that Hugging Face's models have inside."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.loss = nn.CrossEntropyLoss()

    def forward(self, labels, **inputs):
        scores = self.model(*inputs.values())
        return self.loss(scores.flatten(0, -2), labels.flatten()), scores


class Recurrent(nn.Module):
    """The usual language model around ``torch.nn.LSTM``."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(64, 16)
        self.lstm = nn.LSTM(16, 32, num_layers=2, dropout=0.1, batch_first=True)
        self.drop = nn.Dropout(0.1)
        self.decoder = nn.Linear(32, 64)

    def forward(self, ids):
        hidden, _ = self.lstm(self.embedding(ids))
        return F.log_softmax(self.decoder(self.drop(hidden)), dim=-1)


class Translator(nn.Module):
    """Around ``torch.nn.Transformer``, encoder and decoder."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(64, 16)
        self.transformer = nn.Transformer(16, 2, 2, 2, 32, batch_first=True)
        self.decoder = nn.Linear(16, 64)

    def forward(self, ids):
        x = self.embedding(ids)
        return self.decoder(self.transformer(x, x.flip(1)))


def bert():
    config = transformers.BertConfig(**WIDTHS, **LAYERS, **TOKENS, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def gpt2():
    sizes = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    # Its own softmax and dropout: torch's fused attention has no parts to swap.
    config = transformers.GPT2Config(**sizes, **TOKENS, attn_implementation="eager")
    return transformers.GPT2LMHeadModel(config)


def llama():
    options = {"num_key_value_heads": 2, "attention_dropout": 0.1}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**WIDTHS, **LAYERS, **TOKENS, **options)
    )


def vit():
    sizes = {"image_size": 16, "patch_size": 4, "hidden_dropout_prob": 0.1}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**WIDTHS, **LAYERS, **sizes, num_labels=3)
    )


def resnet():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2]}
    config = transformers.ResNetConfig(**sizes, layer_type="basic", num_labels=3)
    return transformers.ResNetForImageClassification(config)


def regnet():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4}
    return transformers.RegNetForImageClassification(
        transformers.RegNetConfig(**sizes, num_labels=3, problem_type="regression")
    )


def mobilenet():
    # Not its ReLU6: see JUMPING. Among so many units one lies at a corner from the start.
    config = transformers.MobileNetV2Config(depth_multiplier=0.25, num_labels=3, hidden_act="swish")
    return transformers.MobileNetV2ForImageClassification(config)


def convnext():
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "patch_size": 2}
    config = transformers.ConvNextConfig(
        **sizes, num_labels=3, problem_type="multi_label_classification"
    )
    return transformers.ConvNextForImageClassification(config)


def from_pytorchcv(module, name, *sizes):
    reason = "no pytorchcv: pip install --no-deps pytorchcv (what it asks for is not needed here)"
    models = pytest.importorskip(f"pytorchcv.models.{module}", reason=reason)
    return WithLoss(getattr(models, name)(*sizes, in_size=(16, 16), num_classes=3))


dia = partial(from_pytorchcv, "diaresnet_cifar", "CIFARDIAResNet", [[8, 8], [16, 16]], 8, False)
dense = partial(
    from_pytorchcv, "densenet_cifar", "CIFARDenseNet", [[12, 16], [12, 16]], 8, False, 0.1
)


def words():
    ids = torch.randint(3, 64, (4, 12))
    return {"input_ids": ids, "labels": ids.clone()}


def sentences():
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[1, 7:] = 0
    return words() | {"labels": CLASSES, "attention_mask": mask}


def images(size=16, labels=CLASSES):
    return {"pixel_values": torch.randn(4, 3, size, size, requires_grad=True), "labels": labels}


# The model, its batch, and the pieces that it must have got.
MODELS = {
    "bert": (bert, sentences, {"Linear", "Dropout", "Tanh", "gelu"}),
    "gpt2": (gpt2, words, {"Linear", "Dropout"}),
    "llama": (llama, words, {"Linear"}),
    "vit": (vit, images, {"Linear", "Dropout", "gelu"}),
    "resnet": (resnet, images, {"BatchNorm2d", "ReLU", "Linear"}),
    "regnet": (
        regnet,
        partial(images, labels=torch.eye(4, 3)),
        {"BatchNorm2d", "ReLU", "Sigmoid", "Linear"},
    ),
    "mobilenet": (mobilenet, partial(images, 96), {"BatchNorm2d", "SiLU", "Dropout", "Linear"}),
    "convnext": (convnext, partial(images, labels=torch.eye(4, 3)), {"Linear", "gelu"}),
    "dia": (dia, images, {"BatchNorm2d", "ReLU", "Linear", "Dropout", "CrossEntropyLoss"}),
    "dense": (dense, images, {"BatchNorm2d", "ReLU", "Linear", "CrossEntropyLoss", "Dropout"}),
    "recurrent": (lambda: WithLoss(Recurrent()), words, {"Linear", "Dropout", "CrossEntropyLoss"}),
    "translator": (
        lambda: WithLoss(Translator()),
        words,
        {"Linear", "Dropout", "relu", "CrossEntropyLoss"},
    ),
}

# A ReLU's gradient jumps at 0. In float32 one unit in one of 20 trainings is rounded to the other
# side of it, in ours or in torch's.
JUMPING = {"resnet", "regnet", "dia", "dense"}

# MobileNetV2's 52 batch norms in a row double a rounding again and again. How large it ends is
# chance: see test_many_batch_norms_in_a_row.
TRAINED = [name for name in MODELS if name != "mobilenet"]


def build(name, seed=0):
    """A model whose biases and scales are not all 0 and 1, in training, and its batch."""
    torch.manual_seed(seed)
    make, inputs, _ = MODELS[name]
    model = make()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim < 2:
                p.add_(0.1 * torch.randn_like(p))
    return model.train(), inputs()


class Answers(nn.Module):
    """Loss and scores as a tuple, which the harness compares."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **batch):
        return self.model(**batch)[:2]


class Compiled(Answers):
    def forward(self, **batch):
        return torch.compile(self.model, backend="aot_eager", fullgraph=False)(**batch)[:2]


class Trained(nn.Module):
    """Ten steps of AdamW: the losses, and the parameters after them."""

    def __init__(self, model, convert):
        super().__init__()
        self.model = model
        self.convert = convert

    def forward(self, **batch):
        # A gradient that is 0 but for rounding, such as that of a key's bias, would move its
        # parameter by lr in a random direction with a smaller eps.
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, eps=1e-4)
        self.convert(optimizer)
        losses = []
        for _ in range(10):
            loss = self.model(**batch)[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses), *(p.detach() for p in self.model.parameters())


def assert_as_exact(ours, theirs, batch):
    """Every error is at most twice torch's plus 8 roundings of the largest value of its kind.

    The truth is torch's in float64. ``assert_parity`` takes the roundings of each tensor's own
    largest value. In a whole model that is too strict: gradients of different layers carry the
    same rounding errors, and some are 0 but for them.
    """
    comparisons = measure_parity(ours, theirs, **batch)
    roundings = {}
    for c in comparisons:
        kind = c.name.split()[0]
        roundings[kind] = max(roundings.get(kind, 0.0), c.bound - 2 * c.their_error)
    problems = [
        c.problem
        for c in comparisons
        # What is missing has no error, other shapes and stray NaN have none that is finite.
        if c.problem and not 0 < c.error <= 2 * c.their_error + roundings[c.name.split()[0]]
    ]
    assert not problems, "\n".join(problems)


def converted(model, functional):
    ours = copy.deepcopy(model)
    torchref.convert(ours, functional=functional)
    return ours


def classes(model):
    return {name: type(module) for name, module in model.named_modules()}


def attributes(model):
    return {name: dict(vars(module)) for name, module in model.named_modules()}


functional_or_not = pytest.mark.parametrize("functional", [False, True])
# What torch.nn.Transformer says of itself
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")


@functional_or_not
@pytest.mark.parametrize(
    ("name", "training"),
    [*((name, False) for name in MODELS), *((name, True) for name in TRAINED)],
)
def test_outputs_gradients_and_buffers(name, functional, training):
    theirs, batch = build(name)
    ours = converted(theirs, functional)
    assert_as_exact(Answers(ours.train(training)), Answers(theirs.train(training)), batch)


@functional_or_not
@pytest.mark.parametrize("name", TRAINED)
def test_ten_steps_of_adamw(name, functional):
    """After ten steps torch's own error is larger, and ours may be twice as large as that."""
    theirs, batch = build(name)
    batch = {name: tensor.detach() for name, tensor in batch.items()}
    if name in JUMPING:
        theirs.double()
        batch = {k: x.double() if x.is_floating_point() else x for k, x in batch.items()}
    ours = Trained(converted(theirs, functional), torchref.optim.convert)
    assert_as_exact(ours, Trained(theirs, lambda optimizer: optimizer), batch)


def test_many_batch_norms_in_a_row():
    """On average over models our gradients are about as far from the truth as torch's.

    A gradient's error is 1.0 to 1.2 times torch's in the median of a model (with sums in float64,
    too), so the mean of four logarithms is 0.07, give or take 0.04.
    """
    ratios = []
    for seed in range(4):
        theirs, batch = build("mobilenet", seed)
        exact = copy.deepcopy(theirs).double()
        errors = []
        for model in (converted(theirs, False), theirs):
            pairs = zip(gradients(model, batch), gradients(exact, batch), strict=True)
            errors.append([((g.double() - t).norm() / t.norm()).log() for g, t in pairs])
        ours, torchs = map(torch.stack, errors)
        ratios.append((ours - torchs).median())
    assert torch.stack(ratios).mean().exp() <= 1.5


def gradients(model, batch):
    dtype = next(model.parameters()).dtype
    batch = {k: x.to(dtype) if x.is_floating_point() else x for k, x in batch.items()}
    torch.manual_seed(1)  # of dropout
    return torch.autograd.grad(model(**batch).loss, list(model.parameters()))


@functional_or_not
@pytest.mark.parametrize("name", MODELS)
def test_report_and_revert(name, functional):
    model, _ = build(name)
    before, kept, state = classes(model), attributes(model), model.state_dict(keep_vars=True)
    report = torchref.convert(model, functional=functional)
    assert set(report.swapped.values()) == MODELS[name][2]
    assert isinstance(model, before[""])
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state)
    assert all(after[key] is tensor for key, tensor in state.items())
    changed = {name for name, cls in classes(model).items() if cls is not before[name]}
    assert len(changed - {""}) == sum(value[0].isupper() for value in report.swapped.values())
    torchref.revert(model)
    assert classes(model) == before
    assert attributes(model) == kept


@pytest.mark.parametrize(
    ("name", "functions"),
    [
        ("bert", {"cross_entropy"}),
        ("gpt2", {"tanh", "softmax", "cross_entropy"}),
        ("llama", {"silu", "cross_entropy"}),
        ("regnet", {"mse_loss"}),
        ("convnext", {"binary_cross_entropy_with_logits"}),
        ("dia", {"tanh", "sigmoid"}),
        ("recurrent", {"log_softmax"}),
    ],
)
def test_functions_that_forward_calls(name, functions, monkeypatch):
    model, batch = build(name)
    torchref.convert(model, functional=True)
    called = set()

    def noting(function):
        def note(*args, **kwargs):
            called.add(function.__name__.strip("_"))
            return function(*args, **kwargs)

        return note

    for theirs, ours in dict(FUNCTIONS).items():
        monkeypatch.setitem(FUNCTIONS, theirs, noting(ours))
    model(**batch)
    assert functions <= called  # other versions call others, too


@functional_or_not
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generation(name, functional):
    theirs, batch = build(name)
    ours = converted(theirs.eval(), functional)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    tokens = [model.generate(batch["input_ids"][:, :4], **options) for model in (ours, theirs)]
    assert tokens[0].shape == (4, 16)
    assert torch.equal(*tokens)


# Its new name is younger than what the extra group `models` asks for.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@functional_or_not
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_gradient_checkpointing(name, functional, reentrant):
    theirs, batch = build(name)
    theirs.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert any(getattr(m, "gradient_checkpointing", False) for m in theirs.modules())
    assert_as_exact(Answers(converted(theirs, functional)), Answers(theirs), batch)


@functional_or_not
def test_saved_and_loaded(tmp_path, functional):
    theirs, batch = build("bert")
    ours = converted(theirs.eval(), functional)
    ours.save_pretrained(tmp_path)
    cls = transformers.BertForSequenceClassification
    loaded = cls.from_pretrained(tmp_path).eval()
    assert type(loaded) is cls
    assert loaded.config.architectures == [cls.__name__]
    torch.testing.assert_close(loaded.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    torchref.convert(loaded, functional=functional)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, ours(**batch).logits)


@functional_or_not
def test_compiled(functional):
    theirs, batch = build("bert")
    ours = converted(theirs.eval(), functional)
    assert_as_exact(Compiled(ours), Answers(theirs), batch)


def train(model, batch, directory, convert):
    """Three steps of the Trainer, which shuffles and draws dropout by a seed of its own."""
    rows = [{key: value[i] for key, value in batch.items()} for i in range(4) for _ in range(2)]
    options = {"max_steps": 3, "per_device_train_batch_size": 4, "report_to": "none"}
    arguments = transformers.TrainingArguments(
        output_dir=directory, use_cpu=True, disable_tqdm=True, save_strategy="no", **options
    )
    optimizer = convert(torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4))
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows, optimizers=(optimizer, None)
    )
    trainer.train()
    assert trainer.state.global_step == 3
    return trainer


@functional_or_not
def test_trainer(tmp_path, functional):
    theirs, batch = build("bert")
    ours, start = converted(theirs, functional), theirs.classifier.weight.clone()
    train(ours, batch, tmp_path, torchref.optim.convert)
    train(theirs, batch, tmp_path, lambda optimizer: optimizer)
    assert not torch.equal(theirs.classifier.weight, start)
    # Three steps of at most 1e-3: what differs is a hundredth of a step at most.
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")  # without a GPU
def test_the_trainer_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the Trainer writes
    (block,) = re.findall(r"```py\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = {}
    exec(compile(block, PAGE.name, "exec"), names)
    assert names["trainer"].state.global_step == 3
    assert isinstance(names["model"].classifier, torchref.nn.Linear)
