"""Trains a small network to read handwritten digits, on as many processes as mpirun starts.

    python scripts/train.py
    mpirun -np 4 python scripts/train.py --plot digits.png --check

Every process, called a rank, runs this file from top to bottom. Three lines make plain PyTorch
distributed; they are marked with "<--". The data comes with scikit-learn.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from itertools import islice

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import ringreduce as rr

TRAIN_ROWS = 1440  # of the 1797 digits: 8 by 8 pixels each, values 0 to 16
PARAMETER_TOLERANCE = 1e-12  # of --check with float64, relative to the largest of each tensor
LOSS_TOLERANCE = 1e-5  # of --check with float32, relative
LOSS_STEPS = 100  # float32: rounding differs with the number of ranks, and training amplifies it


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains on scikit-learn's digits.")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--steps", type=int, help="stop after so many batches")
    parser.add_argument("--batch", type=int, default=240, help="rows of a batch, over all ranks")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="FILE.png", help="draw loss and accuracy")
    parser.add_argument("--check", action="store_true", help="compare with one process on its own")
    args = parser.parse_args()
    if not 0 < args.batch <= TRAIN_ROWS or args.batch % rr.size():
        # Gradients are averaged over ranks, so each must stand for equally many rows.
        parser.error(f"--batch must be a multiple of {rr.size()} (ranks), and at most {TRAIN_ROWS}")
    steps = args.epochs * (TRAIN_ROWS // args.batch)
    args.steps = steps if args.steps is None else min(args.steps, steps)
    if args.steps < 1:
        parser.error("there is no step to train: give --epochs and --steps above 0")
    return args


def load_data(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pixels (1797, 64) and digits (1797,), in the same random order on every rank."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(digits.data / 16, dtype=dtype)[order], torch.tensor(digits.target)[order]


def build_network(dtype: torch.dtype, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)]
    return nn.Sequential(*layers).to(dtype)


def batches(args: argparse.Namespace) -> Iterator[Tensor]:
    """Row numbers of each batch, the same on every rank and for every number of ranks."""
    generator = torch.Generator().manual_seed(args.seed)
    while True:
        order = torch.randperm(TRAIN_ROWS, generator=generator)
        yield from (rows for rows in order.split(args.batch) if len(rows) == args.batch)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Of the digits that are kept for testing. One rank may do this alone."""
    with torch.no_grad():
        return (model(x[TRAIN_ROWS:]).argmax(1) == y[TRAIN_ROWS:]).double().mean().item()


def train(
    model: nn.Module, x: Tensor, y: Tensor, args: argparse.Namespace, rank: int, size: int
) -> tuple[Tensor, list[float], float]:
    """Trains on this rank's rows of every batch.

    Returns the loss of each step over these rows, the accuracy after each epoch (on rank 0), and
    the seconds that it took.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    losses = torch.empty(args.steps, dtype=x.dtype)
    accuracies = []
    progress = tqdm(islice(batches(args), args.steps), total=args.steps, disable=rank != 0)
    start_s = time.perf_counter()
    for step, rows in enumerate(progress):
        mine = rows[rank::size]  # <-- every rank takes other rows
        loss = nn.functional.cross_entropy(model(x[mine]), y[mine])
        optimizer.zero_grad()
        loss.backward()  # when it returns, every .grad is the mean over all ranks
        optimizer.step()
        losses[step] = loss.detach()
        if rank == 0 and (step + 1) % (TRAIN_ROWS // args.batch) == 0:
            accuracies.append(accuracy(model, x, y))
            progress.set_postfix(accuracy=f"{accuracies[-1]:.3f}", refresh=False)
    return losses, accuracies, time.perf_counter() - start_s


def check(model: nn.Module, losses: Tensor, x: Tensor, y: Tensor, args: argparse.Namespace) -> bool:
    """Trains the same network in this process alone, on the whole batches, and compares."""
    alone = build_network(x.dtype, args.seed)
    alone_losses, *_ = train(alone, x, y, args, rank=0, size=1)
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    difference = torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).max()
    first, first_alone = losses[:LOSS_STEPS], alone_losses[:LOSS_STEPS]
    loss_difference = ((first - first_alone).abs() / first_alone).max()
    print(f"check: largest relative difference of parameters {difference:.1e}")
    print(f"check: of the losses of {len(first)} steps {loss_difference:.1e}")
    if x.dtype == torch.float64:
        return bool(difference <= PARAMETER_TOLERANCE)
    return bool(loss_difference <= LOSS_TOLERANCE)


def plot(file: str, losses: Tensor, accuracies: list[float], steps_per_epoch: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    left.semilogy(losses)
    left.set(xlabel="step", ylabel="loss, mean of all ranks")
    right.plot(range(steps_per_epoch, len(losses) + 1, steps_per_epoch), accuracies)
    right.set(xlabel="step", ylabel="accuracy on the test digits")
    figure.savefig(file)


def main() -> int:
    args = parse_arguments()
    rank, size = rr.rank(), rr.size()
    x, y = load_data(getattr(torch, args.dtype))
    network = build_network(x.dtype, args.seed + rank)
    model = rr.DistributedModel(network)  # <-- all ranks begin with rank 0's values
    losses, accuracies, elapsed_s = train(model, x, y, args, rank, size)
    losses = rr.allreduce(losses, "avg")  # <-- only to show them: the loss of the whole batch
    passed = True
    if rank == 0:
        print(f"{size} ranks, {args.steps} steps of {args.batch} digits in {elapsed_s:.2f} s")
        print(f"test accuracy {accuracy(model, x, y):.3f}")
        print(f"samples/s     {args.steps * args.batch / elapsed_s:.0f}")
        print(f"communication {model.stats()['wait_s'] / elapsed_s:.1%} of the time")
        if args.plot:
            plot(args.plot, losses, accuracies, TRAIN_ROWS // args.batch)
        passed = not args.check or check(model, losses, x, y, args)
    return 0 if rr.broadcast_object(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
