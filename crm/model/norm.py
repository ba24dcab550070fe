"""BatchNorm whose statistics are those of the whole batch, also where several processes share it.

b = batch of this process, c = channels, h w = height and width
"""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> Tensor:
        total = grad_outputs[0].clone()
        dist.all_reduce(total)
        return total


class BatchNorm(nn.BatchNorm2d):
    """`nn.BatchNorm2d`; in training, with `sync`, over the images of all processes (on the CPU too).

    The released code has plain BatchNorm: each process its own statistics.
    """

    def __init__(self, channels: int, sync: bool) -> None:
        super().__init__(channels)
        self.sync = sync

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        if not (self.training and self.sync and dist.is_initialized()):
            return super().forward(input)
        count = input.new_tensor([input.numel() / input.shape[1]])
        dist.all_reduce(count)
        mean = _SumOverProcesses.apply(input.sum((0, 2, 3))) / count
        centred = input - mean[:, None, None]
        variance = _SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / count
        self._follow(mean.detach(), variance.detach() * count / (count - 1))
        scale = self.weight * (variance + self.eps).rsqrt()
        return centred * scale[:, None, None] + self.bias[:, None, None]

    @torch.no_grad()
    def _follow(self, mean: Float[Tensor, " c"], variance: Float[Tensor, " c"]) -> None:
        """Moves the running statistics as `nn.BatchNorm2d` does."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum or 0.1)
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum or 0.1)
