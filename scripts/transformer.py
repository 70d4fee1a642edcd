"""Trains a small transformer to go on with a text, character by character.

    python scripts/transformer.py
    mpirun -np 4 python scripts/transformer.py --steps 1000

The text comes with Python: it is what help("if") and the like print. accumulation.py and resume.py
train the same network on the same text, each in another way.
"""

import argparse
import math
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from tqdm import tqdm

import ringreduce as rr

CHARACTERS = 256  # a character is a byte of UTF-8
TEST_PART = 0.1  # of the text is kept for testing


class Transformer(nn.Module):
    """Logits of the next character at each place of x, (rows, places), from those up to it."""

    def __init__(self, context: int, width: int, heads: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.characters = nn.Embedding(CHARACTERS, width)
        self.places = nn.Embedding(context, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width,
                heads,
                4 * width,
                dropout,
                "gelu",
                batch_first=True,
                norm_first=True,
                bias=False,  # those of the keys would have no gradient but rounding errors
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CHARACTERS, bias=False)
        self.head.weight = self.characters.weight  # one parameter for what comes in and goes out
        nn.init.normal_(self.head.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, dtype=self.head.weight.dtype)
        y = self.characters(x) + self.places(torch.arange(length))
        for layer in self.layers:
            y = layer(y, mask, is_causal=True)
        return self.head(self.norm(y))


def new_parser(description: str, steps: int) -> argparse.ArgumentParser:
    """The arguments of all three programs."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=32, help="rows of a batch, over all ranks")
    parser.add_argument("--context", type=int, default=64, help="characters of a row")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    args = parser.parse_args()
    if args.steps < 1 or args.batch < rr.size():
        parser.error(f"--steps must be 1 or more, --batch {rr.size()} (ranks) or more")
    return args


def load_text() -> tuple[Tensor, Tensor]:
    """Characters to train with and to test with, on every rank the same."""
    joined = "\n".join(topics[name] for name in sorted(topics)).encode()
    text = torch.frombuffer(bytearray(joined), dtype=torch.uint8)
    cut = int(len(text) * (1 - TEST_PART))
    return text[:cut], text[cut:]


def build_network(args: argparse.Namespace) -> Transformer:
    network = Transformer(args.context, args.width, args.heads, args.layers, args.dropout)
    return network.to(getattr(torch, args.dtype))


def draw_batch(
    text: Tensor, args: argparse.Namespace, sampler: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Rows of text, and the same rows one character later: each (batch, context).

    A sampler in the same state gives the same batch on every rank.
    """
    first = torch.randint(len(text) - args.context, (args.batch, 1), generator=sampler)
    rows = text[first + torch.arange(args.context + 1)].long()
    return rows[:, :-1], rows[:, 1:]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean over all characters, in bits."""
    return nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()) / math.log(2)


def train_step(
    model: rr.DistributedModel, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor
) -> Tensor:
    """One step on a batch that all ranks share. Returns this rank's addend of the loss."""
    mine, target = x[rr.rank() :: rr.size()], y[rr.rank() :: rr.size()]
    model.set_weight(len(mine))  # one more than others, where rows cannot be shared evenly
    loss = loss_of(model, mine, target)
    optimizer.zero_grad()
    loss.backward()  # when it returns, every .grad is the mean over the whole batch
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # so this needs no communication
    optimizer.step()
    return loss.detach() * len(mine) / len(x)


def train(model: rr.DistributedModel, text: Tensor, args: argparse.Namespace) -> Tensor:
    """Returns this rank's addend of the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    sampler = torch.Generator().manual_seed(args.seed)
    losses = torch.zeros(args.steps, dtype=torch.float64)
    for step in tqdm(range(args.steps), disable=rr.rank() != 0):
        losses[step] = train_step(model, optimizer, *draw_batch(text, args, sampler))
    return losses


def print_losses(losses: Tensor, args: argparse.Namespace) -> None:
    print(f"{rr.size()} ranks, {len(losses)} steps of {args.batch} rows")
    print(f"training loss {losses[:5].mean():.3f} at first, {losses[-5:].mean():.3f} at last")


@torch.no_grad()
def evaluate(model: nn.Module, text: Tensor, args: argparse.Namespace) -> float:
    """The loss on text that was not trained with. One rank may do this alone."""
    model.eval()
    rows = min(256, (len(text) - 1) // args.context)
    x, y = (text[i:][: rows * args.context].view(rows, -1).long() for i in (0, 1))
    loss = loss_of(model, x, y).item()
    model.train()
    return loss


@torch.no_grad()
def write(model: nn.Module, start: str, length: int, args: argparse.Namespace) -> str:
    """Goes on with the text after start. One rank may do this alone."""
    model.eval()
    text = torch.tensor([list(start.encode())])
    for _ in range(length):
        likely = model(text[:, -args.context :])[:, -1].softmax(1)
        text = torch.cat([text, likely.multinomial(1)], 1)
    model.train()
    return bytes(text[0].tolist()).decode(errors="replace")


def main() -> None:
    args = parse_arguments(new_parser("Trains a transformer on the text of help().", steps=400))
    torch.manual_seed(args.seed + rr.rank())  # so dropout is another one on each rank
    text, test_text = load_text()
    model = rr.DistributedModel(build_network(args))  # all ranks begin with rank 0's values
    losses = rr.allreduce(train(model, text, args))  # only to show them
    if rr.rank() == 0:
        print_losses(losses, args)
        print(f"test loss     {evaluate(model, test_text, args):.3f} bits per character")
        print(write(model, "The ", 300, args))


if __name__ == "__main__":
    main()
