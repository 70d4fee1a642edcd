"""Training in a world of any size, against one process on the union of all ranks' rows.

In the suite: in a world of one; test_mpirun.py has it run in one of three under real mpirun. Every
rank begins elsewhere, so that rank 0's values must have come to it, and has another number of rows,
some none.
"""

import copy

import pytest
import torch
from torch import nn
from wrapped import assert_close, assert_equal, build, gradients, mlp, normal

import ringreduce as rr

ROWS, STEPS = 12, 4


@pytest.fixture(scope="module", autouse=True)
def world():
    rr.init()
    yield
    if rr.size() == 1:  # under mpirun it stays open for other files
        rr.shutdown()


def batch(step):
    return normal(ROWS, 3, seed=2 * step), normal(ROWS, 2, seed=2 * step + 1)


def rows_of(step, rank):
    return [i for i in range(ROWS) if (i * i + step) % rr.size() == rank]


def mine(step):
    rows = rows_of(step, rr.rank())
    return [whole[rows] for whole in batch(step)]


def loss_of(model, x, y):
    """Of no rows it is NaN, and so are its gradients."""
    return nn.functional.mse_loss(model(x), y)


def models(factory, convert=None, **options):
    """This rank's part of a distributed model, and the same for one process."""
    module = build(factory, seed=rr.rank())
    wrapped = rr.DistributedModel(convert(module) if convert else module, **options)
    return wrapped, build(factory, seed=0)


def values(model):
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def assert_trained(wrapped, alone, tolerance=1e-12):
    mine = values(wrapped)
    assert_equal(mine, rr.broadcast_object(mine))  # the same bits on all ranks
    assert_close(mine, values(alone), tolerance)


@pytest.mark.world
@pytest.mark.parametrize("bucket_mb", [25, 1e-4])
def test_weights(bucket_mb):
    wrapped, alone = models(lambda: mlp(3, 5, 2), bucket_mb=bucket_mb, first_bucket_mb=bucket_mb)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (wrapped, alone)]
    for step in range(STEPS):
        x, y = mine(step)
        wrapped.set_weight(len(x))
        for model, optimizer, part in zip(
            (wrapped, alone), optimizers, ((x, y), batch(step)), strict=True
        ):
            optimizer.zero_grad()
            loss_of(model, *part).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
    assert_trained(wrapped, alone)


def steps_of(rank):
    return (2 * rank + 2) % 6  # 2, 4, 0, 2, ...


@pytest.mark.world
@pytest.mark.parametrize("divide_by_initial_world_size", [True, False])
def test_join(divide_by_initial_world_size):
    """Rank 2 of 3 has no data at all. Afterwards they go on together."""
    wrapped, alone = models(lambda: mlp(3, 5, 2))
    optimizer, reference = (torch.optim.Adam(m.parameters(), lr=0.01) for m in (wrapped, alone))

    def of_rank(model, step, rank):
        x, y = batch(100 * rank + step)
        return loss_of(model, x, y)

    with wrapped.join(divide_by_initial_world_size) as joined:
        for step in range(steps_of(rr.rank())):
            optimizer.zero_grad()
            of_rank(wrapped, step, rr.rank()).backward()
            optimizer.step()
    longest = max(map(steps_of, range(rr.size())))
    assert joined.root == [steps_of(rank) for rank in range(rr.size())].index(longest)
    rr.broadcast_optimizer_state(optimizer, joined.root)
    optimizer.zero_grad()
    of_rank(wrapped, 50, rr.rank()).backward()
    optimizer.step()

    for step in [*range(longest), 50]:
        here = [rank for rank in range(rr.size()) if step == 50 or step < steps_of(rank)]
        divisor = rr.size() if divide_by_initial_world_size else len(here)
        reference.zero_grad()
        (sum(of_rank(alone, step, rank) for rank in here) / divisor).backward()
        reference.step()
    assert_trained(wrapped, alone)


@pytest.mark.world
def test_join_with_weights():
    """One pass over a data set of which every rank has another share: exact, to the last row."""
    x, y = normal(15, 3), normal(15, 2, seed=1)
    shares = [list(range(rank * rank % 5, 15, rr.size() + rank)) for rank in range(rr.size())]
    if rr.size() > 1:
        shares[-1] = []
    wrapped, alone = models(lambda: mlp(3, 5, 2))
    optimizer, reference = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (wrapped, alone))

    def pieces(rank):
        return [shares[rank][i : i + 2] for i in range(0, len(shares[rank]), 2)]

    with wrapped.join():
        for rows in pieces(rr.rank()):
            optimizer.zero_grad()
            wrapped.set_weight(len(rows))
            loss_of(wrapped, x[rows], y[rows]).backward()
            optimizer.step()
    for step in range(max(len(pieces(rank)) for rank in range(rr.size()))):
        union = [row for rank in range(rr.size()) for row in sum(pieces(rank)[step : step + 1], [])]
        reference.zero_grad()
        loss_of(alone, x[union], y[union]).backward()
        reference.step()
    assert_trained(wrapped, alone)


@pytest.mark.world
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_sync_batch_norm(backend):
    """The union's statistics; a loss that is scaled, as layers mix the rows of all ranks.

    Also compiled: around the layer.
    """

    def factory():
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))

    wrapped, alone = models(factory, rr.convert_sync_batchnorm)
    if backend is not None:
        wrapped.module.compile(backend=backend)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (wrapped, alone)]
    for step in range(STEPS):
        for model, optimizer, (x, y), share in zip(
            (wrapped, alone), optimizers, (mine(step), batch(step)), (rr.size(), 1), strict=True
        ):
            optimizer.zero_grad()
            ((model(x) - y).square().sum() * share / ROWS).backward()
            optimizer.step()
    assert_trained(wrapped, alone)
    wrapped.eval()
    if rr.rank() == 0:  # alone: nobody waits
        assert_close({"": wrapped(batch(0)[0]).detach()}, {"": alone.eval()(batch(0)[0]).detach()})


@pytest.mark.world
@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_codecs(name, dtype):
    """To the last bit: rounded once on each rank, summed in float32, rounded once more."""
    wrapped, alone = models(lambda: mlp(3, 16, 2), compression=name)

    def loss(model, step, rank):
        x, y = batch(100 * rank + step)
        return nn.functional.mse_loss(model(x), y)

    for step in range(STEPS):
        wrapped.zero_grad()
        loss(wrapped, step, rr.rank()).backward()
        total = {}
        for rank in range(rr.size()):
            twin = copy.deepcopy(alone)
            loss(twin, step, rank).backward()
            for key, grad in gradients(twin).items():
                total[key] = total.get(key, 0) + grad.to(dtype).float()
        if rr.size() > 1:
            assert_equal(
                gradients(wrapped),
                {key: (x / rr.size()).to(dtype).double() for key, x in total.items()},
            )
            numbers = sum(x.numel() for x in alone.parameters())
            assert 2 * numbers <= wrapped.stats()["bytes"] / (step + 1) < 3 * numbers


@pytest.mark.world
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_scaler(bad):
    """What is infinite on one rank alone is so in one process on the union, too."""
    wrapped, alone = models(lambda: mlp(3, 5, 2))
    for model, spoils in ((wrapped, rr.rank() == 1 % rr.size()), (alone, True)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        scales = []
        for step in range(3):
            optimizer.zero_grad()
            x, y = mine(step) if model is wrapped else batch(step)
            loss = (model(x) - y).square().sum() * (rr.size() if model is wrapped else 1)
            scaler.scale(loss * bad if spoils and step == 1 else loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        assert scales == [256.0, 128.0, 128.0]
    assert_trained(wrapped, alone)


@pytest.mark.world
def test_autocast_with_a_scaler():
    """The same bits on all ranks, near to one process; a step that one rank spoils is nobody's."""
    wrapped, alone = models(lambda: mlp(3, 8, 2))
    wrapped.float()
    for model, spoils in ((wrapped, rr.rank() == 1 % rr.size()), (alone, True)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=model is wrapped)
        for step in range(STEPS):
            if step == 1 and model is alone:
                continue
            optimizer.zero_grad()
            x, y = mine(step) if model is wrapped else batch(step)
            share = rr.size() if model is wrapped else 1
            with torch.autocast("cpu", torch.bfloat16, enabled=model is wrapped):
                outputs = model(x.float() if model is wrapped else x)
                loss = (outputs - y).square().sum() * share / ROWS
            scaler.scale(loss * torch.inf if spoils and step == 1 else loss).backward()
            scaler.step(optimizer)
            scaler.update()
    assert_trained(wrapped, alone.float(), 0.05)
