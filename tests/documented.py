"""The commands of README and docs, and what it takes to run them as they stand."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = r"python3? -m|torchrun|tensorboard|mkdocs|wandb|pip|source|kubectl|sysctl|sbatch"
STARTS = rf"(?:[A-Z_]+=\S+ )*(?:(?:{PROGRAMS}) |\./launch/)"

# What stands in for what the reader puts in.
FILLED = {
    r"\[(captions|format|run_dir)=(\w+)\]": r"\1=\2",  # what may be given is given
    "videos=DIR out=DIR captions=FILE": "videos=my_videos out=runs/again captions=table.csv",
    r"runs/a runs/b|\bRUN RUN\b": "runs/demo runs/demo_vae",
    r"\bRUN\b": "runs/demo",
    r"captions=http\S+": "captions=beside",
    r"runs=\[runs/footage\]": "runs=[runs/demo]",
    r"SHARDS\.\.\.": "shards/*.tar",
    r"\bFOLDER\b": "runs/folder",
    "node-0": "localhost",
    "/shared/": "shared/",
    r"--nnodes \.\.\.": "--nnodes 1 --nproc-per-node 2",
    "--nproc-per-node N": "--nproc-per-node 2",
    r"doctor \.\.\.": "doctor run_dir=runs/x",
    r"sample \.\.\.": "sample run_dir=runs/demo prompt=red out=clip.mp4",
}
# What goes with a command: what it needs, or what a text that only names it leaves out.
WHOLE = {
    r"data_tools\.lint$": "{} shards/*.tar",
    r"data_tools\.takedown": (
        "python -m data_tools.curate videos=raw out=runs/curated captions=beside min_seconds=1 short_side=32 && {}"
    ),
    r"sora_train\.plan$": "{} experiment=demo",
    r"sora_train\.import_deepspeed$": "{} --help",
    r"slurm\.sbatch$": "{} experiment=demo run_dir=runs/slurm",
    r"ema_length=": (
        "python -m sora_train.train experiment=demo run_dir=runs/x optim.ema_lengths=[0.05,0.1]"
        " checkpoint.snapshot_every=1 && {}"
    ),
    r"launch/multinode\.sh": "export NPROC=1; {} & {} && wait $!",  # on each of the two machines
}
# What makes a command end sooner, given behind it.
SMALLER = {
    r"data_tools\.make_demo": "clips=36 held_out=8 shard_clips=18",
    r"data_tools\.curate": "min_seconds=1 short_side=32",
    r"sora_train\.evaluate": "count=8",
    r"sora_train\.sample run_dir=Wan": "height=32 width=64 seconds=0.5 steps=2",
    r" steps=\d+": "steps=2",
    r"n_trials=": "hydra.sweeper.n_trials=2",
    r"pip install -e": "--dry-run --no-deps --no-build-isolation",
    r"benchmarks\.gpu_step": "tiny=true",
    r"benchmarks\.scaling": "tiny=true ranks=[1,2] rounds=1",
    r"benchmarks\.collectives": "rounds=1",
    r"sora_train\.calibrate": "rounds=1",
    r"tests\.faults\.bad_input": "each=1 tars=2 flips=4 hard=false dropped=false samples=0 clips=0",
    r"tests\.faults\.shard_counts": "shards=2 ranks=1 workers=1",
    r"tests\.faults\.campaign": (
        "kills=1 terms=1 damages=2 starts=1 nans=1 spikes=0 hangs=0 doubles=1 skews=0 disks=0 elastics=0 configs=1"
    ),
    r"benchmarks\.release_marks": "clips=2 unmarked=20",
    r"tests\.faults\.soak": "minutes=0.5 every_s=10",
    r"benchmarks\.model_step": "rounds=1 batches=1",
    r"^tensorboard": "--port 0",
    r"^mkdocs serve": "--dev-addr 127.0.0.1:8471",
}
# Commands that no test here runs, and why.
NOT_RUN = {
    "./launch/test.sh": "runs the tests, this one among them",
    "python -m pytest --campaign tests/runs/test_two_machines.py": "a test itself",
    "python3 -m venv .venv && .venv/bin/pip install torch --index-url https://download.pytorch.org/whl/cpu": (
        "fetches what is installed"
    ),
    "kubectl apply -f": "wants a cluster; tests/test_k8s.py checks the files",
    "sysctl net.ipv4.tcp_retries2=8": "changes the machine; tests/runs/test_two_machines.py does it in a namespace",
    'python -m sora_train.release init provider="Example Lab" contact=safety@example.org': (
        "writes into the user's own folder; tests/release does it elsewhere"
    ),
    "python -m sora_train.release verify video=clip.mp4": "wants a release folder; tests/release has one",
    "python -m sora_train.release verify video=clip.mp4 trust=root.pem release=off": "the same",
    'python -m sora_train.release sign video=theirs.mp4 out=signed.mp4 generator="Model X"': "the same",
    "python -m sora_train.release redteam run_dir=RUN prompts=FILE.jsonl out=FOLDER": "the same",
    "python -m sora_train.release redteam compare=[FOLDER,FOLDER]": "the same",
    "python -m sora_train.release cards run_dir=RUN facts=facts.yaml out=FOLDER": "wants facts; tests/release has some",
    'python -m sora_train.sample run_dir=RUN prompt="a red ring" expand=true out=clip.mp4': (
        "wants a server; tests/generation/test_expansion.py has one"
    ),
    "python -m data_tools.score shards=[runs/curated/*.tar] 'models={aesthetic: FOLDER}' out=runs/scores.parquet": (
        "wants a model; tests/data_tools/test_score.py has some"
    ),
    "python -m sora_train.serve run_dir=RUN": "runs for ever; tests/service starts and ends it",
    "python -m sora_train.serve run_dir=RUN add=ada seconds_per_day=60": "wants the key that it made; tests/service",
    "python -m sora_train.serve run_dir=RUN revoke=ada": "the same",
    "python -m pytest --campaign tests/service": "a test itself",
    "wandb sync": "wants a server; tests/test_dashboards.py reads what would be sent",
    "wandb sync RUN/wandb/*": "wants a server; tests/test_dashboards.py reads what would be sent",
}


def sessions(page: Path) -> list[list[str]]:
    """The commands of each code block of a page; the blocks of a numbered list go on from one another."""
    found: list[list[str]] = []
    numbered: list[str] = []
    for indent, block in re.findall(r"^( *)```\n(.*?)^ *```", _text(page), re.M | re.S):
        lines = [re.split(r" {2,}| # ", line.strip())[0] for line in block.splitlines()]
        given = [line for line in lines if re.match(STARTS, line)]
        if indent and not numbered:
            found.append(numbered)
        if indent:
            numbered += given
        elif given:
            found.append(given)
    return found


def commands() -> list[str]:
    """Every command in a code block or between backquotes."""
    found = {command for page in PAGES for session in sessions(page) for command in session}
    for page in PAGES:
        text = re.sub(r"^ *```", "", _text(page), flags=re.M)
        inline = [" ".join(quoted.split()) for quoted in re.findall(r"`([^`]+)`", text)]
        found |= {command for command in inline if re.match(STARTS, command)}
    return sorted(found)


def all_sessions() -> list[list[str]]:
    """What is given one after the other: the blocks, and each command that only stands in a sentence."""
    blocks = [session for page in PAGES for session in sessions(page)]
    once = [session for session in blocks if not any(set(session) < set(other) for other in blocks)]
    once = [session for n, session in enumerate(once) if session not in once[:n]]
    alone = set(commands()).difference(*once)
    return [*once, *([command] for command in sorted(alone))]


def as_run(command: str) -> str:
    """A command as a reader would give it who is short of time."""
    line = command
    for pattern, text in FILLED.items():
        line = re.sub(pattern, text, line)
    smaller = [text for pattern, text in SMALLER.items() if re.search(pattern, line) and "--help" not in line]
    line = " ".join([line, *smaller])
    for pattern, text in WHOLE.items():
        if re.search(pattern, line):
            line = text.replace("{}", line)
    return line


def _text(page: Path) -> str:
    """A page's text, lines that go on joined, without blocks of YAML and the like."""
    text = re.sub(r"\s*\\\n\s*", " ", page.read_text())
    return re.sub(r"^ *```\w+\n.*?^ *```$", "", text, flags=re.M | re.S)
