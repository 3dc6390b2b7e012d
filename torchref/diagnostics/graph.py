"""The computation graph of one forward pass: values, local derivatives and chained gradients.

The pass runs under a mode that sees every function and method of torch, and every piece of
:mod:`torchref.nn.functional`. Each of them computes on detached copies of its arguments, so that
autograd keeps a small graph for each operation and none that joins them: the local derivatives are
autograd's, the chain rule is ours.
"""

import contextlib
import functools
import html
import inspect
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import (
    TorchFunctionMode,
    get_default_nowrap_functions,
    handle_torch_function,
    has_torch_function,
)

import torchref.nn
from torchref.convert import FUNCTIONS
from torchref.internals import tree_leaves, tree_map_only, was_written

WHOLE = 6  # elements up to which a tensor is shown number by number
SMALL = 64  # elements of output and input together up to which a Jacobian is made
MEASURED = 1024  # elements of an output up to which a larger Jacobian's norm is computed
WIDTH = 32  # characters of a line in a picture
SECONDS = 60  # that Graphviz may take

_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "matmul": "@", "pow": "**"}
_REFLECTED = {"rsub": "sub", "rdiv": "div", "rpow": "pow", "rmatmul": "matmul"}
_REFUSED = {
    Tensor.backward,
    Tensor.requires_grad_,
    Tensor.detach_,
    torch.autograd.backward,
    torch.autograd.grad,
}
_COLORS = {
    "input": "#dbe9f6",
    "parameter": "#fde3c8",
    "constant": "#eeeeee",
    "operation": "#ffffff",
}
_RED = "#b2182b"  # of gradients


def graph(
    function: Callable[..., Any],
    *inputs: Any,
    loss: Callable[..., Any] | None = None,
    y: Any = None,
    names: Sequence[str] = (),
) -> "Graph":
    r"""Record one forward pass, then send the gradient back through it.

    For a node :math:`v` with children :math:`c`, those that were computed from it,

    .. math::
        \frac{\partial L}{\partial v} =
        \sum_c \frac{\partial L}{\partial c} \frac{\partial c}{\partial v}

    starting from :math:`\partial L / \partial L = 1`. The result holds what the loss depends on.

    Nothing of the model changes: neither gradients, nor buffers such as running statistics, nor
    other attributes, nor the state of torch's random numbers, so that the next forward pass draws
    the dropout masks that are shown. Its training flag stays as it is. Forward hooks run as ever.

    An in-place operation is a node like another; a tensor that shares memory with what it changed
    may not be used after it. A custom ``autograd.Function`` is one node. Inside the function there
    may be no ``backward``, no ``torch.autograd.grad`` and no change of ``requires_grad``.

    Args:
        function: a module, or a function of tensors.
        inputs: what it is called with. Their ``requires_grad`` says of which gradients are wanted.
        loss: makes a scalar of the output: called with the output, and with ``y`` if given. Not
            needed where ``function`` returns a scalar.
        y: the target.
        names: of the inputs, of ``y``, then of the results of the operations in their order; what
            is beyond keeps its own name. That is the module's for parameters and buffers
            (``0.weight``), the function's for its arguments and for what it finds in variables
            around it, ``x`` and ``y`` for other inputs, ``v1``, ``v2``, ... for results and ``L``
            for the last.

    Raises:
        TypeError: ``names`` is one string, or the output is no tensor.
        ValueError: the output is no scalar and there is no ``loss``; nothing requires a gradient;
            ``y`` without ``loss``; or ``names`` are too many or not all different.
        RuntimeError: the function asks for a gradient itself, or uses a tensor whose memory another
            one changed.

    Example:
        The course's single neuron, z = Wx + b, yhat = sigmoid(z), L = (y - yhat)^2 / 2:

        >>> def neuron(W, x, b, y):
        ...     yhat = torchref.nn.functional.sigmoid(W * x + b)
        ...     return 0.5 * (y - yhat) ** 2
        >>> W, b = torch.tensor(0.5, requires_grad=True), torch.tensor(-0.5, requires_grad=True)
        >>> names = ["W", "x", "b", "y", "Wx", "z", "yhat", "e"]
        >>> g = graph(neuron, W, torch.tensor(2.0), b, torch.tensor(1.0), names=names)
        >>> print(g)
        name  operation   value    gradient
        W     input       0.5      -0.1774
        x     input       2
        b     input       -0.5     -0.08872
        y     input       1
        Wx    W * x       1        -0.08872
        z     Wx + b      0.5      -0.08872
        yhat  sigmoid(z)  0.6225   -0.3775
        e     y - yhat    0.3775   0.3775
        v5    e ** 2      0.1425   0.5
        L     v5 * 0.5    0.07127  1
        >>> g["W"].gradient  # (yhat - y) yhat (1 - yhat) x
        tensor(-0.1774)
        >>> [edge.derivative for edge in g["yhat"].edges]  # yhat (1 - yhat)
        [tensor(0.2350)]

    Source: the course, "What is a Computation Graph?" and "How the Computation Graph helps".
    """
    if isinstance(names, str):
        raise TypeError(f"graph: expected `names` as a sequence of names, got {names!r}")
    if y is not None and loss is None:
        raise ValueError("graph: expected `loss` with `y`, got None")
    given = {**_tensors(loss, "loss"), **_tensors(function, "")}
    recorder = _Recorder({id(tensor): name for name, tensor in given.items()})
    with _untouched(function, loss, [*given.values(), *tree_leaves(inputs)]):
        result = recorder.run(function, _named(function, inputs), loss, y)
    if not result.output.requires_grad:
        raise ValueError(
            "graph: nothing requires a gradient; expected an input or a parameter with "
            "requires_grad=True from which the result is computed"
        )
    nodes = _ancestors(recorder.nodes, result)
    _name(recorder.inputs, nodes, list(names))
    with torch.inference_mode(False):
        _sweep(nodes)
    return Graph(nodes)


@dataclass(eq=False)
class Node:
    """A value of the forward pass.

    Args:
        kind: ``"input"``, ``"parameter"``, ``"constant"`` or ``"operation"``.
        operation: the name of the function that made it; of others the kind.
        value: what the forward pass computed.
        edges: to the nodes that it was computed from, in the order of the arguments.
        gradient: of the loss for it, after the reverse sweep; None where there is none.
    """

    name: str
    kind: str
    operation: str
    value: Tensor
    output: Tensor = field(repr=False)  # the value, with the operation's own autograd graph
    edges: list["Edge"] = field(default_factory=list, repr=False)
    operands: tuple[Any, ...] = field(default=(), repr=False)  # the two of an infix operator
    gradient: Tensor | None = None

    @property
    def expression(self) -> str:
        """The operation with the names of its arguments, such as ``W * x`` or ``sigmoid(z)``."""
        if self.kind != "operation":
            return self.operation
        if self.operands:
            left, right = (v.name if isinstance(v, Node) else f"{v:.4g}" for v in self.operands)
            return f"{left} {_INFIX[self.operation]} {right}"
        return f"{self.operation}({', '.join(edge.parent.name for edge in self.edges)})"


class Large(NamedTuple):
    """What is kept of a Jacobian that is too large to look at."""

    shape: tuple[int, ...]  # the output's, then the input's
    norm: float | None  # Frobenius; None for more than 1024 outputs


@dataclass(eq=False)
class Edge:
    """One use of a node as an argument.

    Args:
        parent: what was used.
        child: what was computed from it.
        term: the child's gradient times the derivative, one of those whose sum is the parent's
            gradient; None where no gradient flows.
    """

    parent: Node
    child: Node
    leaf: Tensor = field(repr=False)  # the parent's value as this use of it saw it
    is_elementwise: bool = False
    term: Tensor | None = None

    @functools.cached_property
    def derivative(self) -> Tensor | Large | None:
        """The local derivative of the child for the parent.

        A number between scalars; an elementwise operation's derivative element by element; else
        the Jacobian, of the child's shape and then the parent's, or, where the two have more than
        64 elements together, its shape and norm. None where no gradient flows.
        """
        if self.term is None:
            return None
        output = self.child.output
        if self.is_elementwise:
            return self._pulled(torch.ones_like(output))
        upstream = self.child.gradient
        if upstream is not None and upstream.numel() == 1 and upstream.item() == 1:
            rows: Iterable[Tensor | None] = [self.term]  # some Functions run backward only once
        else:
            rows = map(self._pulled, _unit_vectors(output))
        shape = (*output.shape, *self.leaf.shape)
        if output.numel() + self.leaf.numel() <= SMALL:
            jacobian = torch.stack([_or_zero(row, self.leaf) for row in rows])
            return jacobian.reshape(() if jacobian.numel() == 1 else shape)
        if output.numel() > MEASURED:
            return Large(shape, None)
        squares = [float(_or_zero(row, self.leaf).abs().double().square().sum()) for row in rows]
        return Large(shape, sum(squares) ** 0.5)

    def _pulled(self, dy: Tensor) -> Tensor | None:
        """``dy`` times the derivative."""
        return torch.autograd.grad(
            self.child.output, self.leaf, dy, retain_graph=True, allow_unused=True
        )[0]


class Graph:
    """A forward pass and its gradients, made by :func:`graph`; ``print`` shows it as a table.

    Args:
        nodes: each after those that it was computed from; the last is the loss.
    """

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes

    @property
    def loss(self) -> Node:
        return self.nodes[-1]

    def __getitem__(self, name: str) -> Node:
        """The node of a name.

        Raises:
            KeyError: there is none; the message lists those that there are.
        """
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(f"expected one of {', '.join(n.name for n in self.nodes)}, got {name}")

    def __str__(self) -> str:
        rows = [("name", "operation", "value", "gradient")]
        for node in self.nodes:
            gradient = "" if node.gradient is None else _shown(node.gradient)
            rows.append((node.name, node.expression, _shown(node.value), gradient))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
            for row in rows
        ]
        return "\n".join(line.rstrip() for line in lines)

    def steps(self, interactive: bool = False) -> None:
        """Print the forward pass, then the backward pass, one factor of the chain rule at a time.

        Args:
            interactive: wait for Enter after each step; ``q`` or the end of the input stops.

        Example:
            >>> x = torch.tensor(3.0, requires_grad=True)
            >>> graph(lambda x: torch.exp(x * x / 9), x).steps()
            forward
              x = 3
              v1 = x * x = 9
              v2 = v1 / 9 = 1
              L = exp(v2) = 2.718
            backward
              dL/dL = 1
              dL/dv2 = dL/dL * dL/dv2 = 1 * 2.718 = 2.718
              dL/dv1 = dL/dv2 * dv2/dv1 = 2.718 * 0.1111 = 0.302
              path 1 of dL/dx = dL/dv1 * dv1/dx = 0.302 * 3 = 0.9061
              path 2 of dL/dx = dL/dv1 * dv1/dx = 0.302 * 3 = 0.9061
              dL/dx = 0.9061 + 0.9061 = 1.812

        Source: the course, "Step-by-Step: Using the Chain Rule".
        """
        for line in [*self._forward_lines(), *self._backward_lines()]:
            print(line)
            if interactive and line.startswith(" "):
                try:
                    answer = input()
                except EOFError:
                    return
                if answer.strip().lower() == "q":
                    return

    def _forward_lines(self) -> Iterator[str]:
        yield "forward"
        for node in self.nodes:
            how = f"{node.expression} = " if node.kind == "operation" else ""
            yield f"  {node.name} = {how}{_shown(node.value)}"

    def _backward_lines(self) -> Iterator[str]:
        """An edge's line as soon as the child's gradient is known, a sum's after its last term."""
        loss = self.loss
        yield "backward"
        yield f"  {self._d(loss)} = {_shown(loss.value.new_ones(loss.value.shape))}"
        terms: dict[Node, list[Tensor]] = {}
        paths: dict[Node, int] = {}
        flowing = [edge for node in reversed(self.nodes) for edge in reversed(node.edges)]
        flowing = [edge for edge in flowing if edge.term is not None]
        for edge in flowing:
            paths[edge.parent] = paths.get(edge.parent, 0) + 1
        for edge in flowing:
            parent = edge.parent
            assert edge.term is not None
            found = terms.setdefault(parent, [])
            found.append(edge.term)
            several = paths[parent] > 1
            yield f"  {f'path {len(found)} of ' if several else ''}{self._chained(edge)}"
            if several and len(found) == paths[parent]:
                assert parent.gradient is not None
                added = " + ".join(map(_shown, found))
                yield f"  {self._d(parent)} = {added} = {_shown(parent.gradient)}"

    def _chained(self, edge: Edge) -> str:
        """One application of the chain rule, ``dL/dz = dL/da * da/dz = ... = ...``."""
        parent, child = edge.parent, edge.child
        assert child.gradient is not None
        assert edge.term is not None
        local = f"d{child.name}/d{parent.name}"
        sign = "*" if edge.is_elementwise or child.value.numel() == 1 else "@"
        start = f"{self._d(parent)} = {self._d(child)} {sign} {local}"
        factors = (child.gradient, edge.derivative, edge.term)
        small = [f for f in factors if isinstance(f, Tensor) and f.numel() <= WHOLE]
        is_whole = len(small) == 3
        first, second, result = map(_shown, small) if is_whole else map(_sized, factors)
        return f"{start}{' =' if is_whole else ':'} {first} {sign} {second} = {result}"

    def _d(self, node: Node) -> str:
        return f"d{self.loss.name}/d{node.name}"

    def to_dot(self) -> str:
        """The graph in Graphviz's language: values in the nodes, local derivatives on the edges."""
        numbers = {node: f"n{i}" for i, node in enumerate(self.nodes)}
        lines = [
            "digraph {",
            '  rankdir=LR; nodesep=0.3; ranksep=0.6; node [shape=box, style="filled,rounded"];',
            '  node [fontname="Helvetica", fontsize=12]; edge [fontname="Helvetica", fontsize=10];',
        ]
        for node, number in numbers.items():
            lines.append(
                f'  {number} [fillcolor="{_COLORS[node.kind]}", label=<{self._box(node)}>];'
            )
        for node in self.nodes:
            for edge in node.edges:
                ends = f"{numbers[edge.parent]} -> {numbers[node]}"
                lines.append(f"  {ends} [{_edge_label(edge)}];")
        return "\n".join([*lines, "}", ""])

    def _box(self, node: Node) -> str:
        rows = [f"<B>{_escaped(node.name)}</B>"]
        rows += [_escaped(line) for line in (node.expression, *_wrapped(_shown(node.value)))]
        if node.gradient is not None:
            gradient = _wrapped(_equation(self._d(node), _shown(node.gradient)))
            rows += [f'<FONT COLOR="{_RED}">{_escaped(line)}</FONT>' for line in gradient]
        return "<BR/>".join(rows)

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_dot` into a file, or the picture that Graphviz's ``dot`` makes of it.

        Args:
            path: ends in ``.dot`` for the text, in ``.svg``, ``.png`` or ``.pdf`` for a picture.

        Raises:
            ValueError: another ending.
            RuntimeError: ``dot`` is missing, fails, or takes more than a minute.
        """
        path = Path(path)
        kind = path.suffix.lower().removeprefix(".")
        if kind == "dot":
            path.write_text(self.to_dot(), encoding="utf-8")
        elif kind in ("svg", "png", "pdf"):
            path.write_bytes(_rendered(self.to_dot(), kind))
        else:
            raise ValueError(
                f"Graph.save: expected `path` to end in .dot, .svg, .png or .pdf, got {path.name!r}"
            )


# Recording.


class _Known(NamedTuple):
    """What a tensor that the function holds stands for."""

    node: Node
    tensor: Tensor  # kept, so that its id is no other's
    history: Any  # its grad_fn; another one later says that an unseen operation wrote to it
    is_ours: bool  # and may be written to


class _Use(NamedTuple):
    """An argument of a call: the function's tensor, and the copy that the operation gets."""

    tensor: Tensor
    node: Node
    leaf: Tensor
    copy: Tensor  # of the leaf, which itself may not be written to


class _Recorder(TorchFunctionMode):
    """Makes a node of every call, and hands the function a detached result."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names  # of parameters, buffers and variables, by id
        self.inputs: list[Node] = []
        self.given: dict[int, Tensor] = {}  # the handle for each input, by its id
        self.nodes: list[Node] = []  # each after its parents
        self.known: dict[int, _Known] = {}
        self.memory: dict[Node, Node] = {}  # the first node whose memory a view's node shares
        self.stale: dict[Node, str] = {}  # whose memory this operation changed
        self.overwritten: set[int] = set()

    def run(
        self,
        function: Callable[..., Any],
        inputs: list[tuple[Any, str]],
        loss: Callable[..., Any] | None,
        y: Any,
    ) -> Node:
        """The node of the scalar that comes out."""
        handles = [self.input(value, name) for value, name in inputs]
        targets = [] if y is None else [self.input(y, "y")]
        with self:
            output = _ASKING.get(id(function), function)(*handles)
            if loss is not None:
                output = _ASKING.get(id(loss), loss)(output, *targets)
        return self.node(_checked_scalar(output, loss))

    def input(self, value: Any, name: str) -> Any:
        """What the function gets for an input."""
        if not isinstance(value, Tensor):
            return value
        if id(value) in self.given:
            return self.given[id(value)]
        node = self._leaf(value, name, "input")
        handle = node.value.detach().requires_grad_(value.requires_grad)
        self.known[id(handle)] = _Known(node, handle, None, True)
        self.given[id(value)] = handle
        self.inputs.append(node)
        return handle

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _REFUSED or func.__name__ == "__set__":
            name = _operation(func)
            raise RuntimeError(
                f"graph: expected a forward pass alone, got `{name}` in the function"
            )
        if func.__name__ == "__get__":  # a property, mostly no tensor: spares the copies
            value = func(*args, **kwargs)
            if not isinstance(value, Tensor) or func in get_default_nowrap_functions():
                return value
        return self._call(func, args, kwargs)

    def _call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        uses: list[_Use] = []

        def copied(tensor: Tensor) -> Tensor:
            node = self.node(tensor)
            leaf = node.value.detach().requires_grad_(node.output.requires_grad)
            self.known[id(leaf)] = _Known(node, leaf, None, True)  # where it slips out of the call
            uses.append(_Use(tensor, node, leaf, leaf.clone()))
            return uses[-1].copy

        own_args, own_kwargs = tree_map_only(Tensor, copied, (args, kwargs))
        output = func(*own_args, **own_kwargs)
        name, operands = _operation(func), self._operands(func, args, kwargs)
        copies = {id(use.copy): use for use in uses}
        made = [t for t in tree_leaves(output) if isinstance(t, Tensor) and id(t) not in copies]
        labels = {id(t): f"{name}[{i}]" if len(made) > 1 else name for i, t in enumerate(made)}

        def handed(tensor: Tensor) -> Tensor:
            if id(tensor) in copies:  # changed in place, or the argument as it was
                return copies[id(tensor)].tensor
            return self._result(labels[id(tensor)], tensor, uses, operands)

        result = tree_map_only(Tensor, handed, output)
        for use in uses:
            if was_written(use.copy, use.leaf):
                self._overwrite(name, use, uses, operands)
        return result

    def _result(
        self, name: str, output: Tensor, uses: list[_Use], operands: tuple[Any, ...]
    ) -> Tensor:
        """What the function gets for an operation's output."""
        handle = output.detach().requires_grad_(output.requires_grad)
        node = self._add(self._operation_node(name, output, uses, operands), handle)
        for use in uses:
            if _share_memory(output, use.copy):
                self.memory[node] = self.memory.get(use.node, use.node)
        return handle

    def _overwrite(self, name: str, use: _Use, uses: list[_Use], operands: tuple[Any, ...]) -> None:
        """The function's tensor stands for the result of an in-place operation from now on."""
        memory = self.memory.get(use.node, use.node)
        for other in self.nodes:
            if other is not use.node and self.memory.get(other, other) is memory:
                self.stale[other] = name
        is_ours = self.known[id(use.tensor)].is_ours
        node = self._operation_node(name, use.copy, uses, operands)
        self._add(node, use.tensor, is_ours)
        self.overwritten.add(id(use.tensor))
        if is_ours:  # for what reads it unseen
            use.tensor.data = node.value
            use.tensor.requires_grad_(use.copy.requires_grad)

    def _operation_node(
        self, name: str, output: Tensor, uses: list[_Use], operands: tuple[Any, ...]
    ) -> Node:
        kind = "operation" if uses else "constant"  # torch.zeros and its kin
        node = Node("", kind, name, output.detach(), output, operands=operands)
        elementwise = _is_elementwise(name)
        for use in uses:
            same = elementwise and use.leaf.shape == output.shape
            node.edges.append(Edge(use.node, node, use.leaf, same))
        return node

    def _operands(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, ...]:
        """The two sides of an infix operator, else nothing."""
        sides = [self.node(arg) if isinstance(arg, Tensor) else arg for arg in args]
        simple = all(isinstance(side, Node | int | float) for side in sides)
        if _operation(func) not in _INFIX or len(sides) != 2 or kwargs or not simple:
            return ()
        return tuple(reversed(sides) if func.__name__.strip("_") in _REFLECTED else sides)

    def _add(self, node: Node, tensor: Tensor, is_ours: bool = True) -> Node:
        self.nodes.append(node)
        self.known[id(tensor)] = _Known(node, tensor, tensor.grad_fn, is_ours)
        return node

    def node(self, tensor: Tensor) -> Node:
        """What a tensor of the function stands for."""
        known = self.known.get(id(tensor))
        if known is None or known.history is not tensor.grad_fn:
            return self._found(tensor)
        if known.node in self.stale:
            raise RuntimeError(
                f"graph: `{self.stale[known.node]}`, in place, changed memory that the "
                f"result of `{known.node.operation}` shares, which is used after it; expected a "
                "copy (clone), or an operation that is not in place"
            )
        return known.node

    def _found(self, tensor: Tensor) -> Node:
        """A node for a tensor that no function of torch returned under this mode."""
        if tensor.grad_fn is not None:
            return self._hidden(tensor)
        kind = "parameter" if tensor.requires_grad else "constant"
        return self._leaf(tensor, self.names.get(id(tensor), ""), kind)

    def _leaf(self, tensor: Tensor, name: str, kind: str) -> Node:
        output = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        return self._add(Node(name, kind, kind, output.detach(), output), tensor, is_ours=False)

    def _hidden(self, tensor: Tensor) -> Node:
        """One node for all that lies between a tensor and the leaves of its autograd graph.

        A custom ``autograd.Function`` comes here, which the overrides of torch do not show.
        """
        leaves = _leaves(tensor.grad_fn)
        assert tensor.grad_fn is not None
        name = re.sub(r"(Function)?(Backward\d*)?$", "", tensor.grad_fn.name())
        if any(id(leaf) in self.overwritten for leaf in leaves):
            raise RuntimeError(
                f"graph: expected no change in place of what a custom function ({name}) reads"
            )
        node = Node("", "operation", name, tensor.detach(), tensor)
        node.edges = [Edge(self.node(leaf), node, leaf) for leaf in leaves]
        return self._add(node, tensor, is_ours=False)


def _leaves(grad_fn: Any) -> list[Tensor]:
    """The leaves of an autograd graph, each once."""
    leaves: dict[int, Tensor] = {}
    seen, waiting = set(), [grad_fn]
    while waiting:
        function = waiting.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        if hasattr(function, "variable"):
            leaves[id(function.variable)] = function.variable
        waiting.extend(following for following, _ in reversed(function.next_functions))
    return list(leaves.values())


def _operation(func: Callable[..., Any]) -> str:
    """``sub`` for ``Tensor.__rsub__``, ``T`` for the property, ``relu`` for ``relu_``."""
    is_property = func.__name__ in ("__get__", "__set__")
    named: Any = getattr(func, "__self__", func) if is_property else func
    name: str = named.__name__.strip("_")
    return _REFLECTED.get(name, name)


@functools.cache
def _is_elementwise(operation: str) -> bool:
    """Whether torch says that each element of the output comes from one of the input."""
    packet = getattr(torch.ops.aten, operation, None)
    if operation == "dropout" or packet is None:
        return operation == "dropout"
    overloads = [getattr(packet, name) for name in packet.overloads()]
    return any(torch.Tag.pointwise in overload.tags for overload in overloads)


def _share_memory(a: Tensor, b: Tensor) -> bool:
    storage = a.untyped_storage()
    return storage.nbytes() > 0 and storage.data_ptr() == b.untyped_storage().data_ptr()


# What surrounds the recording.


@contextlib.contextmanager
def _untouched(function: Any, loss: Any, tensors: list[Any]) -> Iterator[None]:
    """Pieces can be overridden; what the pass does to modules and generators is undone."""
    devices = {t.device.index for t in tensors if isinstance(t, Tensor) and t.is_cuda}
    modules = [inner for f in (function, loss) for inner in _modules(f)]
    spaces = [space for m in modules for space in (vars(m), m._buffers)]
    before = [(space, dict(space)) for space in spaces]
    globals_ = [getattr(f, "__globals__", {}) for f in (function, loss)]
    loaded = [getattr(module, "__dict__", {}) for module in list(sys.modules.values())]
    holders: list[dict[Any, Any]] = [*map(vars, modules), *globals_, *loaded]
    with (
        torch.random.fork_rng(devices=sorted(devices)),
        torch.inference_mode(False),
        torch.enable_grad(),
        _overridable([*holders, FUNCTIONS]),
    ):
        try:
            yield
        finally:
            for space, entries in before:
                space.clear()
                space.update(entries)


@contextlib.contextmanager
def _overridable(holders: list[dict[Any, Any]]) -> Iterator[None]:
    """Let modes see the calls of our pieces, as they see those of torch's functions.

    Wherever a module holds a piece, it holds one for the time that asks the modes first. Those are
    a thread's own: in other threads the pieces run as ever.
    """
    replaced = [
        (holder, name, value)
        for holder in holders
        for name, value in list(holder.items())
        if id(value) in _ASKING
    ]
    try:
        for holder, name, value in replaced:
            holder[name] = _ASKING[id(value)]
        yield
    finally:
        for holder, name, value in replaced:
            holder[name] = value


def _asking(piece: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(piece)
    def asking(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        if has_torch_function(given):
            return handle_torch_function(asking, given, *args, **kwargs)
        return piece(*args, **kwargs)

    return asking


_ASKING = {
    id(piece): _asking(piece)
    for piece in vars(torchref.nn.functional).values()
    if isinstance(piece, FunctionType)
}


def _around(function: Any) -> dict[str, Any]:
    """What a function finds in variables around it, by their names."""
    if not inspect.isfunction(function) and not inspect.ismethod(function):
        return {}
    found = inspect.getclosurevars(function)
    owner = {"self": function.__self__} if inspect.ismethod(function) else {}
    return {**found.globals, **found.nonlocals, **owner}


def _modules(function: Any) -> list[nn.Module]:
    """The modules that a function is, or finds in variables, with those inside them."""
    outer = [function, *_around(function).values()]
    return [inner for m in outer if isinstance(m, nn.Module) for inner in m.modules()]


def _tensors(function: Any, prefix: str) -> dict[str, Tensor]:
    """The parameters and buffers of a module, or those that a function finds in variables."""
    if isinstance(function, nn.Module):
        kinds = (function.named_buffers(prefix), function.named_parameters(prefix))
        return {name: tensor for kind in kinds for name, tensor in kind}
    found: dict[str, Tensor] = {}
    for name, value in _around(function).items():
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, nn.Module):
            found |= _tensors(value, name)
    return found


def _named(function: Any, inputs: tuple[Any, ...]) -> list[tuple[Any, str]]:
    """The inputs with the names of the function's parameters, or x, x2, x3, ..."""
    names = ["x", *(f"x{i}" for i in range(2, len(inputs) + 1))]
    if inspect.isfunction(function):
        parameters = inspect.signature(function).parameters.values()
        own = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        names[: len(own)] = own[: len(names)]
    return list(zip(inputs, names, strict=False))


def _checked_scalar(output: Any, loss: Any) -> Tensor:
    which = "function" if loss is None else "loss"
    if not isinstance(output, Tensor):
        raise TypeError(f"graph: expected `{which}` to return a tensor, got {type(output)}")
    if output.numel() != 1:
        hint = "; reduce it, or give `loss` (and `y`), which makes a scalar of it"
        raise ValueError(
            f"graph: expected `{which}` to return a scalar, got shape {tuple(output.shape)}"
            f"{hint if loss is None else ''}"
        )
    return output


# After the recording.


def _ancestors(nodes: list[Node], result: Node) -> list[Node]:
    """The nodes that a result depends on, and itself, in their order."""
    needed = {result}
    for node in reversed(nodes):
        if node in needed:
            needed.update(edge.parent for edge in node.edges)
    return [node for node in nodes if node in needed]


def _name(inputs: list[Node], nodes: list[Node], names: list[str]) -> None:
    operations = [node for node in nodes if node.kind == "operation"]
    wanted = [*inputs, *operations]
    if len(names) > len(wanted) or len(set(names)) < len(names):
        raise ValueError(
            f"graph: expected `names`, all different, of at most {len(inputs)} inputs and "
            f"{len(operations)} results, got {names}"
        )
    found = [node for node in nodes if node not in wanted]
    for kind, letter in (("operation", "v"), ("parameter", "p"), ("constant", "c")):
        for i, node in enumerate([node for node in nodes if node.kind == kind], 1):
            node.name = node.name or f"{letter}{i}"
    if operations and operations[-1] is nodes[-1]:
        nodes[-1].name = "L"
    for node, name in zip(wanted, names, strict=False):
        node.name = name
    _make_different([*wanted[: len(names)], *inputs, *found, *operations])


def _make_different(nodes: list[Node]) -> None:
    """Add primes to names that an earlier node has."""
    taken: dict[str, Node] = {}
    for node in nodes:
        while taken.setdefault(node.name, node) is not node:
            node.name += "'"


def _sweep(nodes: list[Node]) -> None:
    """The chain rule, from the last node to the first."""
    nodes[-1].gradient = torch.ones_like(nodes[-1].value)
    for node in reversed(nodes):
        if node.gradient is None or not node.output.requires_grad:
            continue
        for edge in node.edges:
            if not edge.leaf.requires_grad:
                continue
            edge.term = edge._pulled(node.gradient)
            if edge.term is not None:
                before = edge.parent.gradient
                edge.parent.gradient = edge.term if before is None else before + edge.term


def _unit_vectors(like: Tensor) -> Iterator[Tensor]:
    for i in range(like.numel()):
        unit = torch.zeros(like.numel(), dtype=like.dtype, device=like.device)
        unit[i] = 1
        yield unit.reshape(like.shape)


def _or_zero(row: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if row is None else row


# Text.


def _shown(tensor: Tensor) -> str:
    """A small tensor number by number, of a larger one the shape and what the numbers are like."""
    if 0 < tensor.numel() <= WHOLE:
        return _list(tensor.tolist())
    text = str(tuple(tensor.shape))
    if tensor.numel() == 0 or tensor.is_complex():
        return text
    x = tensor.double()
    numbers = {"mean": x.mean(), "std": x.std(), "min": x.min(), "max": x.max()}
    return f"{text} {', '.join(f'{name} {_number(v.item())}' for name, v in numbers.items())}"


def _list(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_list, value))}]"
    return _number(value)


def _number(value: bool | int | float | complex) -> str:
    if isinstance(value, float | complex):
        return f"{value + 0.0:.4g}"  # + 0.0 makes 0 of -0
    return str(value)


def _sized(factor: Tensor | Large | None) -> str:
    """The shape; of one number the number."""
    if isinstance(factor, Tensor) and factor.numel() == 1:
        return _shown(factor)
    return str(tuple(factor.shape)) if factor is not None else "?"


def _edge_label(edge: Edge) -> str:
    derivative = edge.derivative
    if derivative is None:
        return 'style=dashed, color="#999999"'
    if isinstance(derivative, Tensor):
        text = _shown(derivative) if derivative.numel() <= WHOLE else f"shape {_sized(derivative)}"
    else:
        norm = "" if derivative.norm is None else f"\nnorm {_number(derivative.norm)}"
        text = f"shape {_sized(derivative)}{norm}"
    lines = _wrapped(_equation(f"d{edge.child.name}/d{edge.parent.name}", text))
    return f"label=<{'<BR/>'.join(map(_escaped, lines))}>"


def _equation(left: str, right: str) -> str:
    """On one line where it fits."""
    return f"{left} = {right}" if len(left) + len(right) + 3 <= WIDTH else f"{left} =\n{right}"


def _wrapped(text: str) -> list[str]:
    """In lines, one for each row of a matrix."""
    rows = text.replace("], [", "],\n[").split("\n")
    return [line for row in rows for line in textwrap.wrap(row, WIDTH) or [""]]


def _escaped(text: str) -> str:
    """As Graphviz's HTML-like labels want it, which may hold no control characters."""
    printable = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return html.escape(printable) or "&#160;"


def _rendered(dot: str, kind: str) -> bytes:
    program = shutil.which("dot")
    if program is None:
        raise RuntimeError(
            "Graph.save: Graphviz's program `dot` is missing; apt install graphviz (or "
            "brew install graphviz), or save as .dot"
        )
    try:
        done = subprocess.run(
            [program, f"-T{kind}"], input=dot.encode(), capture_output=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(
            f"Graph.save: `dot` took more than {SECONDS} s; save as .dot, or a smaller graph"
        ) from None
    if done.returncode != 0:
        raise RuntimeError(f"Graph.save: `dot` failed: {done.stderr.decode(errors='replace')}")
    return done.stdout
