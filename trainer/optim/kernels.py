"""AdamW over flat ranges: torch's fused kernel, or NVIDIA apex's where it is installed and asked for.

Both divide the gradient by the clipping divisor and skip non-finite steps inside the kernel, so a step reads its
gradients once.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from parallel.zero.optimizer import UpdateKernel
from trainer.optim.config import OptimizerConfig


class TorchAdamW:
    """torch.optim's fused AdamW on CPU and GPU."""

    def __init__(self, config: OptimizerConfig) -> None:
        self.config = config

    def __call__(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor],
        first_moments: list[Tensor],
        second_moments: list[Tensor],
        steps: list[Tensor],
        *,
        lr: float,
        decay: bool,
        divisor: Tensor,
        skip: Tensor,
    ) -> None:
        adamw(
            parameters,
            gradients,
            first_moments,
            second_moments,
            [],
            steps,
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=self.config.betas[0],
            beta2=self.config.betas[1],
            lr=lr,
            weight_decay=self.config.weight_decay if decay else 0.0,
            eps=self.config.eps,
            grad_scale=divisor,
            found_inf=skip,
        )


class ApexAdamW:
    """The multi-tensor kernel behind NVIDIA apex's FusedAdam, in its decoupled (AdamW) mode, on GPUs."""

    CHUNK = 2048 * 32
    """Elements per thread block: the value apex's own optimizers use."""

    def __init__(self, config: OptimizerConfig) -> None:
        problem = apex_problem()
        if problem:
            raise RuntimeError(f"optimizer.kernel = apex: {problem}")
        self.config = config
        self._adam: Any = importlib.import_module("amp_C").multi_tensor_adam
        self._apply: Any = importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier

    def __call__(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor],
        first_moments: list[Tensor],
        second_moments: list[Tensor],
        steps: list[Tensor],
        *,
        lr: float,
        decay: bool,
        divisor: Tensor,
        skip: Tensor,
    ) -> None:
        # This kernel takes the step count from the host and has no skip flag: decide here.
        if bool(skip):
            return
        for gradient, step in zip(gradients, steps, strict=True):
            gradient.div_(divisor)
            step.add_(1)
        self._apply(
            self._adam,
            skip.new_zeros(1, dtype=torch.int32),
            [gradients, parameters, first_moments, second_moments],
            lr,
            self.config.betas[0],
            self.config.betas[1],
            self.config.eps,
            int(steps[0]),
            1,  # mode 1: decoupled weight decay
            1,  # bias correction
            self.config.weight_decay if decay else 0.0,
        )


def apex_problem() -> str:
    """Why apex's kernels cannot be used here; empty if they can."""
    if importlib.util.find_spec("amp_C") is not None and importlib.util.find_spec("apex") is not None:
        return ""
    if importlib.util.find_spec("apex") is not None:
        return (
            "needs NVIDIA apex with its CUDA extensions; the installed package 'apex' has none (the PyPI project of "
            "that name is something else)"
        )
    return "needs NVIDIA apex, which is not installed (the PyPI project called 'apex' is something else)"


def make_kernel(config: OptimizerConfig) -> UpdateKernel:
    """The kernel that the config names."""
    return ApexAdamW(config) if config.kernel == "apex" else TorchAdamW(config)
