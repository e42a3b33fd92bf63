"""One executor for every pipeline schedule: runs a rank's actions, and sends and receives what lies between stages.

A message is what one stage hands to the next for one micro-batch: the residual stream forward (kind F), its gradient
backward (kind B). Receives are posted ahead of the action that needs them and sends are not waited for, so that messages
travel while stages compute.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megnorm.parallel.collectives import wait_for
from megnorm.parallel.mesh import Mesh
from megnorm.parallel.schedule import Action, Schedule

AHEAD = 2  # receives that are posted before their action is due
BEHIND = 4  # messages of forwards alone that may be on their way


class Stage(Protocol):
    """What the executor asks of a stage."""

    def __call__(self, batch: Any, carry: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        """carry: what the stage before gave, None for the first. The last stage gives a scalar loss. A stage may give a
        scalar beside that: losses of its own, which count like the last one's."""
        ...

    def edge(self, batch: Any, *, into: bool) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of what this stage gets from the one before (into), or gives, for this micro-batch."""
        ...


class Pipeline:
    """The stages of this rank, by global index, and their neighbours' messages.

    extra: of the last run, the sum of weight * what stages gave beside their output.
    """

    def __init__(self, stages: Mapping[int, Stage], mesh: Mesh) -> None:
        self.stages, self.mesh = stages, mesh
        self.extra = torch.zeros((), dtype=torch.float64, device=mesh.device)
        _open_lanes(mesh)

    def run(
        self,
        schedule: Schedule,
        batches: Sequence[Any],
        *,
        weight: float = 1.0,
        scale: float = 1.0,
        before: Callable[[Action, bool], None] = lambda action, final: None,
    ) -> Tensor:
        """Run a step's micro-batches; the sum of weight * loss over them, 0 where the last stage is elsewhere.

        Gradients are those of scale * weight * (loss + extra losses). before: called with each action before it computes,
        and whether it is the last backward of its stage.
        """
        last = schedule.stages - 1
        actions = schedule.actions[self.mesh.pp.rank]
        messages = _Messages(schedule, actions, self.stages, batches, self.mesh)
        final = set({action.stage: action for action in actions if action.kind == "B"}.values())
        inputs: dict[tuple[int, int], Tensor] = {}
        outputs: dict[tuple[int, int], list[GradientEdge]] = {}
        loss_grad: Tensor | None = None
        extra_grad: list[Tensor] = []
        total, self.extra = torch.zeros_like(self.extra), torch.zeros_like(self.extra)
        for action in actions:
            place = (action.stage, action.micro_batch)
            arrived = messages.receive(action)
            before(action, action in final)
            if action.kind == "F":
                carry = None if arrived is None else arrived.requires_grad_(torch.is_grad_enabled())
                given = self.stages[action.stage](batches[action.micro_batch], carry)
                output, *extra = given if isinstance(given, tuple) else (given,)
                for one in extra:
                    self.extra += one.detach() * weight
                    extra_grad = [torch.full_like(one, scale * weight)]
                if action.stage == last:
                    output = output * weight
                    total += output.detach()
                else:
                    messages.send(action, output.detach())
                if torch.is_grad_enabled():
                    if carry is not None:
                        inputs[place] = carry
                    # Backward needs the output's place in the graph, not its values: they are free once sent.
                    outputs[place] = [get_gradient_edge(root) for root in (output, *extra)]
                    if action.stage == last:
                        loss_grad = torch.full_like(output, scale)
                del given, output, extra
            else:
                grad = loss_grad if arrived is None else arrived
                assert grad is not None
                roots = outputs.pop(place)
                torch.autograd.backward(roots, [grad, *extra_grad][: len(roots)])
                if action.stage > 0:
                    received = inputs.pop(place).grad
                    assert received is not None
                    messages.send(action, received)
        messages.finish()
        return total


class _Messages:
    """The messages of one rank during one run of its actions."""

    def __init__(
        self,
        schedule: Schedule,
        actions: Sequence[Action],
        stages: Mapping[int, Stage],
        batches: Sequence[Any],
        mesh: Mesh,
    ) -> None:
        self.schedule, self.mesh, self.stages, self.batches = schedule, mesh, stages, batches
        self.due = deque(action for action in actions if schedule.source(action) is not None)
        self.posted: dict[Action, tuple[Tensor, dist.Work]] = {}
        self.sent: dict[Action, tuple[Tensor, dist.Work]] = {}  # by the action that takes it
        self.backward = any(action.kind == "B" for action in actions)
        senders = {schedule.placement[source.stage] for source in map(schedule.source, self.due) if source is not None}
        self.order = {action: i for rank in senders for i, action in enumerate(schedule.actions[rank])}

    def receive(self, action: Action) -> Tensor | None:
        """What the action needs of another rank; posts the receives of the actions behind it."""
        while self.due and len(self.posted) < AHEAD:
            self._post(self.due.popleft())
        source = self.schedule.source(action)
        if source is None:
            return None
        message, work = self.posted.pop(action)
        if self.due:
            self._post(self.due.popleft())
        wait_for(work, f"receive {source}", "pp", message.nbytes)
        self._free(source)
        return message

    def _free(self, source: Action) -> None:
        """Let go of messages whose receiver has since run ``source``, and so has them. (Work on gloo never tells.)"""
        rank = self.schedule.placement[source.stage]
        for target in list(self.sent):
            if self.schedule.placement[target.stage] == rank and self.order[target] < self.order[source]:
                self._wait(target)

    def _wait(self, target: Action) -> None:
        message, work = self.sent.pop(target)
        wait_for(work, f"send for {target}", "pp", message.nbytes)

    def _post(self, action: Action) -> None:
        source = self.schedule.source(action)
        assert source is not None
        shape, dtype = self.stages[action.stage].edge(self.batches[action.micro_batch], into=action.kind == "F")
        message = torch.empty(shape, dtype=dtype, device=self.mesh.device)
        rank = self.schedule.placement[source.stage]
        work = dist.irecv(message, group_src=rank, group=self._group(action.kind, rank), tag=self._tag(action))
        assert work is not None
        self.posted[action] = message, work

    def send(self, action: Action, message: Tensor) -> None:
        """Hand an action's result to the stage that follows it (F) or precedes it (B)."""
        target = self.schedule.target(action)
        assert target is not None
        rank = self.schedule.placement[target.stage]
        message = message.contiguous()
        group = self._group(action.kind, self.mesh.pp.rank)
        work = dist.isend(message, group_dst=rank, group=group, tag=self._tag(target))
        assert work is not None
        self.sent[target] = message, work
        # Where nothing comes back that would tell, a fast rank waits for slower ones behind it.
        if not self.backward and len(self.sent) > BEHIND:
            self._wait(next(iter(self.sent)))

    def _tag(self, action: Action) -> int:
        """One number for every message of a step."""
        return (action.micro_batch * self.schedule.stages + action.stage) * 2 + (action.kind == "B")

    def _group(self, kind: str, sender: int) -> dist.ProcessGroup | None:
        return self.mesh.lanes.get((kind, sender % 2), self.mesh.pp.group)

    def finish(self) -> None:
        """Wait until everything sent has left."""
        for target in list(self.sent):
            self._wait(target)


def _open_lanes(mesh: Mesh) -> None:
    """Send one element over every lane. The first message of a pair of ranks makes their NCCL communicator, for which both
    must be there: a receive posted ahead would wait for a sender that is not due yet.
    """
    pp, token = mesh.pp, torch.zeros(1, device=mesh.device)
    for (kind, parity), group in sorted(mesh.lanes.items(), key=lambda lane: lane[0]):
        step = 1 if kind == "F" else -1
        source, target = (pp.rank - step) % pp.size, (pp.rank + step) % pp.size
        if pp.rank % 2 == parity:
            dist.send(token, group_dst=target, group=group)
        if source % 2 == parity:
            dist.recv(token, group_src=source, group=group)
