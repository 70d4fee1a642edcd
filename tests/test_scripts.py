"""The programs that people learn from: they run, learn, and do what one process would.

scripts/train.py has tests of its own.
"""

import os
import re
import sys
from pathlib import Path

import pytest
import torch
from jobs import run_to_end

SCRIPTS = Path(__file__).parents[1] / "scripts"
SMALL = ["--batch=7", "--context=16", "--width=16", "--heads=2", "--dtype=float64"]

# 7 rows on 2 ranks: 4 and 3. The reference knows nothing of ranks, parts and weights.
EQUALS_ONE_PROCESS = f"""
import sys
sys.path.insert(0, {str(SCRIPTS)!r})
import torch
import ringreduce as rr
import accumulation, transformer

def arguments_of(parser, *more):
    sys.argv = ["", "--steps=6", *{SMALL}, *more]
    return transformer.parse_arguments(parser)

def alone(text, args):
    network = transformer.build_network(args)
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr)
    sampler = torch.Generator().manual_seed(args.seed)
    losses = []
    for _ in range(args.steps):
        loss = transformer.loss_of(network, *transformer.draw_batch(text, args, sampler))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    return network, torch.stack(losses)

text, _ = transformer.load_text()
args = arguments_of(transformer.new_parser("", 1))
torch.manual_seed(0)
expected, expected_losses = alone(text, args)
for program, parts, autocast, tolerance in (
    (transformer, 1, "none", 1e-12),
    (accumulation, 3, "none", 1e-12),
    (accumulation, 2, "bfloat16", 0.1),
    (accumulation, 2, "float16", 0.1),
):
    args.parts, args.autocast = parts, autocast
    torch.manual_seed(rr.rank())
    network = transformer.build_network(args)
    if autocast != "none":
        network.float()
    model = rr.DistributedModel(network)
    losses = rr.allreduce(program.train(model, text, args))
    case = program.__name__, autocast
    assert (losses - expected_losses).abs().max() <= tolerance, (case, losses, expected_losses)
    assert model.stats()["backwards"] == args.steps, case
    for (name, x), y in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert (x - y).abs().max() <= tolerance * y.abs().max(), (case, name, x - y)

sys.argv = ["", "--steps=10", "--parts=3"]
accumulation.main()
print("accumulated", flush=True)
"""


def losses_in(output: str) -> list[float]:
    return [float(x) for x in re.findall(r"loss (\S+) at first, (\S+) at last", output)[0]]


@pytest.mark.core
def test_transformer_learns(mpirun):
    done = mpirun(2, [str(SCRIPTS / "transformer.py"), "--steps=40"], timeout_s=90)
    assert done.returncode == 0, done.stderr
    assert "2 ranks, 40 steps of 32 rows" in done.stdout
    first, last = losses_in(done.stdout)
    assert last < 0.75 * first
    tested = re.search(r"test loss +(\S+) bits", done.stdout)
    assert tested and float(tested[1]) < 0.75 * first
    assert "The " in done.stdout


# Runs the program several times in one job, as main() would be by as many jobs.
RESUME = f"""
import sys
sys.path.insert(0, {str(SCRIPTS)!r})
import torch
import ringreduce as rr
import resume

def run(name, steps, *more):
    torch.manual_seed(99)  # nothing comes from the run before but by the file
    sys.argv = ["", f"--steps={{steps}}", f"--checkpoint={{name}}.pt", "--every=4", *{SMALL}, *more]
    resume.main()

run("whole", 10)
for steps in (4, 7, 10):
    run("parts", steps)
rr.barrier()
half = resume.Path(f"half{{rr.rank()}}.pt")
half.write_bytes(resume.Path("parts.pt").read_bytes()[:-1000])
other = torch.nn.Linear(1, 1)
for file in half, resume.Path("parts.pt"):  # truncated; of another network
    try:
        resume.load(file, other, torch.optim.AdamW(other.parameters()))
    except ValueError as error:
        assert f"{{file}} is no checkpoint" in str(error)
    else:
        raise AssertionError("no error")
run("even", 4, "--dropout=0")
run("even_whole", 10, "--dropout=0")

def fail(descriptor):
    raise OSError("no space left")
resume.os.fsync = fail
run("parts", 12)  # the last: it ends the job
"""


def assert_same(a: object, b: object, tolerance: float, path: str = "") -> None:
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert isinstance(b, dict) and a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], tolerance, f"{path}.{key}")
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.is_floating_point():
            assert (a - b).abs().max() <= tolerance * b.abs().max(), path
        else:
            assert torch.equal(a, b), path
    else:
        assert a == b, path


def test_accumulation_equals_one_process_and_resume_the_whole(mpirun, tmp_path, monkeypatch):
    """One job for both, since most of its time goes into imports.

    Interrupted twice, with dropout: the same bits. On other ranks: the same up to rounding.
    """
    monkeypatch.chdir(tmp_path)
    done = mpirun(2, EQUALS_ONE_PROCESS + RESUME, timeout_s=120)
    assert done.stdout.count("accumulated") == 2, done.stderr
    assert "10 of 30 backwards were reduced" in done.stdout
    first, last = losses_in(done.stdout)
    assert last < first
    assert done.returncode != 0 and "no space left" in done.stderr, done.stderr
    assert "steps 7 to 10" in done.stdout
    command = [sys.executable, str(SCRIPTS / "resume.py"), "--steps=10", *SMALL]
    done = run_to_end(
        [*command, "--dropout=0", "--checkpoint=even.pt"], dict(os.environ), timeout_s=60
    )
    assert done.returncode == 0 and "steps 4 to 10" in done.stdout, done.stderr
    whole, parts, even, even_whole = (
        torch.load(f"{name}.pt", weights_only=True)
        for name in ("whole", "parts", "even", "even_whole")
    )
    assert whole["step"] == 10 and whole["random"].shape[0] == 2
    assert_same(parts, whole, 0.0)
    assert not torch.equal(whole["random"][0], whole["random"][1])
    assert even.pop("random").shape[0] == 1
    del even_whole["random"]
    assert_same(even, even_whole, 1e-10)
