"""How gradients get into a bucket: in one native call, but for what is not plain memory."""

import pytest
import torch
from torch import nn

from ringreduce import _core, tensors
from ringreduce.buckets import plan_buckets
from ringreduce.codecs import Plain
from ringreduce.runs import Run
from ringreduce.testing import run_threads

LARGE = 2**20 + 3  # float32; above the size from which copies go past the caches


@pytest.fixture(autouse=True)
def core_knows_torch() -> None:
    """As it does once any bucket was allocated."""
    tensors.blank(1, torch.float32)


def ramp(*shape: int) -> torch.Tensor:
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)


@pytest.mark.parametrize("offset", [0, 1, 7, 16], ids="{}_off".format)
@pytest.mark.parametrize("length", [0, 1, 33, LARGE])
def test_every_element_arrives_and_no_other_changes(length: int, offset: int) -> None:
    memory = torch.full((offset + length + 20,), -1.0)
    target = memory[offset : offset + length]
    source = torch.cat([torch.zeros(5), ramp(length)])[5:]
    left = _core.Packer([target]).pack([source])
    assert not left or length == 0
    assert torch.equal(target, ramp(length))
    assert bool((memory[:offset] == -1).all())
    assert bool((memory[offset + length :] == -1).all())


def test_layouts_count_but_not_the_strides_of_a_single_row() -> None:
    images = ramp(2, 3, 4, 5).to(memory_format=torch.channels_last)
    row = torch.empty_strided((1, 4), (99, 1)).copy_(ramp(1, 4))
    targets = [torch.zeros_like(images), torch.zeros(1, 4), torch.zeros(3, 2), torch.zeros(4)]
    left = _core.Packer(targets).pack([images, row, ramp(2, 3).t(), ramp(2, 2)])
    assert left == [2, 3]
    assert torch.equal(targets[0], images)
    assert torch.equal(targets[1], row)
    assert not targets[2].any()
    assert not targets[3].any()


def test_what_is_not_plain_memory_is_left_out() -> None:
    x = torch.zeros(4)
    negative = torch.complex(ramp(4), ramp(4)).conj().imag
    assert negative.is_neg()
    lazy = negative, torch._efficientzerotensor((4,), dtype=torch.float32)
    sources = [None, ramp(4).to_sparse(), ramp(4).double(), x, *lazy, "text", ramp(4)]
    targets = [x.clone() for _ in sources]
    targets[3] = x
    assert _core.Packer(targets).pack(sources) == [0, 1, 2, 3, 4, 5, 6]
    assert torch.equal(targets[7], ramp(4))
    assert not any(target.any() for target in targets[:7])


@pytest.mark.parametrize("keeps", [True, False])
def test_unused_gradients_are_zeros_unless_they_are_kept(keeps: bool) -> None:
    def run(comm):
        parameters = [nn.Parameter(torch.zeros(3)) for _ in range(3)]
        named = [(str(i), parameter) for i, parameter in enumerate(parameters)]
        (bucket,) = plan_buckets(named, 2**20, 2**20)
        own = [parameters[int(place.name)] for place in bucket.places]
        reduced = Run(0, bucket, own, 0, comm, Plain())
        own[0].grad = ramp(3)
        own[1].grad = 2 * ramp(3)
        reduced.reduce(comm, Plain(), "sum", {1, 2}, None, keeps, False)
        return [slot.view.clone() for slot in reduced.slots]

    for used, stale, missing in run_threads(2, run):
        assert torch.equal(used, 2 * ramp(3))
        assert torch.equal(stale, 4 * ramp(3) if keeps else torch.zeros(3))
        assert torch.equal(missing, torch.zeros(3))
