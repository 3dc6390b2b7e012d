"""What the optimizers add to torch's: options, the path of a step, the average of the weights.

A step collects a :class:`~torchref.optim._update.Row` of tensors for each parameter that has a
gradient. Those that a kernel takes go to :mod:`torchref.optim._one_launch`, of all groups together;
the rest go to the optimizer's formula, group by group.
"""

import contextlib
from collections.abc import Callable, Iterator
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from torchref._checks import require_number, require_tensor
from torchref.autograd import opmath
from torchref.dispatch import reads_values
from torchref.internals import check_graph_capture, step_with_grad_mode
from torchref.optim._one_launch import StepInOneLaunch, kernel, split, whole
from torchref.optim._update import Row, average, clip_factor, on_device
from torchref.optim.clip import total_norm

# Of each number, from the first up to but without the second.
RANGES = {
    "lr": (0, inf),
    "momentum": (0, inf),
    "dampening": (-inf, inf),
    "weight_decay": (0, inf),
    "eps": (0, inf),
    "alpha": (0, 1),
    "betas": (0, 1),
    "ema_decay": (0, 1),
}

LOADED_RANGES = RANGES | {"lr": (-inf, inf)}  # a schedule's last may be rounded to below 0
OPTIONAL = ("max_norm", "ema_decay", "state_dtype")  # which may be None


class Optimizer(torch.optim.Optimizer):
    """The base of ours; each is also an optimizer of torch's."""

    grad_norm: Tensor | None = None  # of the last step under max_norm, before clipping
    _in_one_launch: StepInOneLaunch | None = None
    _kernel: str
    _state_keys: tuple[str, ...]
    _loaded_options: tuple[str, ...]  # those without which a saved group is another optimizer's
    _loaded_states: tuple[str, ...] = ()  # and those of a parameter that has taken a step

    def _rows(self, group: dict[str, Any]) -> list[Row]:
        """The tensors of each of a group's parameters that has a gradient."""
        raise NotImplementedError

    def _numbers(self, group: dict[str, Any]) -> tuple[float, ...]:
        """A group's hyperparameters as the kernel reads them."""
        raise NotImplementedError

    def _formula(
        self,
        rows: list[Row],
        group: dict[str, Any],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        clip: Tensor | None,
    ) -> None:
        """One step of some of a group's rows; ``clip`` is a factor on their gradients."""
        raise NotImplementedError

    def _add_options(
        self,
        max_norm: float | None,
        ema_decay: float | None,
        ema_bias_correction: bool,
        state_dtype: torch.dtype | None,
        **options: Any,
    ) -> None:
        """Write those options of ours that are in use to the groups; the others leave no trace."""
        options |= {
            "max_norm": max_norm,
            "ema_decay": ema_decay,
            "ema_bias_correction": ema_bias_correction or None,
            "state_dtype": state_dtype,
        }
        self._check_options(options)
        if ema_bias_correction and ema_decay is None:
            name = type(self).__name__
            raise ValueError(f"{name}: `ema_bias_correction` needs `ema_decay`, which is None")
        for key, value in options.items():
            if value is not None:
                self.defaults[key] = value
                for group in self.param_groups:
                    group.setdefault(key, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Torch's, with the options checked, which torch does in the constructor alone."""
        if isinstance(param_group, dict):  # or torch says that it has to be one
            self._check_options(self.defaults | param_group)
        super().add_param_group(param_group)

    def _check_options(self, options: dict[str, Any]) -> None:
        check_options(type(self).__name__, options, RANGES)

    def _check_numbers(self, **options: Any) -> None:
        """Types alone, before torch's constructor: of the ranges it speaks in words of its own."""
        check_numbers(type(self).__name__, options)

    @step_with_grad_mode
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters once.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What ``closure`` returns, or None.
        """
        if "capturable" in self.defaults:
            check_graph_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        launch, left = self._split()
        norm = None
        if any(group.get("max_norm") is not None for group in self.param_groups):
            norm = self.grad_norm = self._norm(launch, left, grad_scale)
        if launch is not None:
            launch.step(grad_scale, found_inf, norm)
        for group, rows in zip(self.param_groups, left, strict=True):
            if rows:
                clip = _clip(norm, group)
                self._formula(rows, group, grad_scale, found_inf, clip)
                average(rows, group, found_inf)
            self._average_paused(group, found_inf)
        return loss

    def _split(self) -> tuple[StepInOneLaunch | None, list[list[Row]]]:
        """What goes to the kernel, and the rows of each group that go to the formula."""
        compiling = torch.compiler.is_compiling()
        launch = None if compiling else self._in_one_launch
        if launch is not None and launch.holds(self):
            left: list[list[Row]] = [[] for _ in self.param_groups]
        else:
            left = [self._prepared(group) for group in self.param_groups]
            if compiling:
                return None, left
            launch, left = split(self, left, self._kernel)
            self._in_one_launch = None if any(left) else launch
        if launch is not None:
            launch.load(self)
        return launch, left

    def _prepared(self, group: dict[str, Any]) -> list[Row]:
        """The group's rows, with states of float32 and averages where asked for."""
        rows = self._rows(group)
        if group.get("state_dtype") is not None:
            rows = [self._with_float32_state(row) for row in rows]
        if group.get("ema_decay") is not None:
            rows = [self._with_average(row) for row in rows]
        return rows

    def _with_float32_state(self, row: Row) -> Row:
        """The row with its states, which torch makes in a half-precision parameter's type."""
        if all(x is None or opmath(x) is x for x in row.states):
            return row
        states = tuple(None if x is None else opmath(x) for x in row.states)
        state = self.state[row.param]
        for key, x in zip(self._state_keys, states, strict=False):
            if x is not None:
                state[key] = x
        return row._replace(states=states)

    def _with_average(self, row: Row) -> Row:
        state = self.state[row.param]
        if "ema" not in state:
            # A parameter whose first gradient comes late was constant until now.
            counts = [other["ema_step"] for other in self.state.values() if "ema_step" in other]
            state["ema"] = opmath(row.param.detach()).clone(memory_format=torch.preserve_format)
            zero = torch.zeros((), device=row.param.device)
            state["ema_step"] = counts[0].to(zero, copy=True) if counts else zero
        return row._replace(ema=state["ema"], ema_step=state["ema_step"])

    def _average_paused(self, group: dict[str, Any], found_inf: Tensor | None) -> None:
        """Parameters that take no step are averaged, too, as they are."""
        if group.get("ema_decay") is None:
            return
        paused = [p for p in group["params"] if p.grad is None and "ema" in self.state.get(p, {})]
        rows = [
            Row(p, p, (), None, False, self.state[p]["ema"], self.state[p]["ema_step"])
            for p in paused
        ]
        average(rows, group, found_inf)

    def _common_numbers(self, group: dict[str, Any], l2: float) -> tuple[float, ...]:
        """The kernel's numbers that all optimizers have."""
        lr = group["lr"]
        return kernel("common_numbers")(
            0.0 if isinstance(lr, Tensor) and not lr.is_cpu else float(lr),
            group["maximize"],
            l2,
            group.get("max_norm"),
            group.get("ema_decay"),
            group.get("ema_bias_correction", False),
        )

    def _norm(
        self, launch: StepInOneLaunch | None, left: list[list[Row]], grad_scale: Tensor | None
    ) -> Tensor:
        """The norm of all gradients, without their loss scale."""
        norms: list[Tensor] = []
        grads = [row.grad for rows in left for row in rows]
        if launch is not None and launch.sharded:  # a kernel would see what this process has
            grads = [p.grad for p in launch.params if p.grad is not None]
        elif launch is not None:
            norms = launch.norms(grad_scale)
        if grads:
            norm = whole(total_norm(grads))
            norms.append(norm if grad_scale is None else norm / on_device(grad_scale, norm.device))
        if len(norms) <= 1:
            return norms[0] if norms else torch.zeros(())
        return torch.linalg.vector_norm(torch.stack([norm.to(norms[0]) for norm in norms]))

    def ema_parameters(self) -> list[Tensor]:
        """The averages of the parameters, in the order of the groups and of their parameters.

        They are the optimizer's own tensors, of float32 where a parameter's type is a half. A
        parameter that has taken no step is its own average.
        """
        return [
            self.state.get(p, {}).get("ema", p.detach())
            for group in self.param_groups
            for p in group["params"]
        ]

    @contextlib.contextmanager
    @torch.no_grad()
    def averaged(self) -> Iterator[None]:
        """Put the averages in the parameters' place for a block: to validate, or to save them."""
        params = [p for group in self.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in params]
        for p, ema in zip(params, self.ema_parameters(), strict=True):
            p.copy_(ema)
        try:
            yield
        finally:
            for p, x in zip(params, before, strict=True):
                p.copy_(x)

    def state_dict(self) -> dict[str, Any]:
        """Torch's, with the counts of steps where torch has them."""
        hook = self.register_state_dict_post_hook(_counts_on_host, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Torch's, but averages and float32 states do not become of a half-precision type.

        Raises:
            ValueError: the groups or states are not those of such an optimizer and its parameters.
                Nothing is loaded then.
        """
        seen: list[dict[str, Any]] = []  # what torch loads, after everybody's hooks

        def look(_: Any, state_dict: dict[str, Any]) -> None:
            self._check_loaded(state_dict)
            seen.append(state_dict)

        def restore(_: Any) -> None:
            self._restore_all(seen[0])

        hooks = [
            self.register_load_state_dict_pre_hook(look),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _check_loaded(self, state_dict: dict[str, Any]) -> None:
        pairs = list(zip(self.param_groups, state_dict["param_groups"], strict=False))
        if any(len(group["params"]) != len(saved["params"]) for group, saved in pairs):
            return  # as torch is about to say
        name = f"{type(self).__name__}.load_state_dict"
        for group, saved in pairs:
            for key in self._loaded_options:
                if key not in saved:
                    raise ValueError(
                        f"{name}: expected `{key}` in `param_groups`, got {', '.join(saved)}"
                    )
            check_options(name, saved, LOADED_RANGES)
            for p, key in zip(group["params"], saved["params"], strict=True):
                self._check_loaded_state(name, p, state_dict["state"].get(key) or {})

    def _check_loaded_state(self, name: str, p: Tensor, states: dict[str, Any]) -> None:
        for key in self._loaded_states:
            if states and key not in states:
                raise ValueError(f"{name}: expected `{key}` in `state`, got {', '.join(states)}")
        for key in (key for key in self._state_keys if key in states):
            x = states[key]
            if key in ("step", "ema_step"):
                require_number(name, key, x)
                if not _within(x, 0, inf):
                    raise ValueError(f"{name}: expected `{key}` in [0, inf), got {float(x)}")
                continue
            if key == "momentum_buffer" and states[key] is None:  # torch's, before its first step
                continue
            require_tensor(name, key, x)
            # a process may hold a part alone, and only torch knows what fits it
            if _are_whole(p, x) and x.shape != p.shape:
                raise ValueError(
                    f"{name}: expected `{key}` of shape {tuple(p.shape)}, got {tuple(x.shape)}"
                )

    def _restore_all(self, state_dict: dict[str, Any]) -> None:
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, key in zip(group["params"], saved["params"], strict=True):
                states = state_dict["state"].get(key, {})
                for name in self._state_keys & states.keys():
                    if isinstance(states[name], Tensor):
                        self._restore(p, name, states[name], group)

    def _restore(self, p: Tensor, name: str, saved: Any, group: dict[str, Any]) -> None:
        """Take from a saved state what torch has cast to the parameter's type."""
        if name == "ema_step":
            self.state[p][name] = saved.to(p.device, torch.float32, copy=True)
        elif name == "ema" or (name != "step" and group.get("state_dtype") is not None):
            self.state[p][name] = opmath(saved).to(p.device, opmath(p).dtype, copy=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a state_dict of torch's has none of our options
            for key in ("max_norm", "ema_decay", "ema_bias_correction", "state_dtype"):
                if key in self.defaults:
                    group.setdefault(key, self.defaults[key])


def check_options(
    name: str, options: dict[str, Any], ranges: dict[str, tuple[float, float]]
) -> None:
    """Raise for the first option of a group that is out of its range."""
    options = {key: x for key, x in options.items() if x is not None or key not in OPTIONAL}
    check_numbers(name, options)
    for key, (low, high) in ranges.items():
        if key in options and not _within(options[key], low, high):
            expected = f"a finite `{key}`" if low == -inf else f"`{key}` in [{low}, {high})"
            raise ValueError(f"{name}: expected {expected}, got {options[key]}")
    if not options.get("max_norm", 0) >= 0:
        raise ValueError(f"{name}: expected `max_norm` >= 0, got {options['max_norm']}")
    state_dtype = options.get("state_dtype")
    if state_dtype not in (None, torch.float32):
        raise ValueError(
            f"{name}: expected `state_dtype` to be None or torch.float32, got {state_dtype}"
        )


def check_numbers(name: str, options: dict[str, Any]) -> None:
    betas = options.get("betas", (0, 0))
    if not (isinstance(betas, tuple | list) and len(betas) == 2):
        raise ValueError(f"{name}: expected two numbers as `betas`, got {betas}")
    for key in (*RANGES, "max_norm"):
        for value in betas if key == "betas" else (options.get(key, 0),):
            require_number(name, key, value)  # YAML makes words of 1e-3


def _within(value: Any, low: float, high: float) -> bool:
    """Whether a number, or each of several, is in its range; True where that is not known."""
    if isinstance(value, tuple | list):
        return all(_within(x, low, high) for x in value)
    if isinstance(value, Tensor):
        return value.numel() == 1 and (not reads_values(value) or low <= value.item() < high)
    return value is None or low <= value < high


def _are_whole(*tensors: Tensor) -> bool:
    return all(type(x) in (Tensor, Parameter) for x in tensors)


def _clip(norm: Tensor | None, group: dict[str, Any]) -> Tensor | None:
    """The factor on a group's gradients, None where it does not clip."""
    max_norm = group.get("max_norm")
    return None if norm is None or max_norm is None else clip_factor(norm, max_norm)


def _counts_on_host(_: Any, state_dict: dict[str, Any]) -> None:
    """Bring counts that the kernel has moved back, with one copy for all of a device."""
    states = state_dict["state"]
    moved: dict[torch.device, list[Any]] = {}
    for group in state_dict["param_groups"]:
        for key in group["params"]:
            step = states.get(key, {}).get("step")
            if isinstance(step, Tensor) and not (group.get("capturable") or group.get("fused")):
                moved.setdefault(step.device, []).append(key)
    for device, keys in moved.items():
        if device.type != "cpu":
            counts = torch.stack([states[key]["step"] for key in keys]).cpu()
            for key, count in zip(keys, counts, strict=True):
                states[key] = {**states[key], "step": count.clone()}
