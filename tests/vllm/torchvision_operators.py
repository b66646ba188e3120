"""Lets PyPI's torchvision load beside a CPU build of torch: for the vLLM tests' environment only.

That wheel's binary part needs CUDA and is left out, but its Python part asks about two operators of
it when it is imported. They are declared here, without doing anything, right before that import, in
every process of the environment: `make test-vllm` puts this file and a .pth line into it.
"""

import importlib.abc
import sys

_OPERATORS = ("nms", "qnms")


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    declared = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and self.declared is None:
            import torch

            library = torch.library.Library("torchvision", "DEF")
            for operator in _OPERATORS:
                library.define(
                    f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )
            type(self).declared = library
        return


sys.meta_path.insert(0, _BeforeTorchvision())
