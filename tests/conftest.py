"""Shared set-up: the Triton interpreter, one thread (a busy machine makes two slower than one), poisoned memory."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Every float tensor that the package allocates empty is NaN, so that an unwritten output shows."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        out = new_empty(self, *args, **kwargs)
        if out.is_floating_point() and out.device.type != "meta":
            out.fill_(float("nan"))
        return out

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
