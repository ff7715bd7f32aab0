"""Imports lightning for all of training, and explains the one installation that breaks it.

torchmetrics, which lightning needs, imports torchvision wherever it is installed. A torchvision built for another torch
(a CUDA build beside a CPU torch, say: pip sees no conflict) fails there with an error that names neither package.

    from scd_robot.training.compat import lightning
"""

from types import ModuleType
from typing import TYPE_CHECKING

from scd_robot.errors import MissingDependencyError

__all__ = ["import_lightning", "lightning"]


def import_lightning() -> ModuleType:
    """The module `lightning`.

    Raises:
        MissingDependencyError: lightning is absent, or the installed torchvision does not fit the installed torch.
    """
    try:
        import lightning
    except ModuleNotFoundError as error:
        if error.name != "lightning":
            raise
        raise MissingDependencyError(
            "training needs the package 'lightning', which is not installed; run 'pip install lightning'"
        ) from error
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        raise MissingDependencyError(
            f"lightning cannot be imported because the installed torchvision was built for another torch ({error}); "
            "run 'pip uninstall torchvision', or install the torchvision that matches your torch"
        ) from error
    return lightning


if TYPE_CHECKING:
    import lightning
else:
    lightning = import_lightning()
