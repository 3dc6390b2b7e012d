"""Symbolic tracing of converted models with :mod:`torch.fx`."""

import functools
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from torchref.convert import REPLACED


class Tracer(fx.Tracer):
    """A :class:`torch.fx.Tracer` to which our modules are leaves, as torch's are.

    So are our functions where :func:`torchref.convert` put them in place of torch's: in attributes
    of modules. A graph of a converted model has the nodes of the original's.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
        >>> report = torchref.convert(net)
        >>> graph = torchref.Tracer().trace(net)
        >>> [str(node.target) for node in graph.nodes]
        ['input', '0', '1', 'output']
        >>> traced = torch.fx.GraphModule(net, graph)
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = type(m).__module__.startswith("torchref.nn.")
        return ours or super().is_leaf_module(m, module_qualified_name)

    def trace(
        self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None
    ) -> fx.Graph:
        modules = root.modules() if isinstance(root, nn.Module) else ()
        kept = [
            (attributes, name, attributes[name])
            for attributes in map(vars, modules)
            for name in attributes.get(REPLACED, ())
        ]
        for attributes, name, function in kept:
            attributes[name] = functools.partial(self._recorded, function)
        try:
            return super().trace(root, concrete_args)
        finally:
            for attributes, name, function in kept:
                attributes[name] = function

    def _recorded(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(arg, fx.Proxy) for arg in (*args, *kwargs.values())):
            return self.create_proxy("call_function", function, args, kwargs)
        return function(*args, **kwargs)
