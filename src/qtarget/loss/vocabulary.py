"""Which columns of the vocabulary a process holds, and how processes join what each knows of its own.

One process holds all of them, or the head is split by rows over a group (tensor parallelism): then a chunk's special
columns and sums are joined across ranks, a few numbers a token, and everything after that is the same on every rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from qtarget.core.errors import HyperparameterError, ShapeError
from qtarget.core.shapes import Float, Int, Tensor
from qtarget.loss.columns import RestSums
from qtarget.loss.kernels import pytorch


def write(logits: Float[Tensor, "tokens columns"], ids: Int[Tensor, "tokens k"], values: Tensor) -> None:
    """Set the columns at these ids; an id that repeats brings the same value.

    ``scatter_`` copies the whole chunk, there and back, where it is stored ``[vocab, tokens]``.
    """
    if logits.is_contiguous():
        logits.scatter_(-1, ids, values.expand(ids.shape))
    else:
        logits[torch.arange(len(ids), device=ids.device)[:, None], ids] = values


class Vocabulary:
    """All columns in one process.

    Attributes:
        size: V.
        widest: the most columns that one process holds; chunk sizes follow from it, so that they agree on all ranks.
    """

    def __init__(self, size: int, widest: int | None = None) -> None:
        self.size, self.widest = size, widest or size

    def take(self, logits: Float[Tensor, "tokens columns"], ids: Int[Tensor, "tokens k"]) -> Float[Tensor, "tokens k"]:
        """The logits at these ids, which are left at minus infinity."""
        taken = logits.gather(-1, ids)
        write(logits, ids, logits.new_full((), -torch.inf))
        return taken

    def put(
        self, logits: Float[Tensor, "tokens columns"], ids: Int[Tensor, "tokens k"], values: Float[Tensor, "tokens k"]
    ) -> None:
        """Write the columns at these ids."""
        write(logits, ids, values.to(logits.dtype))

    def join(self, rest: RestSums) -> RestSums:
        """Sums over the columns of all processes."""
        return rest

    def total(self, values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Sum over processes."""
        return values

    def largest(self, logits: Float[Tensor, "tokens columns"], k: int) -> Float[Tensor, "tokens k"]:
        """The k largest logits, descending."""
        pytorch.check_top_k(k, self.size)
        return pytorch.largest(logits, k)


class ShardedVocabulary(Vocabulary):
    """Rows of the head split over a process group, in the order of its ranks.

    Args:
        columns: how many of them this rank holds (ranks may hold different numbers).
        group: every rank calls the loss with the same hidden states, labels and chunk size.

    Raises:
        ShapeError: a rank holds none.
    """

    def __init__(self, columns: int, group: dist.ProcessGroup, device: torch.device) -> None:
        counts = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(dist.get_world_size(group))]
        dist.all_gather(counts, torch.tensor([columns], device=device), group)
        sizes = [int(count) for count in counts]
        if min(sizes) == 0:  # seen by every rank, so none is left waiting
            raise ShapeError(f"ranks of vocab_group hold {sizes} rows of the head; expected at least one each")
        super().__init__(sum(sizes), max(sizes))
        self.columns, self.group = columns, group
        self.first = sum(sizes[: dist.get_rank(group)])

    def _mine(self, ids: Int[Tensor, "tokens k"]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        here = (ids >= self.first) & (ids < self.first + self.columns)
        token, slot = here.nonzero(as_tuple=True)
        return here, (token, ids[token, slot] - self.first)

    def take(self, logits: Float[Tensor, "tokens columns"], ids: Int[Tensor, "tokens k"]) -> Float[Tensor, "tokens k"]:
        here, place = self._mine(ids)
        # each id has one owner; minus infinity elsewhere makes the maximum the owner's logit
        taken = torch.full(ids.shape, -torch.inf, dtype=logits.dtype, device=logits.device)
        taken[here] = logits[place]
        logits[place] = -torch.inf
        dist.all_reduce(taken, dist.ReduceOp.MAX, self.group)
        return taken

    def put(
        self, logits: Float[Tensor, "tokens columns"], ids: Int[Tensor, "tokens k"], values: Float[Tensor, "tokens k"]
    ) -> None:
        here, place = self._mine(ids)
        logits[place] = values[here].to(logits.dtype)

    def join(self, rest: RestSums) -> RestSums:
        maximum = rest.maximum.clone()
        dist.all_reduce(maximum, dist.ReduceOp.MAX, self.group)
        # sums relative to this rank's maximum, moved to the joint one: x grows by ``moved``, exp(x) by its exponential
        moved = rest.maximum - maximum
        sums = [rest.exp] if rest.exp_x is None else [rest.exp, rest.exp_x + moved * rest.exp]
        joined = self.total(torch.stack(sums) * moved.exp())
        return RestSums(maximum, joined[0], None if rest.exp_x is None else joined[1])

    def total(self, values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        values = values.contiguous()
        dist.all_reduce(values, dist.ReduceOp.SUM, self.group)
        return values

    def largest(self, logits: Float[Tensor, "tokens columns"], k: int) -> Float[Tensor, "tokens k"]:
        pytorch.check_top_k(k, self.size)
        # all ranks gather tensors of one shape; a rank with fewer columns fills up with what never wins
        own = torch.full((len(logits), k), -torch.inf, dtype=logits.dtype, device=logits.device)
        count = min(k, self.columns)
        own[:, :count] = pytorch.largest(logits, count)
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(gathered, own, self.group)
        return torch.cat(gathered, dim=-1).topk(k, dim=-1).values


def vocabulary_of(weight: Tensor, group: dist.ProcessGroup | None) -> Vocabulary:
    """All rows of the head, or this rank's part of them.

    Raises:
        ShapeError: the weight is a distributed tensor, whose rows are not all here.
        HyperparameterError: not a process group.
    """
    if type(weight).__name__ == "DTensor":
        raise ShapeError(
            "lm_head_weight is a DTensor; give its full_tensor(), or for a head split by rows its to_local() together "
            "with vocab_group"
        )
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise HyperparameterError(
            f"vocab_group is a {type(group).__name__}; expected a torch.distributed.ProcessGroup (of a device mesh: "
            "mesh.get_group())"
        )
    return Vocabulary(len(weight)) if group is None else ShardedVocabulary(len(weight), group, weight.device)
