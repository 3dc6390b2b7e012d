"""Symbolic tracing of converted models with :mod:`torch.fx`."""

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from torchref.convert import FUNCTIONS, REPLACED, recorded
from torchref.fuse import Fused


class Tracer(fx.Tracer):
    """A :class:`torch.fx.Tracer` to which our modules are leaves, as torch's are.

    So are our functions where :func:`torchref.convert` put them in place of torch's: in attributes
    of modules and, with ``functional=True``, in calls in ``forward``; methods such as ``x.relu()``
    stay torch's. A graph of a converted model has the nodes of the original's.

    :func:`torch.fx.symbolic_trace` goes into our modules instead, whose checks then raise a
    ``TraceError``; a Dropout in evaluation has no check, and is missing from its graph.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
        >>> report = torchref.convert(net)
        >>> graph = torchref.Tracer().trace(net)
        >>> [str(node.target) for node in graph.nodes]
        ['input', '0', '1', 'output']
        >>> traced = torch.fx.GraphModule(net, graph)
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = type(m).__module__.startswith("torchref.nn.") or isinstance(m, Fused)
        return ours or super().is_leaf_module(m, module_qualified_name)

    def trace(
        self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None
    ) -> fx.Graph:
        modules = root.modules() if isinstance(root, nn.Module) else ()
        kept = [
            (attributes, name, attributes[name])
            for attributes in map(vars, modules)
            for name, theirs in attributes.get(REPLACED, {}).items()
            if attributes.get(name) is FUNCTIONS[theirs]  # not set anew since
        ]
        for attributes, name, function in kept:
            attributes[name] = _recording(function)
        try:
            return super().trace(root, concrete_args)
        finally:
            for attributes, name, function in kept:
                attributes[name] = function


def _recording(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: recorded(function, args, kwargs)
