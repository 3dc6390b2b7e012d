"""Steps, norms and clipping of all tensors in one launch: which tensors, and where they are.

A kernel takes dense tensors of float32, float16 and bfloat16 on a GPU, a parameter's all laid out
alike, and the shard that a :class:`torch.distributed.tensor.DTensor` has in this process. The rest
is for the formula: complex, sparse and float64 tensors, those of other subclasses, and steps that
autograd records.
"""

from collections.abc import Sequence
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from torchref.dispatch import KERNEL_DTYPES, find_kernel, get_backend, is_plain, kernel_for
from torchref.internals import local_part
from torchref.optim._update import Row, is_dense, on_device

if TYPE_CHECKING:
    from torchref.optim._optimizer import Optimizer

STATES = 3  # columns for them in the kernel's tables


class StepInOneLaunch:
    """The tensors of a step, kept for the next one: only gradients may move in between.

    One launch for all whose parameters, gradients and states share device and types.
    """

    def __init__(self, optimizer: "Optimizer", rows: list[tuple[int, Row]], name: str) -> None:
        """``rows`` with the number of the group of each."""
        self.name = name
        self.backend = get_backend()
        self.state = optimizer.state
        self.params = _params(optimizer)
        self.structure = _structure(optimizer)
        self.paused = [p.grad is None for p in self.params]
        self.groups = sorted({group for group, _ in rows})
        self.sharded = any(local(p) is not p for p in self.params)
        self.kept = self._kept(optimizer)
        parts: dict[Any, list[int]] = {}
        for i, (_, row) in enumerate(rows):
            state = next((x.dtype for x in row.states if x is not None), torch.float32)
            kind = row.param.device, row.param.dtype, row.grad.dtype, state
            parts.setdefault(kind, []).append(i)
        self.parts = [_Part(optimizer, indices, rows) for indices in parts.values()]
        self.looks = _looks([row.grad for _, row in rows])
        self.layout = _layout(self.params)

    def holds(self, optimizer: "Optimizer") -> bool:
        """Whether everything but gradients is where it was; then the parts hold today's."""
        if get_backend() != self.backend or not is_plain(()):
            return False
        params = _params(optimizer)
        if optimizer.state is not self.state or not _same(params, self.params):
            return False
        if self.layout != _layout(params):
            return False
        grads = [p.grad for p in params]
        if self.paused != [g is None for g in grads] or self.structure != _structure(optimizer):
            return False
        if not _same(self._kept(optimizer), self.kept):
            return False
        live = [g if type(g) is Tensor else local(g) for g in grads if g is not None]
        if self.looks != _looks(live):
            return False
        return all(part.holds(live) for part in self.parts)

    def _kept(self, optimizer: "Optimizer") -> list[Any]:
        """Everything in the state of the parameters; of what is sharded, also the shards."""
        state, params = optimizer.state, self.params
        kept = [x for p in params for x in state.get(p, _NO_STATE).values()]
        return [*kept, *map(local, kept), *map(local, params)] if self.sharded else kept

    def load(self, optimizer: "Optimizer") -> None:
        """Tell the device where the tensors are and what the hyperparameters are by now."""
        groups = optimizer.param_groups
        taken = {i: optimizer._numbers(groups[i]) for i in self.groups}
        nothing = (0.0,) * len(taken[self.groups[0]])
        numbers = [taken.get(i, nothing) for i in range(len(groups))]
        for part in self.parts:
            part.load(numbers)

    def norms(self, grad_scale: Tensor | None) -> list[Tensor]:
        """The norm of each part's gradients."""
        grad_norm = kernel("grad_norm")
        return [grad_norm(part.tables, on_device(grad_scale, part.device)) for part in self.parts]

    def step(
        self, grad_scale: Tensor | None, found_inf: Tensor | None, norm: Tensor | None
    ) -> None:
        launch = kernel(self.name)
        for part in self.parts:
            flags = (on_device(x, part.device) for x in (grad_scale, found_inf, norm))
            launch(part.tables, *flags)
            # Autograd does not see what a kernel writes; what it saved of these is stale now.
            torch.autograd.graph.increment_version(part.written)
            if grad_scale is not None:
                torch.autograd.graph.increment_version(part.grads)
            part.grads = []  # the backward pass to come may have their memory
            part.starts = [False] * len(part.starts)


class _Part:
    """The rows of one launch."""

    def __init__(
        self, optimizer: "Optimizer", indices: list[int], rows: list[tuple[int, Row]]
    ) -> None:
        self.indices = indices
        self.groups = [rows[i][0] for i in indices]
        chosen = [rows[i][1] for i in indices]
        self.starts = [row.starts for row in chosen]
        lrs = [_lr_tensor(optimizer.param_groups[group]) for group in self.groups]
        states = [[row.states[k] for row in chosen] for k in range(len(chosen[0].states))]
        states += [[None] * len(chosen)] * (STATES - len(states))
        self.columns: list[Sequence[Tensor | None]] = [
            [row.param for row in chosen],
            lrs,
            [row.step for row in chosen],
            [row.ema for row in chosen],
            [row.ema_step for row in chosen],
            *states,
        ]
        self.grads = [row.grad for row in chosen]
        self.device = chosen[0].param.device
        sizes = [row.param.numel() for row in chosen]
        types = [next((x.dtype for x in column if x is not None), None) for column in self.columns]
        self.tables = kernel("Tables")(sizes, self.device, [self.grads[0].dtype, *types])
        self.addresses = list(map(_addresses, self.columns))
        self.fixed = [x for column in self.columns for x in column if x is not None]
        self.fixed_at = [x.data_ptr() for x in self.fixed]
        rates = {id(lr) for lr in lrs}
        self.written = [x for x in self.fixed if id(x) not in rates]

    def holds(self, grads: list[Tensor]) -> bool:
        self.grads = [grads[i] for i in self.indices]
        return self.fixed_at == [x.data_ptr() for x in self.fixed]

    def load(self, numbers: list[tuple[float, ...]]) -> None:
        addresses = [[g.data_ptr() for g in self.grads], *self.addresses]
        self.tables.load(addresses, self.groups, self.starts, numbers)


class GradsInOneLaunch:
    """Gradients of one device and type, for their norm and for clipping."""

    def __init__(self, grads: list[Tensor]) -> None:
        self.grads = grads
        sizes = [g.numel() for g in grads]
        self.tables = kernel("Tables")(sizes, grads[0].device, [grads[0].dtype])
        self.tables.load([_addresses(grads)])

    @classmethod
    def of(cls, grads: list[Tensor]) -> "GradsInOneLaunch | None":
        """None where the formula is to run."""
        if (
            torch.compiler.is_compiling()
            or kernel_for("multi_tensor", "grad_norm", grads[0]) is None
        ):
            return None
        takes = is_plain(tuple(grads)) and grads[0].dtype in KERNEL_DTYPES
        return cls(grads) if takes and all(map(is_dense, grads)) else None

    def norm(self) -> Tensor:
        return kernel("grad_norm")(self.tables, None)

    def clip_(self, norm: Tensor, max_norm: float) -> None:
        kernel("clip_grads")(self.tables, norm.float(), max_norm)
        torch.autograd.graph.increment_version(self.grads)


def split(
    optimizer: "Optimizer", rows: list[list[Row]], name: str
) -> tuple[StepInOneLaunch | None, list[list[Row]]]:
    """The rows that the kernel ``name`` takes, and, group by group, those it leaves to formulas."""
    taken: list[tuple[int, Row]] = []
    left: list[list[Row]] = []
    params = {row.param.device: row.param for group in rows for row in group}
    launchers = {device: kernel_for("multi_tensor", name, p) for device, p in params.items()}
    if not any(launchers.values()):
        return None, rows
    for number, group in enumerate(optimizer.param_groups):
        left.append([])
        for row in rows[number]:
            here = row.map(local)
            if launchers[row.param.device] is not None and _takes(here, group):
                taken.append((number, _counted_on_device(optimizer, row, here)))
            else:
                left[-1].append(row)
    if len({id(row.param) for _, row in taken}) < len(taken):
        return None, rows  # a parameter listed twice takes two steps, one after the other
    return (StepInOneLaunch(optimizer, taken, name) if taken else None), left


def _takes(row: Row, group: dict[str, Any]) -> bool:
    states = [x for x in row.states if x is not None]
    tensors = [row.param, row.grad, *states, *([] if row.ema is None else [row.ema])]
    counts = [x for x in (row.step, row.ema_step) if x is not None]
    strides, size = row.param.stride(), row.param.shape
    return (
        not group["differentiable"]
        and _reads_scalars(group, row.param.device)
        and all(x.dtype in KERNEL_DTYPES and x.device == row.param.device for x in tensors)
        and all(x.dtype == states[0].dtype for x in states)
        and (row.ema is None or row.ema.dtype == torch.float32)
        and is_plain(tuple(tensors))
        and is_dense(row.param)
        and all(x.stride() == strides and x.shape == size for x in tensors)
        and all(x.dtype == torch.float32 for x in counts)
    )


def _reads_scalars(group: dict[str, Any], device: torch.device) -> bool:
    """Whether the group's scalars that are tensors are read without waiting for them."""
    for key, value in group.items():
        for x in value if key == "betas" else (value,):
            on_host = not isinstance(x, Tensor) or x.is_cpu
            if not on_host and (key != "lr" or x.dtype != torch.float32 or x.device != device):
                return False
    return True


def _lr_tensor(group: dict[str, Any]) -> Tensor | None:
    """The learning rate, where it is a tensor that only the device should read."""
    lr = group["lr"]
    return lr if isinstance(lr, Tensor) and not lr.is_cpu else None


def _counted_on_device(optimizer: "Optimizer", row: Row, here: Row) -> Row:
    """The row with its counts where the kernel finds them, in the optimizer's state as well."""
    counts = {"step": row.step, "ema_step": row.ema_step}
    for key, count in counts.items():
        if count is not None and count.device != here.param.device:
            counts[key] = count.to(here.param.device)
            optimizer.state[row.param][key] = counts[key]
    return here._replace(**counts)


def local(x: Tensor) -> Tensor:
    """What this process has of a DTensor; any other tensor itself."""
    return local_part(x) if _is_dtensor(x) else x  # type: ignore[attr-defined]


def whole(x: Tensor) -> Tensor:
    """A DTensor put together from all processes; any other tensor itself."""
    return x.full_tensor() if _is_dtensor(x) else x  # type: ignore[attr-defined]


def _is_dtensor(x: Tensor) -> bool:
    if type(x) in (Tensor, Parameter) or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def kernel(name: str) -> Any:
    """What :mod:`torchref.triton_kernels.multi_tensor` calls by that name."""
    return find_kernel("multi_tensor", name)


def _params(optimizer: "Optimizer") -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


_NO_STATE: dict[str, Any] = {}


def _structure(optimizer: "Optimizer") -> list[list[Any]]:
    """What of the groups' options decides which tensors and which path a step takes."""
    return [
        [_kind(value) for key, value in group.items() if key != "params"]
        for group in optimizer.param_groups
    ]


def _kind(value: Any) -> Any:
    if isinstance(value, float):  # its value is for the device; a 0 may mean that it is not in use
        return value != 0
    if isinstance(value, Tensor):
        return id(value)
    return tuple(map(_kind, value)) if isinstance(value, tuple | list) else value


def _same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))


def _layout(params: list[Tensor]) -> list[list[Any]]:
    return [[p.shape for p in params], [p.stride() for p in params]]


def _looks(grads: list[Tensor]) -> list[list[Any]]:
    """What of a gradient a kernel must know beyond where it is."""
    types, dtypes = [type(g) for g in grads], [g.dtype for g in grads]
    return [types, dtypes, [g.stride() for g in grads], [g.is_neg() for g in grads]]


def _addresses(column: Sequence[Tensor | None]) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in column]
