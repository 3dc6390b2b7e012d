"""``python -m torchref``: versions, the backend that would run and why, name clashes."""

import importlib.metadata
import platform

import torch

import torchref
from torchref.dispatch import explain

DISTRIBUTION = "torchref-triton"


def main() -> None:
    print(f"torchref     {torchref.__version__}  ({torchref.__path__[0]})")
    print(f"python       {platform.python_version()}")
    for name in ("torch", "triton", "lightning", "torchmetrics"):
        print(f"{name:<12} {_version(name)}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    print(f"gpu          {device}")
    print(f"backend      {explain()}")
    clashes = list(_clashes())
    print("name clashes: none" if not clashes else "name clashes:")
    for clash in clashes:
        print(f"  {clash}")


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _clashes():
    """Other distributions that claim our import name, or the one our kernels' folder has."""
    owners = importlib.metadata.packages_distributions()
    for name in sorted(set(owners.get("torchref", ())) - {DISTRIBUTION}):
        yield f"torchref: also installed by {name} {_version(name)}; uninstall one of the two"
    for name in sorted(set(owners.get("triton_kernels", ())) - {DISTRIBUTION}):
        yield (
            f"triton_kernels: installed by {name} {_version(name)}; ours is "
            "torchref.triton_kernels, so both work"
        )


if __name__ == "__main__":
    main()
