import copy

import pytest
import torch
from optim_parity import NAMES, ours, theirs

import torchref

OPTIONS = {
    "SGD": {"momentum": 0.9, "nesterov": True},
    "RMSprop": {"momentum": 0.5, "centered": True},
    "Adam": {"amsgrad": True},
    "AdamW": {"weight_decay": 0.1},
}


def made(cls, **options):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (5,))]
    return cls([{"params": params[:1], "lr": 0.02}, {"params": params[1:]}], lr=0.1, **options)


def steps(optimizer, first, last):
    """Steps whose gradients follow from their numbers."""
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def values(optimizer):
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backwards", [False, True])
def test_the_state_goes_on(name, backwards):
    """Convert after three steps, and revert after three more, or the other way round."""
    whole = made(theirs(name), **OPTIONS[name])
    first = made((ours if backwards else theirs)(name), **OPTIONS[name])
    steps(whole, 0, 9)
    steps(first, 0, 3)
    held = {p: dict(state) for p, state in first.state.items()}
    groups = first.param_groups
    change = [torchref.optim.convert, torchref.optim.revert]
    for number, function in enumerate(change[::-1] if backwards else change):
        assert function(first) is first
        assert function(first) is first  # what is done stays done
        if number == 0:
            assert first.param_groups is groups
            assert all(first.state[p][k] is v for p, s in held.items() for k, v in s.items())
        steps(first, 3 * (number + 1), 3 * (number + 2))
    assert type(first) is (ours if backwards else theirs)(name)
    torch.testing.assert_close(values(first), values(whole))
    torch.testing.assert_close(first.state_dict(), whole.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_converted_equals_built(name):
    """To the bit: the steps after conversion are ours."""
    built, converted = made(ours(name), **OPTIONS[name]), made(theirs(name), **OPTIONS[name])
    torchref.optim.convert(converted)
    for optimizer in (built, converted):
        steps(optimizer, 0, 3)
    assert type(converted) is ours(name)
    torch.testing.assert_close(values(built), values(converted), rtol=0, atol=0)


def test_schedulers_and_hooks_go_on():
    lrs, hooked = [], []
    for convert in (False, True):
        optimizer = made(torch.optim.Adam)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        optimizer.register_step_post_hook(lambda o, *_: hooked.append(type(o)))
        if convert:
            torchref.optim.convert(optimizer)
        for number in range(4):
            steps(optimizer, number, number + 1)
            scheduler.step()  # warns, and so fails, if it does not see the step before it
        lrs.append(scheduler.get_last_lr())
    assert lrs[0] == lrs[1]
    assert hooked == [torch.optim.Adam] * 4 + [torchref.optim.Adam] * 4


def test_a_scheduler_still_sees_that_no_step_came_first():
    optimizer = made(torch.optim.Adam)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    torchref.optim.convert(optimizer)
    with pytest.warns(UserWarning, match="lr_scheduler.step.* before .optimizer.step"):
        scheduler.step()


def test_a_scheduler_does_not_keep_an_optimizer_alive():
    import gc
    import weakref

    optimizer = made(torch.optim.Adam)
    torch.optim.lr_scheduler.StepLR(optimizer, 2)
    gone = weakref.ref(torchref.optim.convert(optimizer))
    del optimizer
    gc.collect()
    assert gone() is None


def test_copies_are_ours():
    optimizer = torchref.optim.convert(made(torch.optim.SGD, momentum=0.9))
    steps(optimizer, 0, 2)
    copied = copy.deepcopy(optimizer)
    assert type(copied) is torchref.optim.SGD
    for o in (optimizer, copied):
        steps(o, 2, 4)
    torch.testing.assert_close(values(optimizer), values(copied), rtol=0, atol=0)


def test_other_classes_are_named():
    class Special(torch.optim.Adam):
        pass

    for optimizer in (made(Special), made(torch.optim.Adagrad)):
        for function in (torchref.optim.convert, torchref.optim.revert):
            expected = "expected one of .*SGD, .*AdamW as `optimizer`, got <class"
            with pytest.raises(TypeError, match=expected):
                function(optimizer)


def test_a_replaced_step_is_refused():
    optimizer = made(torch.optim.Adam)
    optimizer.step = lambda: None
    with pytest.raises(TypeError, match="something has replaced the optimizer's step"):
        torchref.optim.convert(optimizer)
    assert type(optimizer) is torch.optim.Adam


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("SGD", {"lr_in_velocity": True}),
        ("RMSprop", {"max_norm": 0.0}),
        ("Adam", {"ema_decay": 0.9}),
        ("AdamW", {"state_dtype": torch.float32}),
    ],
)
def test_an_option_of_ours_is_refused(name, option):
    optimizer = made(ours(name), **option)
    ((key, _),) = option.items()
    with pytest.raises(ValueError, match=f"optim.revert: torch has no {key}="):
        torchref.optim.revert(optimizer)
    assert type(optimizer) is ours(name)
