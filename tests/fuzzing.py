"""What the fuzz tests draw, tensors that print as what they were made of, and how they compare."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import torchref
from torchref.testing import Comparison, measure_parity

KERNELS = torchref.get_backend() == "triton"
# A kernel leaves float64 to the formula, which other processes try.
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64][: 3 if KERNELS else 4]
# None, one, small ones, primes, and around what blocks, vectors and warps divide.
SIZES = [0, 1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 31, 32, 33, 63, 64, 65, 67, 127, 128, 129]
SIZES += [255, 256, 257, 509, 512, 513, 1023, 1024, 1025, 1031]
ELEMENTS = 1100  # in a tensor: the interpreter takes a millisecond for a block
REFUSALS = (RuntimeError, ValueError, TypeError, IndexError)
ONCE = 0.25  # the share of the values of a tensor that are special


@dataclass(frozen=True)
class Draw:
    """A tensor, by what it takes to make it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    values: str = "normal"
    layout: str = "contiguous"
    requires_grad: bool = False
    seed: int = 0

    def tensor(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        x = VALUES[self.values](self.shape, self.dtype, generator).to(self.dtype)
        return LAYOUTS[self.layout](x).requires_grad_(self.requires_grad)


@dataclass(frozen=True)
class Indices:
    """Classes, of which some are ``ignored``."""

    shape: tuple[int, ...]
    classes: int
    ignored: int | None = None
    dtype: torch.dtype = torch.int64
    layout: str = "contiguous"
    seed: int = 0

    def tensor(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randint(max(self.classes, 1), self.shape, generator=generator)
        if self.ignored is not None:
            x = torch.where(torch.rand(self.shape, generator=generator) < ONCE, self.ignored, x)
        return LAYOUTS[self.layout](x.to(self.dtype))


@dataclass(frozen=True)
class Call:
    """A call of ours and of what it must equal."""

    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    upstream: Draw | None = None

    def made(self) -> tuple[list[Any], dict[str, Any]]:
        return [_made(x) for x in self.args], {k: _made(x) for k, x in self.kwargs.items()}

    def check(self) -> None:
        """Refused by both, or computed alike."""
        with quiet():
            y, error = self._outcome(self.theirs)
            if error is not None:
                y, refused = self._outcome(self.ours)
                assert refused is not None, f"torch raises {error!r}, ours returns {y}"
                return
            upstream = None
            if self.upstream is not None:
                upstream = replace(self.upstream, shape=tuple(y.shape)).tensor()
            self._check_parity(upstream)

    def check_refusal(self, piece: str) -> None:
        """Refused in words of ours, or computed alike."""
        with quiet():
            _, error = self._outcome(self.ours)
        if error is None:
            self.check()
        else:
            name = str(error).partition(":")[0]  # a piece may speak through a part of it
            assert name, f"{piece} says {error!r}"
            assert name in piece, f"{piece} says {error!r}"

    def _outcome(self, f: Callable[..., Any]) -> tuple[Any, Exception | None]:
        args, kwargs = self.made()
        try:
            with torch.random.fork_rng():
                return self._shifted(f)(*args, **kwargs), None
        except REFUSALS as error:
            return None, error

    def _check_parity(self, upstream: Tensor | None) -> None:
        args, kwargs = self.made()
        pair = self._shifted(self.ours), self._shifted(self.theirs)
        options = {"upstream": upstream, "strides": False}
        wrong = [c for c in measure_parity(*pair, *args, **options, **kwargs) if c.problem]
        if any(math.isfinite(c.error) for c in wrong):
            moved = self._moved_by_roundings(args, kwargs, upstream)
            wrong = [c for c in wrong if not c.error <= c.bound + moved.get(c.name, 0) + _step(c)]
        assert not wrong, "\n".join(c.problem for c in wrong)

    def _moved_by_roundings(
        self, args: list[Any], kwargs: dict[str, Any], upstream: Tensor | None
    ) -> dict[str, float]:
        """How far the truth moves with a few roundings of the inputs, of the upstream one too.

        Of drawn inputs nobody has seen to it that they do not cancel. What then is left of a
        result is no measure of its error, and nor is torch's own error, which may happen to be 0.
        """
        theirs = self._shifted(self.theirs)
        eps = max(
            rounding(x.dtype) for x in args if isinstance(x, Tensor) and x.is_floating_point()
        )
        args, kwargs = [_wide(x) for x in args], {k: _wide(x) for k, x in kwargs.items()}
        moved: dict[str, float] = {}
        for number in range(4):
            nudged = partial(_nudged, theirs, eps, number)
            for c in measure_parity(nudged, theirs, *args, upstream=upstream, **kwargs):
                moved[c.name] = max(moved.get(c.name, 0), c.error)
        return moved

    def _shifted(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """``f``, on tensors that begin in the middle of their memory where the draw says so."""
        shifts = [getattr(x, "layout", None) == "offset" for x in self.args]
        if not any(shifts):
            return f

        def shifted(*args: Any, **kwargs: Any) -> Any:
            pairs = zip(args, shifts, strict=True)
            return f(*(_from_the_middle(x) if shift else x for x, shift in pairs), **kwargs)

        return shifted


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of shapes that broadcast, of nothing to fill
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of a row of NaN
        yield


def rounding(dtype: torch.dtype) -> float:
    """As in the bound of parity: a half result is rounded once, another one a few times."""
    return (1 if dtype.itemsize == 2 else 8) * torch.finfo(dtype).eps


def _step(c: Comparison) -> float:
    """A few of the steps between subnormal numbers, which are as far apart as at the smallest."""
    return rounding(c.dtype) * torch.finfo(c.dtype).tiny if c.dtype.is_floating_point else 0.0


_factors: list[Callable[[Tensor], Tensor | float]] = []


def keep(*kept: Tensor) -> None:
    """Say of what a function keeps for its next step that it is rounded there, too."""
    for x in kept:
        for factor in _factors:
            x.mul_(factor(x))


def _nudged(f: Callable[..., Any], eps: float, number: int, /, *args: Any, **kwargs: Any) -> Any:
    """``f`` with inputs and outputs down by ``2 * eps`` here and there; everywhere for number 0.

    And with what it says to :func:`keep`. Roundings go both ways, but what goes up may leave the
    probabilities.
    """
    generator = torch.Generator().manual_seed(number)

    def factor(x: Tensor) -> Tensor | float:
        where = torch.randint(2, x.shape, generator=generator, dtype=x.dtype)
        return 1 - 2 * eps * (where if number else 1)

    def nudge(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        # in place, for what f writes to it must be seen afterwards
        return x * factor(x) if x.requires_grad else x.mul_(factor(x))

    _factors.append(factor)
    try:
        y = f(*map(nudge, args), **{k: nudge(x) for k, x in kwargs.items()})
    finally:
        _factors.pop()
    if isinstance(y, tuple):
        return tuple(t * factor(t) if t.is_floating_point() else t for t in y)
    return y * factor(y)


def _made(x: Any) -> Any:
    return x.tensor() if isinstance(x, Draw | Indices) else x


def _wide(x: Any) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    x64 = x.detach().double().clone(memory_format=torch.contiguous_format)
    return x64.requires_grad_(x.requires_grad)


def _from_the_middle(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x.reshape(-1), (3, 0))[3:].view(x.shape)


def _normal(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _sprinkled(*values: float) -> Callable[..., Tensor]:
    """Normal numbers, some of which are among ``values``."""

    def make(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        x = _normal(shape, dtype, generator)
        which = torch.tensor(values, dtype=torch.float64)[
            torch.randint(len(values), shape, generator=generator)
        ]
        return torch.where(torch.rand(shape, generator=generator) < ONCE, which, x)

    return make


def _probabilities(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    return _sprinkled(-math.inf, math.inf)(shape, dtype, generator).mul(3).sigmoid()


# float64 tensors of a shape, a type that they will have, and a generator.
VALUES: dict[str, Callable[..., Tensor]] = {
    "normal": _normal,
    "wide": lambda *a: _normal(*a) * 100,
    "large": lambda *a: _normal(*a) * min(math.sqrt(torch.finfo(a[1]).max) / 8, 1e15),
    "subnormal": lambda *a: _normal(*a) * torch.finfo(a[1]).tiny,
    "whole": lambda *a: _normal(*a).mul(2).round(),  # ties, and zeros of both signs
    "equal": lambda *a: torch.ones(a[0], dtype=torch.float64),
    "infinite": _sprinkled(math.inf, -math.inf),
    "special": _sprinkled(math.inf, -math.inf, math.nan),
    "probabilities": _probabilities,
    "positive": lambda *a: _normal(*a).abs() + 0.1,
}
FINITE = ["normal", "wide", "large", "subnormal", "whole", "equal"]
NO_NAN = [*FINITE, "infinite"]
ANY = [*NO_NAN, "special"]


def _reversed(x: Tensor) -> Tensor:
    order = list(reversed(range(x.ndim)))
    return x.permute(order).contiguous().permute(order)


def _channels_last(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats.get(x.ndim, torch.contiguous_format))


def _stepped(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1).flatten(-2)[..., ::2] if x.ndim else x


def _expanded(x: Tensor, dim: int) -> Tensor:
    return x.narrow(dim, 0, 1).expand(x.shape) if x.ndim and x.shape[dim] else x


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "reversed": _reversed,
    "transposed": lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
    "channels_last": _channels_last,
    "stepped": _stepped,
    "expanded rows": lambda x: _expanded(x, 0),
    "expanded columns": lambda x: _expanded(x, -1),
    "offset": lambda x: x,  # see Call._shifted
}

seeds = st.integers(0, 2**16)
layouts = st.one_of(st.just("contiguous"), st.sampled_from(list(LAYOUTS)))
# those of what is written to
writable = layouts.filter(lambda layout: not layout.startswith("expanded"))
# those that a clone keeps
dense = writable.filter(lambda layout: layout != "stepped")
dtypes = st.sampled_from(DTYPES)
flags = st.booleans()


@st.composite
def shapes(draw, least: int = 0, most: int = 4, elements: int = ELEMENTS) -> tuple[int, ...]:
    shape: list[int] = []
    for _ in range(draw(st.integers(least, most))):
        room = elements // max(1, math.prod(shape))
        shape.append(draw(st.sampled_from([n for n in SIZES if n <= room])))
    return tuple(draw(st.permutations(shape)))


@st.composite
def tensors(
    draw,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    values: list[str] = FINITE,
    requires_grad: bool | None = None,
    layouts: st.SearchStrategy[str] = layouts,
) -> Draw:
    if requires_grad is None:
        requires_grad = draw(flags)
    kind = draw(st.one_of(st.just(values[0]), st.sampled_from(values)))
    return Draw(shape, dtype, kind, draw(layouts), requires_grad, draw(seeds))


def upstreams(dtype: torch.dtype) -> st.SearchStrategy[Draw]:
    # no subnormal ones: they are rounded by as much as larger ones are, and then multiplied
    return tensors((), dtype, [v for v in FINITE if v != "subnormal"], False)
