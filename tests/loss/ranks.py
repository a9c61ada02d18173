"""What each of two processes computes for ``test_ranks``: ``torchrun -m tests.loss.ranks FOLDER``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import qtarget
from qtarget.loss import chunked

CASES = ("sft", "label_smoothing", "eaft", "idft", "asft", "reverse_kl", "target_sft", "rho1+sft_kl", "talr")
SOFTCAPS = (None, 8.0)
"""Without a soft-cap the chunk's logits become exponentials at once."""

VOCAB, ROWS_OF_FIRST = 41, 23
"""The head's rows are split unevenly."""


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor, qtarget.Reference]:
    rng = torch.Generator().manual_seed(0)
    hidden, other = torch.randn(2, 3, 5, 6, generator=rng, dtype=torch.float64)
    weight = torch.randn(VOCAB, 6, generator=rng, dtype=torch.float64)
    bias = torch.randn(VOCAB, generator=rng, dtype=torch.float64)
    labels = torch.randint(VOCAB, (3, 5), generator=rng)
    labels[1, 2] = -100
    known = qtarget.token_statistics(other @ weight.T, labels, top_k=7)
    return hidden, weight, bias, labels, known


def run(name: str, rows: slice, group: dist.ProcessGroup | None, softcap: float | None) -> dict[str, Tensor]:
    """Loss, report and gradients with these rows of the head."""
    hidden, weight, bias, labels, known = problem()
    leaves = [hidden.requires_grad_(), weight[rows].clone().requires_grad_(), bias[rows].clone().requires_grad_()]
    target = qtarget.get_target(name)
    arguments = {role: known for role in ("reference", "teacher") if getattr(target.needs, role)}
    loss, report = qtarget.linear_target_loss(
        leaves[0], leaves[1], labels, target, bias=leaves[2], logit_softcap=softcap, return_report=True, vocab_group=group,
        **arguments,
    )  # fmt: skip
    gradients = torch.autograd.grad(loss, leaves)
    return {"loss": loss.detach(), **dict(zip(("hidden", "weight", "bias"), gradients, strict=True)), **vars(report)}


def sharded_model(shard: bool) -> dict[str, Tensor]:
    """A small model's loss and gradients through its target head, under FSDP2 or whole."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from qtarget.integrations.shared.heads import add_target_head, probe_head
    from qtarget.integrations.shared.step import TargetStep

    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **size))
    add_target_head(model, probe_head(model))
    if shard:
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(1))
    step = TargetStep(qtarget.get_target("dft"), ids, {}, num_items=16)
    loss = model(input_ids=ids, target_loss=step).loss
    loss.backward()

    def whole(value: Tensor) -> Tensor:
        return value.full_tensor() if hasattr(value, "full_tensor") else value

    return {"loss": loss.detach(), **{n: whole(p.grad) for n, p in model.named_parameters()}}


def refusal(function: Callable[[], Any]) -> str:
    """The error that a call ends with."""
    try:
        function()
    except qtarget.QTargetError as error:
        return str(error)
    return "no error"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    rows = slice(0, ROWS_OF_FIRST) if rank == 0 else slice(ROWS_OF_FIRST, VOCAB)
    # so small a budget that ranks would choose different chunks if they looked at their own rows
    chunked.LOGIT_BYTES["cpu"], chunked.FEWEST_TOKENS["cpu"] = 16 * 23 * 8, 1
    out: dict[Any, Any] = {(n, cap): run(n, rows, dist.group.WORLD, cap) for n in CASES for cap in SOFTCAPS}
    hidden, weight, _, labels, _ = problem()
    eaft = qtarget.get_target("eaft", top_k=VOCAB + 1)
    arguments = (labels, eaft)
    out["top_k"] = refusal(
        lambda: qtarget.linear_target_loss(hidden, weight[rows], *arguments, vocab_group=dist.group.WORLD)
    )
    none = weight[: 0 if rank else VOCAB]
    out["no rows"] = refusal(
        lambda: qtarget.linear_target_loss(hidden, none, labels, "sft", vocab_group=dist.group.WORLD)
    )
    out["fsdp2"] = sharded_model(shard=True)
    torch.save(out, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
