"""Accumulates gradients over parts of a batch, with autocast: for batches that memory cannot hold.

    mpirun -np 2 python scripts/accumulation.py --parts 4
    mpirun -np 2 python scripts/accumulation.py --parts 4 --autocast float16

Gradients of all parts but the last stay on their rank; the last backward reduces their sum, once.
Network and text are transformer.py's.
"""

import argparse
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformer import (
    build_network,
    draw_batch,
    load_text,
    loss_of,
    new_parser,
    parse_arguments,
    print_losses,
)

import ringreduce as rr


def train(model: rr.DistributedModel, text: Tensor, args: argparse.Namespace) -> Tensor:
    """Returns this rank's addend of the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    sampler = torch.Generator().manual_seed(args.seed)
    # float16 needs it for its small range; one that is not enabled changes nothing.
    scaler = torch.amp.GradScaler("cpu", enabled=args.autocast == "float16")
    losses = torch.zeros(args.steps, dtype=torch.float64)
    for step in tqdm(range(args.steps), disable=rr.rank() != 0):
        optimizer.zero_grad()
        losses[step] = accumulate(model, scaler, draw_batch(text, args, sampler), args)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)  # all ranks skip it, where a gradient of any is infinite or NaN
        scaler.update()
    return losses


def accumulate(
    model: rr.DistributedModel,
    scaler: torch.amp.GradScaler,
    batch: tuple[Tensor, Tensor],
    args: argparse.Namespace,
) -> float:
    """Leaves the gradient of the whole batch, scaled. Returns this rank's addend of the loss."""
    x, y = (whole[rr.rank() :: rr.size()] for whole in batch)
    model.set_weight(len(x))  # the rows of all parts, for they are reduced together
    parts = list(zip(x.chunk(args.parts), y.chunk(args.parts), strict=True))
    total = 0.0
    for i, (x_part, y_part) in enumerate(parts):
        last = i == len(parts) - 1
        with nullcontext() if last else model.no_sync(), autocast(args.autocast):
            loss = loss_of(model, x_part, y_part) * len(x_part) / len(x)
        scaler.scale(loss).backward()
        total += loss.item()
    return total * len(x) / args.batch


def autocast(name: str) -> torch.autocast:
    if name == "none":
        return torch.autocast("cpu", enabled=False)
    return torch.autocast("cpu", getattr(torch, name))


def main() -> None:
    parser = new_parser("Trains a transformer with accumulated gradients.", steps=200)
    parser.add_argument("--parts", type=int, default=4, help="of the rows of each rank")
    parser.add_argument("--autocast", choices=("bfloat16", "float16", "none"), default="bfloat16")
    args = parse_arguments(parser)
    if args.parts < 1:
        parser.error("--parts must be 1 or more")
    torch.manual_seed(args.seed + rr.rank())
    text, _ = load_text()
    model = rr.DistributedModel(build_network(args))
    losses = rr.allreduce(train(model, text, args))
    if rr.rank() == 0:
        print_losses(losses, args)
        print(f"{model.stats()['backwards']} of {args.steps * args.parts} backwards were reduced")


if __name__ == "__main__":
    main()
