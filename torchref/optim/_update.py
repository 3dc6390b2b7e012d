"""What the optimizers share: the choice of implementation, and in-place arithmetic.

An update computes in its state tensors. It computes in copies, written back at the end, where
autograd saves values that the next operation would overwrite, where an overflow may yet undo the
step, and for half types, which are computed in float32 and rounded once.
"""

# torch._foreach_* is how torch.optim itself works on lists; it has no public name.
# pyright: reportPrivateImportUsage=false

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeGuard, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from torchref.autograd import opmath
from torchref.compilation import can_compile, compiled_variant, kind, traced
from torchref.dispatch import get_backend, is_plain
from torchref.internals import (
    default_to_fused_or_foreach,
    devices_of_graphs,
    grouped_by_device_and_dtype,
)

# A hyperparameter: a number, or a tensor of one element where torch allows it.
Scalar = float | Tensor

Tensors = Sequence[Tensor | None]

BATCH = 16  # tensors in a call of a compiled update: a compilation of some seconds, once
WORTH_ALL_THREADS = 2**16  # elements


class Row(NamedTuple):
    """What a step reads and writes for one parameter; None for what is not in use."""

    param: Tensor
    grad: Tensor
    states: tuple[Tensor | None, ...]  # in the order of the optimizer's update
    step: Tensor | None = None  # how many steps are done
    starts: bool = False  # the state has seen no gradient yet
    ema: Tensor | None = None
    ema_step: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The arguments that an update begins with."""
        return (self.param, self.grad, *self.states)

    def map(self, f: Callable[[Tensor], Tensor]) -> "Row":
        """The row with ``f`` of each of its tensors but the counts."""
        states = tuple(None if x is None else f(x) for x in self.states)
        ema = None if self.ema is None else f(self.ema)
        return self._replace(param=f(self.param), grad=f(self.grad), states=states, ema=ema)


def as_real(rows: list[Row]) -> list[Row]:
    """The rows, with complex tensors as real ones of one more dimension."""
    if any(row.param.is_complex() for row in rows):
        return [row.map(lambda x: torch.view_as_real(x) if x.is_complex() else x) for row in rows]
    return rows


def alike(rows: list[Row]) -> list[list[list[Any]]]:
    """Parameters, gradients, each state and the steps as lists, for each device and type."""
    states = [list(column) for column in zip(*(row.states for row in rows), strict=True)]
    columns = [[row.param for row in rows], [row.grad for row in rows], *states]
    columns.append([row.step for row in rows])
    lists = [[] if column[0] is None else column for column in columns]
    groups = grouped_by_device_and_dtype(lists)
    return [cast(list[list[Any]], part) for part, _ in groups.values()]


def by_device_and_dtype(tensors: list[Tensor]) -> list[list[Tensor]]:
    """The tensors, split so that in each part all share device and type."""
    groups = grouped_by_device_and_dtype([tensors])
    return [cast(list[Tensor], part[0]) for part, _ in groups.values()]


def runs_foreach(
    rows: list[Row], group: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None
) -> bool:
    """Whether an update takes whole lists of tensors (``torch._foreach_*``) or one at a time.

    Torch's choice, with three exceptions that go one at a time: half types, whose float32 copies
    would otherwise exist for all parameters at once; a step that GradScaler may yet undo; and the
    compiled backend, which brings its own pass over lists.
    """
    foreach, differentiable = group["foreach"], group["differentiable"]
    if foreach is None and group.get("fused") is None:
        params = [row.param for row in rows]
        _, foreach = default_to_fused_or_foreach(params, differentiable, use_fused=False)
        if isinstance(group["lr"], Tensor) and not group.get("capturable"):
            foreach = False  # as torch: lists take their scale from the host
    if not foreach or differentiable or grad_scale is not None or found_inf is not None:
        return False
    if any(row.param.dtype in (torch.float16, torch.bfloat16) for row in rows):
        return False
    # Dynamo cannot trace the look at the backend, and needs none: it compiles the formula anyway.
    return torch.compiler.is_compiling() or get_backend() != "compiled"


def update_each(
    update: Callable[..., None],
    rows: list[Row],
    arguments: list[tuple[Any, ...]],
    group: dict[str, Any],
) -> None:
    """``update(*row.tensors(), *arguments)`` for each row and its arguments.

    Rows that may share a call of the compiled update have one tuple of arguments between them.
    """
    if rows and _runs_compiled(rows, group):
        rows, arguments = _update_compiled(update, rows, arguments)
    for row, args in zip(rows, arguments, strict=True):
        update(*row.tensors(), *args)


def _runs_compiled(rows: list[Row], group: dict[str, Any]) -> bool:
    """Whether updates are compiled: under that backend, and under ``fused=True`` on the CPU."""
    if torch.compiler.is_compiling() or group["differentiable"]:
        return False
    choice = get_backend()
    if choice == "auto" and group.get("fused"):
        return rows[0].param.is_cpu and can_compile()
    return choice == "compiled"


def _update_compiled(
    update: Callable[..., None], rows: list[Row], arguments: list[tuple[Any, ...]]
) -> tuple[list[Row], list[tuple[Any, ...]]]:
    """Update as many rows as one compilation serves, and return the others."""
    if not is_plain(()):
        return rows, arguments
    batches: dict[Any, tuple[list[Tensors], tuple[Any, ...]]] = {}
    written: list[Tensor] = []
    left = []
    for row, args in zip(rows, arguments, strict=True):
        tensors = row.tensors()
        given = [x for x in tensors if x is not None]
        # Sizes of 0 and 1 would each take a compilation of their own.
        if row.param.numel() < 2 or not _are_vectors(given):
            left.append((row, args))
            continue
        types = tuple([None if x is None else x.dtype for x in tensors])
        states = [None if x is None else _kept_vector(x) for x in row.states]
        vectors = [_kept_vector(row.param), _vector(row.grad), *states]
        batches.setdefault((types, row.param.device, id(args)), ([], args))[0].append(vectors)
        written += given
    for (types, device, _), (tensors, args) in batches.items():
        run = _compiled(update, types, device, args)
        numbers = [traced(arg) for arg in args]
        tensors.sort(key=_size)  # batches of like sizes run 5% faster than mixed ones
        tensors += _padding(types, device)[: -len(tensors) % BATCH]
        for i in range(0, len(tensors), BATCH):
            run(update, tensors[i : i + BATCH], *numbers)
    if written:
        torch.autograd.graph.increment_version(written)
    return [row for row, _ in left], [args for _, args in left]


def _size(tensors: Tensors) -> int:
    assert tensors[0] is not None
    return tensors[0].numel()


def _compiled(
    update: Callable[..., None], types: tuple[Any, ...], device: torch.device, args: tuple[Any, ...]
) -> Callable[..., None]:
    """The compilation of a batch of updates for tensors of these types."""
    run, is_new = compiled_variant(_update_batch, (update, types, device, *map(kind, args)))
    if is_new:
        run(update, _examples(types, device, WORTH_ALL_THREADS), *map(traced, args))
    return run


def _update_batch(update: Callable[..., None], batch: list[Tensors], *args: Any) -> None:
    for tensors in batch:
        update(*tensors, *args)


def _examples(
    types: tuple[torch.dtype | None, ...], device: torch.device, least: int
) -> list[Tensors]:
    """A batch to be compiled on, of large tensors, or small ones to fill a batch up.

    The compiler looks at sizes, though it leaves them open: it takes equal ones for always equal,
    and gives a loop over few elements to one thread.
    """

    def example(size: int, dtype: torch.dtype | None) -> Tensor | None:
        return None if dtype is None else torch.zeros(size, dtype=dtype, device=device)

    return [[example(size, dtype) for dtype in types] for size in range(least, least + BATCH)]


@functools.lru_cache(64)
def _padding(types: tuple[torch.dtype | None, ...], device: torch.device) -> list[Tensors]:
    return _examples(types, device, 2)


def _are_vectors(tensors: list[Tensor]) -> bool:
    """Whether all hold plain memory from first to last, in one order."""
    contiguous = True
    for x in tensors:
        if type(x) not in (Tensor, Parameter) or x.layout is not torch.strided or x.is_neg():
            return False
        contiguous = contiguous and x.is_contiguous()
    if contiguous:
        return True
    strides = tensors[0].stride()
    return is_dense(tensors[0]) and all(x.stride() == strides for x in tensors)


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill a stretch of memory, each once, in whatever order."""
    order = sorted(range(x.ndim), key=x.stride, reverse=True)
    return x.permute(order).is_contiguous()


def _vector(x: Tensor) -> Tensor:
    """An alias of one dimension, so that one compilation serves all ranks."""
    # `.data`, for Dynamo guards on the rank of a view's base
    if x.ndim == 1:
        return x.data
    return x.view(-1).data if x.is_contiguous() else x.as_strided((x.numel(),), (1,)).data


def _kept_vector(x: Tensor) -> Tensor:
    """The same for a tensor that is there at each step: making one takes longer than finding it."""
    key = id(x)
    kept = _vectors.get(key)
    if kept is None or kept[0]() is not x:
        kept = weakref.ref(x, lambda _: _vectors.pop(key, None)), _vector(x)
    elif kept[1].data_ptr() != x.data_ptr() or kept[1].numel() != x.numel():
        kept = kept[0], _vector(x)
    _vectors[key] = kept
    return kept[1]


_vectors: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}


def check_capturable(rows: list[Row], group: dict[str, Any]) -> None:
    """Raise torch's error where ``capturable=True`` meets tensors no graph can capture."""
    if torch.compiler.is_compiling() or not group["capturable"]:
        return
    devices = devices_of_graphs()
    for row in rows:
        kinds = row.param.device.type, cast(Tensor, row.step).device.type
        if kinds[0] != kinds[1] or kinds[0] not in devices:
            raise AssertionError(
                "If capturable=True, params and state_steps must be on supported devices: "
                f"{devices}."
            )


def advance(steps: Tensors) -> None:
    """Count one step."""
    counts = [step for step in steps if step is not None]
    if counts and counts[0].is_cpu and not torch.compiler.is_compiling():
        # A tensor, or the list operation would wrap the number once for each step.
        torch._foreach_add_(counts, torch.tensor(1.0), alpha=1.0)
    elif counts:
        torch._foreach_add_(counts, 1)


def uncount(steps: Tensors, found_inf: Tensor | None) -> None:
    """Take the count back where the gradients overflowed."""
    if found_inf is not None:
        for step in steps:
            if step is not None:
                step.sub_((found_inf > 0).to(step))


def to_scalar(value: Scalar) -> Scalar:
    """A hyperparameter; as a tensor of no dimensions where it is one of one element."""
    return value.squeeze() if isinstance(value, Tensor) and value.ndim else value


def step_number(step: Tensor) -> Scalar:
    """The step as a number where that costs no host sync, else a float64 tensor.

    In float32, 1 - 0.999 ** step loses four digits.
    """
    if step.is_cpu and not torch.compiler.is_compiling():
        return step.item()
    return step.double()


def on_device(flag: Tensor | None, device: torch.device) -> Any:
    return None if flag is None else flag.to(device, non_blocking=True)


def workspace(state: list[Any], found_inf: Tensor | None, differentiable: bool) -> list[Any]:
    """What the update computes in: the state itself, or copies; see the module's docstring."""
    copies = differentiable or found_inf is not None
    if not copies and state[0].dtype in (torch.float32, torch.float64):
        return list(state)
    return [
        None if x is None else opmath(x).clone() if copies and opmath(x) is x else opmath(x)
        for x in state
    ]


def store(state: Tensors, work: Tensors, found_inf: Tensor | None) -> None:
    """Write copies back to the state, except where the gradients overflowed."""
    for x, new in zip(state, work, strict=True):
        if x is not None and new is not None and new is not x:
            x.copy_(new if found_inf is None else torch.where(found_inf > 0, x, new))


def unscaled(
    grad: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None, clip: Tensor | None
) -> Tensor:
    """The gradient without its loss scale, which torch's fused updates also store in ``grad``.

    Clipped, too, by the factor ``clip``, but that ``grad`` does not show.
    """
    g = opmath(grad)
    if grad_scale is not None:
        g = g / grad_scale
        store([grad], [g], found_inf)
    return g if clip is None else g * clip


def add(x: Tensor, y: Tensor, scale: Scalar) -> Tensor:
    """``x + scale * y``; ``y`` may change in place afterwards."""
    return x.add(y, alpha=scale) if is_number(scale) else x + y.clone() * scale


def add_(x: Tensor, y: Tensor, scale: Scalar) -> Tensor:
    """``x += scale * y``."""
    return x.add_(y, alpha=scale) if is_number(scale) else x.add_(y * scale)


def foreach_add_(x: list[Tensor], y: list[Tensor], scale: Scalar) -> None:
    """``x += scale * y`` on lists."""
    if is_number(scale):
        torch._foreach_add_(x, y, alpha=scale)
    else:
        torch._foreach_add_(x, torch._foreach_mul(y, cast(Tensor, scale)))


def addcmul_(x: Tensor, a: Tensor, b: Tensor, scale: Scalar) -> Tensor:
    """``x += scale * a * b``."""
    if is_number(scale):
        return x.addcmul_(a, b, value=scale)
    return x.add_(a * scale * b)


def addcdiv_(x: Tensor, a: Tensor, b: Tensor, scale: Scalar) -> Tensor:
    """``x += scale * a / b``."""
    if is_number(scale):
        return x.addcdiv_(a, b, value=scale)
    return x.add_(a * scale / b)


def weight(scale: Scalar, x: Tensor) -> Any:
    """``scale`` as :meth:`torch.Tensor.lerp_` on ``x`` takes it: a number, or a tensor like x."""
    return scale.to(x.device, x.dtype) if isinstance(scale, Tensor) else scale


def is_number(scale: Scalar) -> TypeGuard[float]:
    """Whether torch may read the scale on the host: free, and neither traced nor differentiated."""
    return not isinstance(scale, Tensor) or (
        scale.is_cpu and not scale.requires_grad and not torch.compiler.is_compiling()
    )


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What brings gradients of a norm to ``max_norm``; clamped, as a test would wait for it."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def average(rows: list[Row], group: dict[str, Any], found_inf: Tensor | None) -> None:
    """Take the parameters, after their step, into the averages of those rows that have one."""
    rows = [row for row in rows if row.ema is not None]
    steps = [row.ema_step for row in rows]
    advance(steps)
    for row, step in zip(rows, steps, strict=True):
        ema = cast(Tensor, row.ema)
        gain = _ema_gain(step_number(cast(Tensor, step)), group)
        value = row.param.detach().to(ema.dtype)
        if found_inf is None:
            ema.lerp_(value, weight(gain, ema))
        else:
            store([ema], [ema.lerp(value, weight(gain, ema))], found_inf)
    uncount(steps, found_inf)


def _ema_gain(step: Scalar, group: dict[str, Any]) -> Scalar:
    """The share of a new value: all for the first, then 1 - d, or corrected for bias."""
    decay = group["ema_decay"]
    if isinstance(step, Tensor):
        total = 1 - decay**step if group.get("ema_bias_correction") else 1.0
        return torch.where(step == 1, 1.0, (1 - decay) / total)
    if step == 1:
        return 1.0
    return (1 - decay) / (1 - decay**step) if group.get("ema_bias_correction") else 1 - decay
