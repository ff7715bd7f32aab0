"""Lets torchvision be imported beside a torch that it was not built for."""

import torch

__all__ = ["mend_torchvision"]

_LIBRARIES: list[torch.library.Library] = []  # kept: their operators go with them


def mend_torchvision() -> None:
    """Declares two operators that a torchvision built for CUDA looks for in a CPU build of torch.

    To be called before anything imports torchvision. Nothing here uses these operators: LeRobot and robomimic import
    torchvision for cameras.
    """
    if not _LIBRARIES:
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)
