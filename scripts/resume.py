"""Writes checkpoints, and goes on from the last one when it is started again.

    mpirun -np 2 python scripts/resume.py --steps 100      # interrupt it and start it again
    mpirun -np 4 python scripts/resume.py --steps 200      # goes on, on more ranks

To the last bit, a run that was resumed ends where one without an interruption does. On another
number of ranks it goes on with the same batches, but another dropout; without dropout only rounding
differs, which training amplifies. Network and text are transformer.py's.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformer import (
    build_network,
    draw_batch,
    load_text,
    new_parser,
    parse_arguments,
    print_losses,
    train_step,
)

import ringreduce as rr


class Training:
    """All that its next steps depend on."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Collective. Of args.checkpoint, if there is such a file, or new."""
        torch.manual_seed(args.seed + rr.rank())  # so dropout is another one on each rank
        self.step = 0  # the next one
        network = build_network(args)
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr)
        self.sampler = torch.Generator().manual_seed(args.seed)  # the same on all ranks
        rest = None
        if rr.rank() == 0 and args.checkpoint.exists():  # only rank 0 needs to see the file
            rest = load(args.checkpoint, network, self.optimizer)
        self.model = rr.DistributedModel(network)  # all ranks get rank 0's values
        rest = rr.broadcast_object(rest)
        if rest is not None:
            rr.broadcast_optimizer_state(self.optimizer)
            self.step = rest["step"]
            self.sampler.set_state(rest["sampler"])
            if len(rest["random"]) == rr.size():
                mine = rest["random"][rr.rank()].clone()  # torch crashes on a part of a tensor
                torch.set_rng_state(mine)

    def save(self, file: Path) -> None:
        """Collective. Whatever happens, the file is the old checkpoint or the new one."""
        random = rr.allgather(torch.get_rng_state()[None])  # (ranks, bytes)
        if rr.rank() != 0:
            return
        state = {
            "step": self.step,
            "network": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sampler": self.sampler.get_state(),
            "random": random,
        }
        part = file.with_name(file.name + ".part")
        with part.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())  # before the file gets its name
        part.replace(file)


def load(file: Path, network: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns what is in the file beside network and optimizer. Raises ValueError naming it."""
    try:
        rest = torch.load(file, weights_only=True)  # unpickles nothing else
        network.load_state_dict(rest.pop("network"))
        optimizer.load_state_dict(rest.pop("optimizer"))
        return {name: rest[name] for name in ("step", "sampler", "random")}
    except Exception as error:  # of torch, zipfile, pickle: whatever half a file makes of them
        raise ValueError(
            f"{file} is no checkpoint of this network: truncated, or of other settings? Give "
            f"another one with --checkpoint, or remove it to begin anew ({error!r})"
        ) from error


def train(training: Training, text: Tensor, args: argparse.Namespace) -> Tensor:
    """Returns this rank's addend of the loss of each step, from the first that was left."""
    losses = []
    steps = range(training.step, args.steps)
    for step in tqdm(steps, total=args.steps, initial=training.step, disable=rr.rank() != 0):
        x, y = draw_batch(text, args, training.sampler)
        losses.append(train_step(training.model, training.optimizer, x, y))
        training.step = step + 1
        if training.step % args.every == 0 or training.step == args.steps:
            training.save(args.checkpoint)
    return torch.tensor(losses, dtype=torch.float64)


def main() -> None:
    parser = new_parser("Trains a transformer, with checkpoints.", steps=200)
    parser.set_defaults(dropout=0.1)
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoint.pt"))
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    args = parse_arguments(parser)
    if args.every < 1:
        parser.error("--every must be 1 or more")
    text, _ = load_text()
    training = Training(args)
    first = training.step
    losses = rr.allreduce(train(training, text, args))
    if rr.rank() == 0:
        print(f"steps {first} to {training.step}, written to {args.checkpoint}")
        if len(losses):
            print_losses(losses, args)


if __name__ == "__main__":
    main()
