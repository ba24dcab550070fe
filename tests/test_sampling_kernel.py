"""The Triton kernels of deformable sampling against the gather: in Triton's interpreter, and on a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from crm.model import sampling
from tests.test_sampling import SIZES, inputs

triton = pytest.importorskip("triton", reason="needs Triton, which comes with PyTorch's CUDA builds")
from triton import knobs  # noqa: E402 - what is here without Triton ends above
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from crm.model import sampling_kernel  # noqa: E402


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


@pytest.mark.parametrize("capability", [80, 90])  # Ampere, Hopper
@pytest.mark.parametrize("name", ["_forward", "_backward"])
def test_kernels_are_compiled_to_machine_code_that_moves_four_numbers_at_once(name, capability, tmp_path):
    """With what Triton sees at a call with the published sizes: where tensors begin, what channels divide by."""
    constants = {"LEVELS": 3, "POINTS": 4, "WIDE": 32, "ROWS": sampling_kernel.ROWS}
    kernel = getattr(sampling_kernel, name)
    kinds = dict.fromkeys(kernel.arg_names, "*fp32")
    kinds |= {"levels": "*i32", **dict.fromkeys(("rows", "tokens", "heads", "channels"), "i32")}
    kinds |= dict.fromkeys(constants, "constexpr")
    by_16 = [one for one, kind in kinds.items() if kind.startswith("*") or one in ("rows", "channels")]
    source = ASTSource(
        kernel, kinds, {(kernel.arg_names.index(one),): value for one, value in constants.items()},
        {(kernel.arg_names.index(one),): [["tt.divisibility", 16]] for one in by_16},
    )  # fmt: skip
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": True})
    assert len(made.asm["cubin"]) > 1000
    assert "ld.global.v4" in made.asm["ptx"]
    if name == "_backward":
        assert ("red.global.gpu.relaxed.add.v4.f32" in made.asm["ptx"]) == (capability >= 90)
    file = tmp_path / "kernel.cubin"
    file.write_bytes(made.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    used = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
    assert re.findall(r"\bLOCAL:(\d+)", used) == ["0"]  # its registers are enough


def test_a_cpu_never_uses_a_kernel():
    value, offsets, weights = (x.float() for x in inputs(1.0))
    assert sampling._kernel_of(value, offsets, weights, SIZES) is None


@pytest.mark.gpu
@pytest.mark.parametrize("spread", [0.3, 1.0, 30.0])
def test_kernels_on_a_gpu_equal_the_gather(spread):
    from crm.model.sampling_kernel import KernelSamples

    compared(KernelSamples.apply, "cuda", spread)
