"""Mixed precision as torch has it: autocast, loss scaling, master weights, clipping."""

import copy

import pytest
import torch
from torch import nn
from wrapped import assert_close, assert_equal, build, gradients, mean, mlp, normal, run_copies


def plain_loss(model, rank):
    return model(normal(4, 3, seed=rank).float()).square().sum()


def small():
    return build(lambda: mlp(3, 5, 2)).float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Parameters and gradients are float32; where the context is entered does not matter."""
    model = small()

    def loss(m, rank):
        with torch.autocast("cpu", dtype):
            return plain_loss(m, rank).float()

    def run(wrapped, rank):
        for _ in range(2):
            wrapped.zero_grad()
            loss(wrapped, rank).backward()
        return gradients(wrapped)

    for grads in run_copies(2, model, run):
        assert all(grad.dtype == torch.float32 for grad in grads.values())
        assert_close(grads, mean(2, model, loss), 1e-6)


@pytest.mark.parametrize("compression", [None, "bf16", "fp16"])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_infinity_on_one_rank_skips_the_step_on_all(compression, bad):
    """And the scales stay equal; the next step is done by all."""
    model = small()

    def run(wrapped, rank):
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        found = []
        for step in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = plain_loss(wrapped, rank).float()
            if step == 1 and rank == 1:
                loss = loss * bad
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            values = {name: x.detach().clone() for name, x in wrapped.named_parameters()}
            found.append((scaler.get_scale(), values))
        return found

    first, second = run_copies(2, model, run, compression=compression)
    for (scale, values), (other_scale, other_values) in zip(first, second, strict=True):
        assert scale == other_scale
        assert_equal(values, other_values)
    assert [scale for scale, _ in first] == [256.0, 128.0, 128.0]
    assert_equal(first[1][1], first[0][1])
    assert any(not torch.equal(x, first[1][1][name]) for name, x in first[2][1].items())


def test_too_large_for_float16_skips_the_step():
    """What is finite on every rank, but not on the wire."""

    def run(wrapped, rank):
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
        before = wrapped.weight.detach().clone()
        scaler.scale(wrapped(torch.ones(1, 2)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(wrapped.weight, before)
        return scaler.get_scale()

    assert run_copies(2, nn.Linear(2, 2), run, compression="fp16") == [2.0**19] * 2


def test_accumulation_with_a_scaler():
    model = small()

    def run(wrapped, rank):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        with wrapped.no_sync():
            scaler.scale(plain_loss(wrapped, rank)).backward()
        scaler.scale(plain_loss(wrapped, rank + 2)).backward()
        scaler.unscale_(optimizer)
        return gradients(wrapped)

    expected = mean(2, model, plain_loss, lambda m, rank: plain_loss(m, rank + 2))
    for grads in run_copies(2, model, run):
        assert_close(grads, expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_weights(dtype):
    """A model of 16 bits, stepped in float32: all ranks keep the same masters."""

    def run(wrapped, rank):
        masters = [x.detach().float().requires_grad_() for x in wrapped.parameters()]
        optimizer = torch.optim.Adam(masters, lr=0.01)
        for step in range(5):
            wrapped.zero_grad()
            wrapped(normal(4, 3, seed=rank + 2 * step).to(dtype)).square().sum().backward()
            for master, x in zip(masters, wrapped.parameters(), strict=True):
                master.grad = x.grad.float()
            optimizer.step()
            with torch.no_grad():
                for master, x in zip(masters, wrapped.parameters(), strict=True):
                    x.copy_(master)
        return {str(i): master.detach() for i, master in enumerate(masters)}

    start = build(lambda: mlp(3, 5, 2)).to(dtype)
    before = copy.deepcopy(start)
    a, b = run_copies(2, start, run)
    assert_equal(a, b)
    for master, x in zip(a.values(), before.parameters(), strict=True):
        assert not torch.equal(master, x.float())
