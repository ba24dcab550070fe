"""The Triton kernels of deformable sampling against the gather: in Triton's interpreter, and on a GPU."""

import os
import subprocess
import sys

import pytest
import torch

from crm.model import sampling
from tests.test_sampling import SIZES, inputs

pytest.importorskip("triton", reason="needs Triton, which comes with PyTorch's CUDA builds")


def compared(kernel, device: str, spread: float, sizes=SIZES) -> None:
    """In float32; the reference is the gather in float64, and the gather in float32 says what rounding is."""
    exact = [x.detach().to(device).requires_grad_() for x in inputs(spread, sizes)]
    ours, theirs = ([x.detach().float().requires_grad_() for x in exact] for _ in range(2))
    outputs = kernel(*ours, sizes), sampling._gathered(*theirs, sizes), sampling._gathered(*exact, sizes)
    grad = torch.randn(outputs[2].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    found = [
        [output, *torch.autograd.grad(output, given, grad.to(output.dtype))]
        for output, given in zip(outputs, (ours, theirs, exact), strict=True)
    ]
    for name, one, two, three in zip(("output", "value", "offsets", "weights"), *found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(one.double(), three, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_interpreted_kernels_equal_the_gather():
    """In a process of its own: Triton decides at its import whether it interprets."""
    code = (
        "from crm.model.sampling_kernel import KernelSamples\n"
        "from tests.test_sampling_kernel import compared\n"
        "for spread in (0.3, 1.0, 30.0): compared(KernelSamples.apply, 'cpu', spread)\n"
        "compared(KernelSamples.apply, 'cpu', 1.0, ((1, 1), (1, 2), (2, 1)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_cpu_never_uses_a_kernel():
    value, offsets, weights = (x.float() for x in inputs(1.0))
    assert sampling._kernel_of(value, offsets, weights, SIZES) is None


@pytest.mark.gpu
@pytest.mark.parametrize("spread", [0.3, 1.0, 30.0])
def test_kernels_on_a_gpu_equal_the_gather(spread):
    from crm.model.sampling_kernel import KernelSamples

    compared(KernelSamples.apply, "cuda", spread)
