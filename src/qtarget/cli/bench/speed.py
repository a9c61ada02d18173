"""``qtarget bench speed``, ``sweep``, ``figure`` and ``trainer``: how fast and how small the loss is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from qtarget.benchmarks.speed.losses import SUITES, SpeedConfig, run_speed
from qtarget.benchmarks.speed.memory import MEMORY, run_memory
from qtarget.benchmarks.speed.sweep import SweepConfig, previous, run_sweep
from qtarget.cli.bench.tables import memory_table, speed_table, sweep_table, trainer_table
from qtarget.cli.options.interrupts import on_interrupt
from qtarget.cli.options.outputs import check_outputs, check_writable, saver
from qtarget.cli.options.settings import is_said
from qtarget.core.errors import ConfigError

DEFAULTS = SpeedConfig()
SWEEP = SweepConfig()
DTYPES, DEVICES = ("float32", "bfloat16"), ("cpu", "cuda")


def listed(values: tuple[int, ...]) -> str:
    """Numbers as an option takes them."""
    return ",".join(map(str, values))


def speed(
    output: Annotated[Path, typer.Option(help="Raw results, JSON.")] = Path("runs/speed.json"),
    tokens: Annotated[int, typer.Option(min=1, help="Supervised tokens.")] = DEFAULTS.tokens,
    width: Annotated[int, typer.Option(min=1, help="Width of the hidden states.")] = DEFAULTS.width,
    vocab: Annotated[int, typer.Option(min=128, help="Size of the vocabulary.")] = DEFAULTS.vocab,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = DEFAULTS.dtype,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = DEFAULTS.device,
    rounds: Annotated[int, typer.Option(min=1, help="Counted rounds; medians are quoted.")] = DEFAULTS.rounds,
    top_k: Annotated[int, typer.Option(min=1, help="k of the cached teacher.")] = DEFAULTS.top_k,
    suite: Annotated[str, typer.Option(help="few, short, or all targets.")] = DEFAULTS.suite,
    peers: Annotated[bool, typer.Option(help="Also time other libraries' losses (slow on a CPU).")] = DEFAULTS.peers,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    memory: Annotated[bool, typer.Option("--memory", help="Measure peak memory instead of time.")] = False,
) -> None:
    """Time the loss of every target against the bare matrix products, naive cross entropy and other libraries."""
    from rich.console import Console

    check_known(dtype=(dtype, DTYPES), device=(device, DEVICES), suite=(suite, (*SUITES, "all")))
    check_device(device)
    if top_k > vocab:
        raise ConfigError(f"--top-k {top_k} exceeds --vocab {vocab}; choose a smaller k")
    check_writable(output)
    torch.set_num_threads(threads)
    config = SpeedConfig(tokens, width, vocab, dtype, device, rounds, top_k, suite, peers)
    save = saver(output)
    with on_interrupt(lambda: f"what was measured so far is in {output}; a new run starts anew"):
        if memory:
            results = run_memory(config, tuple(sorted({min(512, tokens), tokens})), typer.echo, save)
        else:
            results = run_speed(config, typer.echo, save)
    Console().print(memory_table(results) if memory else speed_table(results))
    typer.echo(str(output))


def sweep(
    output: Annotated[Path, typer.Option(help="Raw results, JSON, written after every point.")] = Path(
        "runs/sweep.json"
    ),
    shapes: Annotated[str, typer.Option(help="Vocabulary x width of each shape.")] = "49152x576,151936x896",
    time_tokens: Annotated[str, typer.Option(help="Numbers of tokens to time; '' for none.")] = listed(
        SWEEP.time_tokens
    ),
    memory_tokens: Annotated[
        str, typer.Option(help="Numbers of tokens whose memory to measure; '' for none.")
    ] = listed(SWEEP.memory_tokens),
    vocabs: Annotated[
        str, typer.Option(help="Vocabularies whose memory to measure at 2,048 tokens; '' for none.")
    ] = listed(SWEEP.vocabs),
    losses: Annotated[str, typer.Option(help="Whose memory to measure, separated by ';'.")] = "; ".join(MEMORY),
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = DEFAULTS.dtype,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = DEFAULTS.device,
    rounds: Annotated[int, typer.Option(min=1, help="Counted rounds; medians are quoted.")] = DEFAULTS.rounds,
    top_k: Annotated[int, typer.Option(min=1, help="k of the cached teacher.")] = DEFAULTS.top_k,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the points that --output holds already.")] = False,
) -> None:
    """Time against the number of tokens, memory against tokens and vocabulary; `qtarget bench figure` draws it."""
    from rich.console import Console

    names = tuple(name.strip() for name in losses.split(";"))
    check_known(dtype=(dtype, DTYPES), device=(device, DEVICES), losses=([*names], MEMORY))
    check_device(device)
    check_writable(output)
    torch.set_num_threads(threads)
    pairs = tuple(numbers_pair(shape) for shape in shapes.split(","))
    config = SweepConfig(
        pairs, numbers("time-tokens", time_tokens), numbers("memory-tokens", memory_tokens), numbers("vocabs", vocabs),
        losses=names, dtype=dtype, device=device, rounds=rounds, top_k=top_k,
    )  # fmt: skip
    done = previous(output, config) if resume else {"time": [], "memory": []}
    with on_interrupt(lambda: f"the points so far are in {output}; go on with the same command and --resume"):
        results = run_sweep(config, done, typer.echo, saver(output))
    Console().print(sweep_table(results))
    typer.echo(str(output))


def figure(
    results: Annotated[Path, typer.Argument(help="What `qtarget bench sweep` wrote.")],
    output: Annotated[Path, typer.Option(help="Picture, PNG.")] = Path("runs/sweep.png"),
) -> None:
    """Draw time against the number of tokens, and memory against tokens and vocabulary."""
    from qtarget.benchmarks.figure import save_figure
    from qtarget.benchmarks.speed.figure import speed_figure

    check_outputs({"--output": output}, [results])
    try:
        found = json.loads(results.read_text())
        drawn = speed_figure(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{results} is not what `qtarget bench sweep` writes ({error}); run it first") from error
    save_figure(drawn, output)
    typer.echo(str(output))


def trainer(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="Raw results, JSON.")] = Path("runs/trainer.json"),
    targets: Annotated[str, typer.Option(help="Targets, separated by commas.")] = "sft,dft,asft",
    batch: Annotated[int, typer.Option(min=1, help="Rows a step.")] = 4,
    length: Annotated[int, typer.Option(min=2, help="Tokens a row; all are trained on.")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model.")] = 30,
    width: Annotated[int, typer.Option(min=9, help="Width of the model; a multiple of 18.")] = 576,
    vocab: Annotated[int, typer.Option(min=128, help="Size of the vocabulary.")] = 49_152,
    model: Annotated[
        Path | None, typer.Option(help="Folder of a model to train instead; it has layers, width and vocabulary.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: float32 or bfloat16.")] = DEFAULTS.dtype,
    rounds: Annotated[int, typer.Option(min=1, help="Counted steps of each; medians are quoted.")] = DEFAULTS.rounds,
    top_k: Annotated[int, typer.Option(min=1, help="k of the reference cache.")] = DEFAULTS.top_k,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    memory: Annotated[bool, typer.Option(help="Measure peak memory too, a process each.")] = True,
) -> None:
    """Time whole training steps of QTargetTrainer against TRL's SFTTrainer on a CPU: SmolLM2-135M's shape, or --model."""
    from rich.console import Console

    from qtarget.benchmarks.speed.trainer import TrainerBenchConfig, run_trainers
    from qtarget.registry import get_target

    check_known(dtype=(dtype, DTYPES))
    if width % 18:
        raise ConfigError(f"--width {width}: nine heads need an even width each; choose a multiple of 18")
    names = tuple(name.strip() for name in targets.split(","))
    for name in names:
        if get_target(name).scope != "token":
            raise ConfigError(
                f"--targets {name}: takes a pass over the whole batch first; compare targets of token scope"
            )
    check_writable(output)
    torch.set_num_threads(threads)
    given: Any = {"batch": batch, "length": length, "dtype": dtype, "targets": names, "top_k": top_k, "rounds": rounds}
    if model is not None:
        shape = [name for name in ("layers", "width", "vocab") if is_said(context, name)]
        if shape:
            raise ConfigError(f"--{shape[0]} beside --model: the folder's model has a shape of its own; leave it out")
        config = TrainerBenchConfig.of(str(model), **given)
    else:
        config = TrainerBenchConfig(vocab=vocab, width=width, layers=layers, intermediate=width * 8 // 3, **given)
    results = run_trainers(config, typer.echo, memory)
    saver(output)(results)
    Console().print(trainer_table(results))
    typer.echo(str(output))


def numbers_pair(shape: str) -> tuple[int, int]:
    """``49152x576`` -> vocabulary and width."""
    vocab, _, width = shape.strip().partition("x")
    if not (vocab.isdigit() and width.isdigit()):
        raise ConfigError(f"--shapes {shape!r}; expected vocabulary x width, for instance 49152x576")
    return int(vocab), int(width)


def numbers(option: str, text: str) -> tuple[int, ...]:
    """``512,2048`` -> (512, 2048)."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdigit() and int(part) for part in parts):
        raise ConfigError(f"--{option} {text!r}; expected positive whole numbers separated by commas")
    return tuple(int(part) for part in parts)


def check_known(**options: tuple[str | list[str], tuple[str, ...]]) -> None:
    """Raise for a value that an option does not know.

    Raises:
        ConfigError: names the option and what it knows.
    """
    for name, (values, known) in options.items():
        for value in [values] if isinstance(values, str) else values:
            if value not in known:
                raise ConfigError(f"--{name} {value!r} is unknown; expected {' or '.join(known)}")


def check_device(device: str) -> None:
    """Raise when there is no such device.

    Raises:
        ConfigError: CUDA was asked for and is not visible.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: no CUDA device is visible here; run with --device cpu, or on a GPU machine")
