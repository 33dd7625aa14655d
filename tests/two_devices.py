"""Batch norm in two processes, run by `compiled.py`: its result, gradients and statistics are checked here."""

from common.networks.projectors import BatchNorm, refuse_single_images, share_statistics

import pytest
import torch
import torch.distributed as dist
from torch import nn


def batch_norm_of_two(rank: int) -> None:
    """Compare batch norm of half a batch in each process with PyTorch's of the whole batch."""
    torch.manual_seed(0)
    whole, weight = torch.randn(6, 5), torch.randn(6, 5)
    ours, plain = BatchNorm(5), nn.BatchNorm1d(5)
    mine, everything = whole[rank::2].clone().requires_grad_(), whole.clone().requires_grad_()
    answer, expected = ours(mine), plain(everything)
    torch.testing.assert_close(answer, expected[rank::2])
    (answer * weight[rank::2]).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(mine.grad, everything.grad[rank::2])  # pyright: ignore
    gradient = ours.weight.grad.clone()  # pyright: ignore
    dist.all_reduce(gradient)
    torch.testing.assert_close(gradient, plain.weight.grad)
    torch.testing.assert_close(ours.state_dict(), plain.state_dict())
    assert not ours.eval()(mine).equal(answer)  # running statistics then

    apart, alone = BatchNorm(5, together=False), nn.BatchNorm1d(5)
    torch.testing.assert_close(apart(mine), alone(mine))
    mean, variance = apart.running_mean.clone(), apart.running_var.clone()  # pyright: ignore
    share_statistics(nn.Sequential(apart, ours))
    for shared, own in ((apart.running_mean, mean), (apart.running_var, variance)):
        dist.all_reduce(own)
        torch.testing.assert_close(shared, own / 2)
    torch.testing.assert_close(ours.state_dict(), plain.state_dict())

    refuse_single_images(BatchNorm(5), 1)  # two devices have two images
    with pytest.raises(ValueError, match="batch norm needs at least two images"):
        refuse_single_images(BatchNorm(5, together=False), 1)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    batch_norm_of_two(dist.get_rank())
    dist.destroy_process_group()
