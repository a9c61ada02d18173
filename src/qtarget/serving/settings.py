"""What a server is told at its start: plain data that fits into JSON."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

from qtarget.core.errors import ConfigError
from qtarget.scoring.sources.identity import Limits
from qtarget.storage.files import write_json

CPU_TOKENS, ACCELERATOR_TOKENS = 512, 16384

IDENTITY = "identity.json"
"""Where the pipeline writes who it is, for the gateway."""


RANGES: dict[str, tuple[float, float]] = {
    "workers": (1, 1024),
    "max_batch": (1, 65_536),
    "wait_ms": (1, 60_000),
    "tokens_per_batch": (0, 2**31),
    "queue": (1, 1_000_000),
    "timeout": (0.001, 86_400.0),
    "start_timeout": (0.001, 86_400.0),
    "max_restarts": (0, 1_000_000),
    "header_timeout": (0.1, 3600.0),
    "max_connections": (1, 1_000_000),
}
"""What the numbers may be; NaN is in no range."""


DEVICES = ("cpu", "cuda", "mps", "xpu", "npu", "hpu", "xla")
"""Kinds of devices that torch knows and a model can run on; the gateway loads no torch to ask."""


@dataclass(frozen=True)
class ServeSettings:
    """How to serve which model.

    Attributes:
        model: folder or hub name.
        loader: ``package.module:function`` from these settings to a ``Loaded``.
        dtype: ``auto`` (as saved), ``float32``, ``bfloat16`` or ``float16``.
        device: of the forward pass; each worker moves its own copy there (on a CPU all share one).
        trust_remote_code: run code that comes with the model.
        allow_new_weights: serve a model whose checkpoint lacks weights, or has unknown ones.
        workers: processes that score, one torch thread each.
        max_batch: requests that are scored together; with twice as many clients, one batch is scored while the answers of
            the last are on their way.
        wait_ms: how long the first of them waits for others.
        tokens_per_batch: padded tokens a forward pass; a batch is sorted by length and cut to it. 0: 512 on a CPU, where
            more only pads more (benchmarks/results/serving.json), else 16384.
        queue: requests that may wait; beyond: 429.
        timeout: seconds a request may take, waiting included; beyond: 408.
        start_timeout: seconds until it must be ready.
        max_restarts: after crashes and hangs, within ten minutes; beyond, the server gives up.
        header_timeout: seconds until a connection must have sent a whole request header, the first or the next.
        max_connections: at once; the limit of open files may allow fewer.
        hosts: names that a server without a token may be asked by, beside this machine's own.
        limits: on requests.
    """

    model: str
    loader: str = "qtarget.serving.model:load"
    dtype: str = "auto"
    device: str = "cpu"
    trust_remote_code: bool = False
    allow_new_weights: bool = False
    workers: int = 1
    max_batch: int = 16
    wait_ms: int = 5
    tokens_per_batch: int = 0
    queue: int = 1024
    timeout: float = 60.0
    start_timeout: float = 600.0
    max_restarts: int = 20
    header_timeout: float = 10.0
    max_connections: int = 1024
    hosts: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for name, (lowest, highest) in RANGES.items():
            value = getattr(self, name)
            if not lowest <= value <= highest:
                raise ConfigError(f"{name} is {value}; expected {lowest} to {highest}")
        if not re.fullmatch(rf"({'|'.join(DEVICES)})(:[0-9]{{1,4}})?", self.device):
            raise ConfigError(f"device {self.device!r} is no device; expected one like cpu, cuda or cuda:1")
        known = ("auto", "float32", "bfloat16", "float16")
        if self.dtype not in known:
            raise ConfigError(f"dtype {self.dtype!r} is unknown; expected one of {', '.join(known)}")

    @property
    def padded_tokens(self) -> int:
        """``tokens_per_batch``, or what 0 stands for."""
        return self.tokens_per_batch or (CPU_TOKENS if self.device == "cpu" else ACCELERATOR_TOKENS)

    def write(self, path: Path) -> None:
        """As JSON."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> ServeSettings:
        """What ``write`` wrote."""
        value = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**value, "limits": Limits(**value["limits"]), "hosts": tuple(value["hosts"])})


def check_device(device: str) -> None:
    """Refuse a GPU that is not there, before minutes are spent on loading a model for it.

    Raises:
        ConfigError: this machine has fewer.
    """
    import torch

    # counted without a CUDA context, which would not survive the fork into workers
    kind, _, number = device.partition(":")
    if kind == "cuda" and int(number or 0) >= (count := torch.cuda.device_count()):
        raise ConfigError(f"device {device}: this machine has {count} CUDA devices; name one of them, or cpu")
