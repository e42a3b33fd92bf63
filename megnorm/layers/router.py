"""Which experts a token goes to, with which weights; what keeps their loads even.

The losses of a sparse layer, over a sequence of N real tokens with E experts of which each token takes k:

    balance   E * sum_e f_e P_e     f_e: slots of expert e / (k N); P_e: mean of its score, scores of a token summing to 1
    z         mean of logsumexp(logits)^2

balance is 1 for even loads. A layer adds the mean over the tokens that have a loss of their sequence's
balance_loss * balance + z_loss * z, divided by the number of sparse layers, to the mean loss of the tokens. The value is a
function of the sequences of a step and of nothing else: not of tp, dp, ep, stages or micro-batches. With
balance_over=micro_batch "sequence" means all that a rank sends through the layer at once. With balance_across=layers f_e
and P_e are means over the sparse layers, and the model has one balance loss of them.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megnorm.kernels.torch_ref import wide
from megnorm.layers.dispatch import Routing
from megnorm.layers.env import Env
from megnorm.layers.wide import WideLinear
from megnorm.models.config import ModelConfig, MoEConfig
from megnorm.parallel.collectives import all_reduce, own_slice, sum_from
from megnorm.parallel.layout import Layout, parameter
from megnorm.parallel.mesh import Mesh


class Router(nn.Module):
    """[s, b, d] -> weights [t, k] in fp32 (fp64 for fp64) and experts [t, k] of the tokens t = s * b.

    With sequence parallelism tokens are those of this rank's [s/tp, b, d]. load: slots by expert since it was reset;
    dropped: those for which there was no room. bias: what is added to scores for the choice alone, moved by ``update_biases``.
    """

    bias: Tensor
    load: Tensor
    dropped: Tensor

    def __init__(self, cfg: ModelConfig, env: Env) -> None:
        super().__init__()
        self.moe, self.mesh, self.layers = cfg.moe, env.mesh, cfg.sparse_layers
        partial = "tp" if env.mesh.sequence_parallel else None
        shape = (cfg.moe.experts, cfg.width)
        layout = Layout.whole(shape, "router", grad_sum=partial, owner=env.mesh.tp.rank == 0)
        self.weight = parameter(env.empty(*shape), layout)
        self.register_buffer("bias", torch.zeros(cfg.moe.experts, device=env.device), persistent=False)
        for name, size in (("load", cfg.moe.experts), ("dropped", 1)):
            counted = torch.zeros(size, dtype=torch.float64, device=env.device)  # exact, however many
            self.register_buffer(name, counted, persistent=False)

    def forward(self, u: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        moe, dtype = self.moe, wide(u)
        logits = WideLinear.apply(u.flatten(0, 1), self.weight)
        scores = logits.softmax(-1) if moe.score == "softmax" else logits.sigmoid()
        wanted = scores.detach() + self.bias if moe.bias_rate else scores.detach()
        chosen = wanted.topk(moe.top_k, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if moe.normalize:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
        if self.training:
            picked = torch.zeros_like(scores, requires_grad=False).scatter_(1, chosen, 1.0)
            self._watch(logits, scores, picked, routing)
        return weights * moe.scale if moe.scale != 1.0 else weights, chosen

    def _watch(self, logits: Tensor, scores: Tensor, picked: Tensor, routing: Routing) -> None:
        """Count loads, and leave the losses. picked: [t, experts], 1 for the chosen ones."""
        real = None if routing.real is None else own_slice(routing.real, self.mesh.sp).to(scores.dtype)
        if not computed_again():
            self.load += picked.sum(0) if real is None else real @ picked
        if routing.weight is None or not (self.moe.balance_loss or self.moe.z_loss):
            return
        loss, shares = self._loss(logits, scores, picked, real, routing)
        if not computed_again():
            routing.losses.append(loss)
            routing.shares.append(shares)

    def _loss(
        self, logits: Tensor, scores: Tensor, picked: Tensor, real: Tensor | None, routing: Routing
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The layer's losses, summed over sequences by their tokens with a loss, and what a balance across layers is made of;
        the same on every tp rank."""
        moe, weight = self.moe, _weight(self.moe, routing)
        if moe.balance_over == "micro_batch":
            inside = torch.ones_like(scores[:, :1]).t()
        else:
            segment = own_slice(routing.segment, self.mesh.sp)
            inside = (segment == torch.arange(routing.count, device=segment.device)[:, None]).to(scores.dtype)
        inside = inside if real is None else inside * real
        p = scores if moe.score == "softmax" else scores / scores.sum(-1, keepdim=True)
        z = logits.logsumexp(-1).square()[:, None]
        sums = sum_from(inside @ torch.cat([p, z, picked, torch.ones_like(z)], -1), self.mesh.sp)
        n = sums[:, -1:].clamp_min(1.0)
        mean_p, mean_z, share = (sums[:, :-1] / n).split([moe.experts, 1, moe.experts], -1)
        both = moe.z_loss * mean_z.squeeze(-1)
        if moe.balance_across == "layer":
            both = both + moe.balance_loss * _balance(moe, mean_p, share)
        return (both * weight.to(both.dtype)).sum() / self.layers, (mean_p, share)


def _balance(moe: MoEConfig, mean_p: Tensor, share: Tensor) -> Tensor:
    """E * sum_e f_e P_e of each sequence, f_e being the share over k: [count, experts] each -> [count]."""
    return (mean_p * share).sum(-1) * (moe.experts / moe.top_k)


def _weight(moe: MoEConfig, routing: Routing) -> Tensor:
    assert routing.weight is not None
    return routing.weight.sum()[None] if moe.balance_over == "micro_batch" else routing.weight


def left_by(moe: MoEConfig, routing: Routing) -> Tensor | None:
    """What the sparse layers of a forward pass left in losses, all together; None: nothing."""
    if not routing.losses:
        return None
    total = torch.stack(routing.losses).sum()
    if moe.balance_across == "layers" and moe.balance_loss:
        mean_p, share = (torch.stack(parts).mean(0) for parts in zip(*routing.shares, strict=True))
        balance = _balance(moe, mean_p, share)
        total = total + moe.balance_loss * (balance * _weight(moe, routing).to(balance.dtype)).sum()
    return total


def computed_again() -> bool:
    """Whether this is a recompute in backward, of what was counted in the forward pass."""
    return bool(torch._C._current_graph_task_id() != -1)


def routers(*models: nn.Module) -> Iterator[tuple[str, Router]]:
    """The routers of the models (the stages that a rank holds), by path."""
    for model in models:
        for path, module in model.named_modules():
            if isinstance(module, Router):
                yield path, module


def biases(*models: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The biases that move, by their names in checkpoints; the same on every rank of a stage."""
    for path, router in routers(*models):
        if router.moe.bias_rate:
            yield f"{path}.bias", router.bias


def reset_loads(*models: nn.Module) -> None:
    """Begin a step."""
    for _, router in routers(*models):
        router.load.zero_()
        router.dropped.zero_()


def loads(mesh: Mesh, *models: nn.Module) -> Tensor | None:
    """[routers, experts] slots since the reset, over all ranks of the stage; collective, None without routers."""
    own = [router.load for _, router in routers(*models)]
    if not own:
        return None
    return all_reduce(all_reduce(torch.stack(own), mesh.sp), mesh.dp)


def dropped(total: Tensor | None, mesh: Mesh, *models: nn.Module) -> float:
    """The part of all slots of the model that found no room; collective. total: what ``loads`` gave."""
    sums = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    if total is not None:
        own = torch.stack([router.dropped for _, router in routers(*models)]).sum()
        sums = torch.stack([all_reduce(own, mesh.dp), total.sum()])
    lost, slots = all_reduce(sums, mesh.pp).tolist()
    return float(lost / max(slots, 1.0))


def update_biases(total: Tensor | None, *models: nn.Module) -> None:
    """After an update of the weights: raise the bias of experts below the mean load, lower that of those above.

    total: what ``loads`` gave.
    """
    for i, (_, router) in enumerate(routers(*models)):
        assert total is not None
        if router.moe.bias_rate:
            router.bias += router.moe.bias_rate * torch.sign(total[i].mean() - total[i]).to(router.bias.dtype)


def fullest(total: Tensor | None, mesh: Mesh) -> float:
    """The largest load of an expert over the mean load of its layer, over all layers of the model; collective."""
    worst = torch.zeros((), dtype=torch.float64, device=mesh.device)
    if total is not None:
        worst = (total.amax(-1) / total.mean(-1).clamp_min(1.0)).amax()
    return float(all_reduce(worst, mesh.pp, dist.ReduceOp.MAX))
