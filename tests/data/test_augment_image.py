import copy
import dataclasses
import pickle
import random
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from torchref.data.augment.image import LIMITS, OPTIONS, ImageAugment, mixup, save_picture
from torchref.nn.functional import cross_entropy

STRONG = {
    "rotation": 90.0,
    "horizontal_flip": 0.5,
    "vertical_flip": 0.5,
    "crop": 0.5,
    "zoom": 0.5,
    "translation": 0.4,
    "brightness": 0.5,
    "contrast": 0.8,
    "noise": 0.3,
    "cutout": 0.3,
    "mixup": 1.0,
}
each_knob = pytest.mark.parametrize("knob", STRONG)


def changed(x, **knobs):
    return ImageAugment(**knobs)(x, torch.zeros(len(x)))[0]


def gray(*shape):
    """Pixels around the middle, which small changes do not clip."""
    return 0.45 + 0.1 * torch.rand(shape, dtype=torch.float64)


def blob(height, width, row, column):
    """A round spot of which the place is known to a fraction of a pixel."""
    rows, columns = torch.arange(height)[:, None] - row, torch.arange(width) - column
    return (-(rows.double() ** 2 + columns.double() ** 2) / 8).exp()


def place(x):
    """Row and column of the center of mass."""
    mass = x.sum((-1, -2))
    rows, columns = torch.arange(x.shape[-2]), torch.arange(x.shape[-1])
    return (x.sum(-1) * rows).sum(-1) / mass, (x.sum(-2) * columns).sum(-1) / mass


# What each change does.


def test_a_rotation_turns_all_of_an_image_by_one_angle():
    spots = [(10, 20), (20, 28), (25, 10)]  # around the center, (20, 20)
    x = torch.stack([blob(41, 41, *spot) for spot in spots])
    rows, columns = place(changed(x.expand(300, -1, -1, -1), rotation=60))
    there = torch.complex(columns - 20, rows - 20)
    here = torch.tensor([complex(c - 20, r - 20) for r, c in spots], dtype=torch.complex128)
    torch.testing.assert_close(there.abs(), here.abs().expand(300, 3), rtol=0.005, atol=0)
    angles = (there / here).angle().rad2deg()
    torch.testing.assert_close(angles, angles[:, :1].expand(300, 3), rtol=0, atol=0.2)
    assert angles.abs().max() <= 60.2
    assert angles.min() < -55
    assert angles.max() > 55
    assert 30 < angles[:, 0].std() < 40  # 34.6 of a uniform distribution


def test_a_rotation_of_an_oblong_image_keeps_angles():
    x = blob(21, 61, 10, 38).expand(50, 1, -1, -1)
    rows, columns = place(changed(x, rotation=30))
    radius = torch.hypot(rows - 10, columns - 30)
    torch.testing.assert_close(radius, torch.full_like(radius, 8), rtol=0.005, atol=0)


@pytest.mark.parametrize(("knob", "dim"), [("horizontal_flip", -1), ("vertical_flip", -2)])
def test_flips(knob, dim):
    x = torch.rand(200, 3, 5, 4)
    assert torch.equal(changed(x, **{knob: 1.0}), x.flip(dim))
    z = changed(x, **{knob: 0.25})
    flipped, same = (z == x.flip(dim)).all((1, 2, 3)), (z == x).all((1, 2, 3))
    assert (flipped ^ same).all()
    assert 20 < flipped.sum() < 80


def test_a_crop_is_a_part_of_the_image_in_its_proportions():
    rows, columns = torch.meshgrid(torch.arange(40.0), torch.arange(20.0), indexing="ij")
    x = torch.stack([rows, columns])
    z = changed(x.expand(300, -1, -1, -1), crop=0.5, high=40)
    parts = set()
    for image in z:
        (top, left), (bottom, right) = image[:, 0, 0].round().int(), image[:, -1, -1].round().int()
        part = x[None, :, top : bottom + 1, left : right + 1]
        expected = interpolate(part, (40, 20), mode="bilinear", align_corners=True)
        torch.testing.assert_close(image[None], expected, rtol=0, atol=1e-3)
        height, width = bottom - top + 1, right - left + 1
        assert abs(height / 40 - width / 20) <= 0.5 / 40 + 0.5 / 20
        parts.add((int(top), int(left), int(height), int(width)))
    tops, lefts, heights, widths = zip(*parts, strict=True)
    assert (min(heights), max(heights), min(widths), max(widths)) == (20, 40, 10, 20)
    assert (min(tops), min(lefts)) == (0, 0)
    assert max(tops) > 15
    assert max(lefts) > 7


def test_a_small_crop_of_a_constant_image_is_the_image():
    x = torch.full((50, 1, 9, 7), 0.75)
    torch.testing.assert_close(changed(x, crop=0.4), x, rtol=1e-5, atol=0)


def test_a_zoom_changes_the_size_about_the_center():
    x = blob(41, 31, 20, 15).expand(300, 1, -1, -1)
    z = changed(x, zoom=0.5)
    rows, columns = place(z)
    torch.testing.assert_close(rows, torch.full_like(rows, 20), rtol=0, atol=0.05)
    torch.testing.assert_close(columns, torch.full_like(columns, 15), rtol=0, atol=0.05)
    factor = (z.sum((1, 2, 3)) / x.sum((1, 2, 3))).sqrt()
    assert 0.49 < factor.min() < 0.55
    assert 1.45 < factor.max() < 1.51
    assert abs(factor.mean() - 1) < 0.05


def test_a_zoomed_square_stays_a_square():
    x = torch.zeros(1, 1, 16, 16, dtype=torch.float64)
    x[..., 6:10, 6:10] = 1
    z = changed(x.expand(100, -1, -1, -1), zoom=0.9)
    side = z.sum((1, 2, 3)).sqrt()
    middle = z[:, 0, 8]  # a row through the square is as wide as it
    large = side > 3
    torch.testing.assert_close(middle.sum(-1)[large], side[large], rtol=0.05, atol=0)
    assert 7 < side.max() < 7.7


def test_a_translation_moves_the_center_of_mass():
    x = blob(60, 40, 30, 20).expand(400, 1, -1, -1)
    z = changed(x, translation=0.2)
    torch.testing.assert_close(z.sum((1, 2, 3)), x.sum((1, 2, 3)), rtol=1e-3, atol=0)
    down, right = (now - before for now, before in zip(place(z), (30, 20), strict=True))
    for shift, limit in ((down, 12), (right, 8)):
        assert -limit - 0.01 < shift.min() < -0.9 * limit
        assert 0.9 * limit < shift.max() < limit + 0.01
        assert abs(shift.mean()) < 0.15 * limit
    assert abs(torch.corrcoef(torch.cat([down, right], 1).T)[0, 1]) < 0.2


def test_rotation_zoom_and_translation_are_interpolated_once():
    augment = ImageAugment(rotation=30, zoom=0.2, translation=0.1)
    assert len(augment._moves(8, 8)) == 1


def test_brightness_adds_one_number_to_an_image():
    x = 255 * gray(200, 3, 4, 5)
    difference = (changed(x, brightness=0.25, high=255) - x).flatten(1)
    one = difference[:, :1]
    torch.testing.assert_close(difference, one.expand_as(difference), rtol=0, atol=1e-9)
    assert -0.25 * 255 <= one.min() < -0.23 * 255
    assert 0.23 * 255 < one.max() <= 0.25 * 255


@pytest.mark.parametrize(("contrast", "low"), [(0.6, 0.4), (3.0, 0.0)])
def test_contrast_stretches_about_the_mean_of_an_image(contrast, low):
    x = gray(200, 3, 4, 5)
    z = changed(x, contrast=contrast)
    mean = x.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(z.mean((1, 2, 3), keepdim=True), mean)
    factor = ((z - mean) / (x - mean)).flatten(1)
    torch.testing.assert_close(factor, factor[:, :1].expand_as(factor), rtol=1e-6, atol=1e-6)
    assert low - 1e-6 <= factor.min() < low + 0.1
    assert 1 + 0.95 * contrast < factor.max() <= 1 + contrast + 1e-6


def test_noise_has_its_deviation():
    x = 100 * gray(20, 2, 30, 30)
    noise = changed(x, noise=0.05, high=100) - x
    assert abs(noise.mean()) < 0.1
    assert abs(noise.std() - 5) < 0.1
    assert (noise.std((1, 2, 3)) - 5).abs().max() < 0.5


def test_noise_is_clipped():
    black, white = torch.zeros(4, 1, 20, 20), torch.full((4, 1, 20, 20), 2.0)
    z = changed(torch.cat([black, white]), noise=0.1, high=2)
    assert z.min() == 0
    assert z.max() == 2
    assert 0.4 < (z[:4] == 0).float().mean() < 0.6
    assert 0.4 < (z[4:] == 2).float().mean() < 0.6


@pytest.mark.parametrize("share", [0.02, 0.25, 0.8])
@pytest.mark.parametrize(("height", "width"), [(32, 24), (16, 60)])
def test_cutout_sets_a_rectangle_to_0(share, height, width):
    x = 0.5 + torch.rand(500, 3, height, width) / 2
    z = changed(x, cutout=share)
    assert torch.equal(z[z != 0], x[z != 0])
    hole = (z == 0).any(1)
    assert torch.equal(hole, (z == 0).all(1))
    rows, columns = hole.any(2), hole.any(1)
    assert torch.equal(hole, rows[:, :, None] & columns[:, None])
    h, w = rows.sum(1), columns.sum(1)
    assert ((rows[:, 1:] != rows[:, :-1]).sum(1) <= 2).all()  # in one piece
    assert ((columns[:, 1:] != columns[:, :-1]).sum(1) <= 2).all()
    area = share * height * width
    assert ((h - 0.5) * (w - 0.5) <= area).all()
    assert ((h + 0.5) * (w + 0.5) >= area).all()
    assert (
        len({tuple(place) for place in torch.stack([h, w, rows.int().argmax(1)], 1).tolist()}) > 9
    )
    assert rows.any(0).all()  # anywhere in the image
    assert columns.any(0).all()


def test_cutout_comes_after_noise_and_brightness():
    z = changed(torch.full((20, 1, 10, 10), 0.9), cutout=0.25, noise=0.01, brightness=0.1)
    share = (z == 0).float().mean((1, 2, 3))
    assert ((share > 0.15) & (share < 0.4)).all()


def test_pixels_from_outside_are_black():
    z = changed(torch.ones(50, 1, 9, 9), translation=0.4)
    assert (z == 0).flatten(1).any(1).sum() > 25
    assert (z[:, 0, 4, 4] > 0.999).all()


# Mixup.


def test_images_and_labels_mix_by_the_same_lambda():
    x, y = torch.rand(64, 3, 4, 4, dtype=torch.float64), torch.arange(64)
    z, labels = mixup(x, y, 1.0, 64)
    assert (labels >= 0).all()
    torch.testing.assert_close(labels.sum(1), torch.ones(64, dtype=torch.float64))
    torch.testing.assert_close(z, torch.einsum("ij,jchw->ichw", labels, x))
    share = labels.diagonal()
    assert ((labels > 0).sum(1) <= 2).all()
    partner = labels.clone().fill_diagonal_(0).argmax(1)
    alone = share == 1  # the partner of a sample may be itself
    assert alone.sum() < 8
    assert len(partner[~alone].unique()) == len(partner[~alone])  # a permutation
    assert len(share.unique()) > 50  # one lambda for each sample


@pytest.mark.parametrize("alpha", [1e-300, 1e-4, 0.2, 1.0, 8.0, 1e30])
def test_lambda_has_a_beta_distribution(alpha):
    count = 10_000
    _, y = mixup(torch.zeros(count, 1), torch.arange(float(count)).double(), alpha)
    share, _ = mixup(torch.ones(count, 1, dtype=torch.float64), torch.zeros(count), alpha)
    assert torch.equal(share, torch.ones_like(share))  # what is equal stays so
    assert y.min() >= 0
    assert y.max() <= count - 1
    labels = mixup(torch.zeros(count, 1), torch.arange(2).repeat(count // 2), alpha, 2)[1]
    mixed = labels[(labels > 0).all(1)]  # half of the pairs are of one class
    if alpha < 1e-3:
        assert len(mixed) < 0.01 * count  # one of both prevails
    else:
        assert 0.4 * count < len(mixed) < 0.6 * count
        assert abs(mixed[:, 0].mean() - 0.5) < 0.02
        variance = 1 / (4 * (2 * alpha + 1))
        assert abs(mixed[:, 0].double().var() - variance) < 0.06 * variance + 1e-12


def test_targets_of_a_regression_mix():
    x = torch.rand(30, 5)
    z, y = mixup(x, x.sum(1), 0.5)
    torch.testing.assert_close(y, z.sum(1))
    assert not torch.equal(y, x.sum(1))


def test_probabilities_mix():
    given_ = torch.rand(20, 3).softmax(1)
    z, y = ImageAugment(mixup=1.0, classes=3)(given_[:, :, None, None], given_)
    torch.testing.assert_close(z[:, :, 0, 0], y)


def test_mixup_alone_does_not_clip():
    x = torch.linspace(-3, 5, 50)
    z, y = ImageAugment(mixup=0.2)(x.reshape(50, 1, 1, 1), x)
    assert torch.equal(z.flatten(), y)
    assert y.min() < -1
    assert y.max() > 3


def test_labels_of_half_images_are_float32():
    x, y = torch.rand(9, 1, 4, 4, dtype=torch.bfloat16), torch.arange(9) % 3
    for z, labels in (mixup(x, y, 1.0, 3), ImageAugment(mixup=1.0, classes=3)(x, y)):
        assert (z.dtype, labels.dtype) == (torch.bfloat16, torch.float32)


def test_cross_entropy_takes_mixed_labels():
    x, y = ImageAugment(mixup=0.4, classes=3)(torch.rand(9, 3, 1, 1), torch.arange(9) % 3)
    scores = x.flatten(1).requires_grad_()
    loss = cross_entropy(scores, y)
    torch.testing.assert_close(loss, -(y * scores.log_softmax(1)).sum(1).mean())
    loss.backward()
    torch.testing.assert_close(scores.grad, (scores.softmax(1) - y) / 9)


@pytest.mark.parametrize(
    ("x", "y", "alpha", "classes", "message"),
    [
        (torch.zeros(2, 1), torch.zeros(2), 0, None, "`alpha` > 0 and finite, got 0"),
        (torch.zeros(2, 1), torch.zeros(2), float("inf"), None, "`alpha` > 0 and finite, got inf"),
        (torch.zeros(2, 1), torch.zeros(3), 1, None, r"as many samples as `x`, got \(3,\) for"),
        (torch.zeros(2, 1), torch.tensor([0, 1]), 1, None, "expected `classes` with class numbers"),
        (torch.zeros(2, 1), torch.zeros(2, 2).long(), 1, 2, "class numbers `y` of shape"),
        (torch.zeros(2, 1), torch.zeros(2, 3), 1, 2, r"`y` of shape \(N, 2\), got \(2, 3\)"),
        (torch.zeros(2, 1), torch.zeros(2), 1, 2, r"`y` of shape \(N, 2\), got \(2,\)"),
    ],
)
def test_what_does_not_mix_raises(x, y, alpha, classes, message):
    with pytest.raises(ValueError, match=f"mixup: .*{message}"):
        mixup(x, y, alpha, classes)


# Draws.


@each_knob
def test_every_sample_has_its_own_draw(knob):
    image = torch.rand(1, 1, 12, 12).expand(30, -1, -1, -1)
    if knob == "mixup":
        image = torch.rand(30, 1, 12, 12)
    z = changed(image, **{knob: STRONG[knob]})
    different = len(z.flatten(1).unique(dim=0))
    assert different == 2 if "flip" in knob else different > 10


@each_knob
def test_draws_are_torchs_alone(knob):
    x, draws = torch.rand(8, 1, 12, 12), []
    for seed, other in [(1, 5), (1, 6), (2, 6)]:
        torch.manual_seed(seed)
        random.seed(other)
        np.random.seed(other)
        draws.append(changed(x, **{knob: STRONG[knob]}))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_a_saved_state_of_the_generator_repeats_a_batch():
    x, y = torch.rand(8, 1, 12, 12), torch.arange(8)
    augment = ImageAugment(**STRONG, classes=8)
    augment(x, y)
    state = torch.get_rng_state()
    first = augment(x, y)
    torch.set_rng_state(state)
    torch.testing.assert_close(augment(x, y), first, rtol=0, atol=0)


# What holds for all.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_without_a_knob_nothing_happens(dtype):
    x, y = 9 * torch.randn(4, 3, 5, 5).to(dtype), torch.arange(4)
    state = torch.get_rng_state()
    z, labels = ImageAugment(classes=4)(x, y)
    assert z.dtype == dtype
    assert torch.equal(z, x)
    assert torch.equal(labels, y)
    assert labels.dtype == y.dtype
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_knob
def test_half_is_computed_in_float32_and_rounded_once(knob, dtype):
    x, draws = torch.rand(6, 3, 9, 7).to(dtype), []
    for image in (x, x.float()):
        torch.manual_seed(1)
        draws.append(changed(image, **{knob: STRONG[knob]}))
    assert torch.equal(draws[0], draws[1].to(dtype))


@st.composite
def augmentations(draw):
    knobs = {
        name: draw(st.just(0) | st.floats(0, min(limit, 3), exclude_max=not included))
        for name, (limit, included) in LIMITS.items()
    }
    knobs["rotation"] *= 60
    return ImageAugment(**knobs, high=draw(st.sampled_from([1.0, 16.0, 255.0])), classes=5)


@settings(deadline=None, max_examples=50)
@given(
    augmentations(),
    st.tuples(st.integers(0, 5), st.sampled_from([1, 2, 3]), st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.booleans(),
    st.integers(0, 99),
)
def test_shape_type_and_range_are_kept(augment, shape, dtype, probabilities, seed):
    torch.manual_seed(seed)
    x = (augment.high * torch.rand(shape)).to(dtype)
    y = torch.randint(0, 5, shape[:1])
    if probabilities:
        y = torch.rand(len(x), 5).softmax(1)
    x_before, y_before = x.clone(), y.clone()
    z, labels = augment(x, y)
    assert (z.shape, z.dtype, z.device) == (x.shape, x.dtype, x.device)
    assert torch.equal(x, x_before)
    assert torch.equal(y, y_before)
    assert ((z >= 0) & (z <= augment.high)).all()  # no NaN either
    if labels.is_floating_point():
        assert labels.shape == (len(x), 5)
        assert (labels >= 0).all()
        torch.testing.assert_close(labels.sum(1), torch.ones(len(x), dtype=labels.dtype))
    else:
        assert torch.equal(labels, y)


@each_knob
def test_other_layouts_of_memory(knob):
    x = torch.rand(6, 3, 8, 5)
    torch.manual_seed(3)
    expected = changed(x, **{knob: STRONG[knob]})
    torch.manual_seed(3)
    z = changed(x.contiguous(memory_format=torch.channels_last), **{knob: STRONG[knob]})
    if knob != "noise":  # which fills memory in its order
        torch.testing.assert_close(z, expected)


def test_it_is_no_module_and_can_be_copied():
    augment = ImageAugment(**STRONG)
    assert not isinstance(augment, torch.nn.Module)
    assert pickle.loads(pickle.dumps(augment)) == copy.deepcopy(augment) == augment


def test_options_name_every_knob_and_its_range():
    fields = [field.name for field in dataclasses.fields(ImageAugment)]
    assert [*OPTIONS, "high", "classes"] == fields
    assert list(LIMITS) == list(OPTIONS)
    for name, text in OPTIONS.items():
        limit, included = LIMITS[name]
        assert text.endswith(f", in [0, {limit}" + ("]" if included else ")"))


# Errors.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rotation": -1}, r"`rotation` in \[0, 180\], got -1"),
        ({"rotation": 180.5}, r"`rotation` in \[0, 180\], got 180.5"),
        ({"horizontal_flip": 1.1}, r"`horizontal_flip` in \[0, 1\], got 1.1"),
        ({"vertical_flip": float("nan")}, r"`vertical_flip` in \[0, 1\], got nan"),
        ({"crop": 1.0}, r"`crop` in \[0, 1\), got 1.0"),
        ({"zoom": 1}, r"`zoom` in \[0, 1\), got 1"),
        ({"translation": 1}, r"`translation` in \[0, 1\), got 1"),
        ({"brightness": -0.1}, r"`brightness` in \[0, inf\), got -0.1"),
        ({"contrast": float("inf")}, r"`contrast` in \[0, inf\), got inf"),
        ({"noise": float("nan")}, r"`noise` in \[0, inf\), got nan"),
        ({"cutout": 1}, r"`cutout` in \[0, 1\), got 1"),
        ({"mixup": float("inf")}, r"`mixup` in \[0, inf\), got inf"),
        ({"high": 0}, "`high` > 0 and finite, got 0"),
        ({"classes": 0}, "`classes` >= 1, got 0"),
    ],
)
def test_arguments_out_of_range_raise(arguments, message):
    with pytest.raises(ValueError, match=f"ImageAugment: expected {message}"):
        ImageAugment(**arguments)


def test_limits_that_are_allowed():
    ImageAugment(rotation=180, horizontal_flip=1, vertical_flip=1)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(2, 3, 3), torch.zeros(2), r"of shape \(N, C, H, W\), got \(2, 3, 3\)"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.zeros(2), "floating .* of torch.uint8"),
        (torch.zeros(2, 1, 3, 3), torch.zeros(3), r"`y` of as many .*, got \(3,\) for \(2, 1"),
        (torch.zeros(2, 1, 3, 3), torch.tensor(1), r"`y` of as many .*, got \(\) for \(2, 1"),
    ],
)
def test_batches_that_make_no_sense_raise(x, y, message):
    with pytest.raises(ValueError, match=f"ImageAugment: expected .*{message}"):
        ImageAugment()(x, y)


def test_without_kornia_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia", None)
    with pytest.raises(
        ImportError, match=r"kornia is missing: pip install 'torchref-triton\[train"
    ):
        ImageAugment()


def test_kornia_is_imported_when_needed():
    code = "import sys, torchref.data.augment.image; sys.exit('kornia' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# The picture.


@pytest.mark.parametrize(
    ("shape", "columns"), [((10, 1, 8, 8), 8), ((3, 3, 28, 28), 3), ((1, 1, 4, 9), 1)]
)
def test_a_picture_has_a_column_for_each_of_eight_images(shape, columns, tmp_path):
    x, y = 16 * torch.rand(shape), torch.arange(len(torch.empty(shape)))
    augment = ImageAugment(**STRONG, high=16, classes=10)
    before, state = x.clone(), torch.get_rng_state()
    save_picture(augment, x, y, tmp_path / "picture.png")
    assert torch.equal(torch.get_rng_state(), state)  # a picture changes no run
    assert torch.equal(x, before)
    image = matplotlib.image.imread(tmp_path / "picture.png")
    assert abs(image.shape[1] - 120 * (1.1 * columns + 1)) < 2


def test_a_picture_shows_originals_and_what_became_of_them(tmp_path, monkeypatch):
    from torchref.data.augment import image

    shown = []
    monkeypatch.setattr(image, "_show", lambda _, pixels: shown.append(pixels))
    x, y = 2 * torch.rand(2, 1, 4, 4, dtype=torch.float16), torch.rand(2)
    save_picture(ImageAugment(horizontal_flip=1.0, high=2), x, y, tmp_path / "picture.png", 2)
    expected = torch.cat([x, *4 * [x.flip(-1)]]).float() / 2
    assert torch.equal(torch.stack(shown), expected)


@pytest.mark.parametrize("shape", [(0, 1, 4, 4), (2, 2, 4, 4), (1, 4, 4)])
def test_what_has_no_picture_raises(shape, tmp_path):
    with pytest.raises(ValueError, match="save_picture: expected `x` of shape"):
        save_picture(ImageAugment(), torch.zeros(shape), torch.zeros(2), tmp_path / "picture.png")
