"""Sparse products of NVIDIA GPUs inside PyTorch, through the cuSPARSELt that torch ships with."""

from __future__ import annotations

import torch

from nm_compiler.runtime.backends.base import Backend, Job, Result


class CuSPARSELt(Backend):
    """Work in progress."""

    name = "cusparselt"

    def missing(self, dtype: torch.dtype, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"the model is on {device}: cuSPARSELt runs on NVIDIA GPUs, model.cuda() and inputs on the GPU"
        return "not there yet"

    def lower(self, job: Job) -> Result:
        raise NotImplementedError
