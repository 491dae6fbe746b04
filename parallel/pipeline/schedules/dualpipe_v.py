"""DualPipeV (DeepSeek, github.com/deepseek-ai/DualPipe): forwards and backwards in pairs, in a V.

DualPipe (DeepSeek-V3, arXiv:2412.19437) runs two pipelines in opposite directions and pairs a forward of one
with a backward of the other, so that the communication of each hides behind the computation of the other. Its
ranks r and 2p-1-r hold the same two parts of the model. Cut in half, every two of them become one rank, and the
two directions become the two legs of a V: the same order with the weights held once.

    rank 0 | F0 F0 F0 F1 I1 W1 F1 | F0 B1 F1 B0 ... | B1 F1 B0 | B1 I0 | W I0 | W            (p = 2)
    rank 1 | F0 F1 F0 F1 |          F0 B1 F1 B0 ... |            B1 B0 I1 I0 | W W

(0 is the part on the way down, 1 that on the way up.) Phases on rank r of p:

1. 2(p-1-r) times F0, r+1 times F0 F1: the pipeline fills.
2. p-1-r times I1 W1 F1: gradients go on before their W.
3. m - 2p + r + 1 times the pairs F0 B1 and F1 B0. The original runs the two of a pair at once, which needs a
   model that is written for it; here they are neighbours in the list.
4. p-1-r times B1 F1 B0: the forwards end.
5. r+1 times B1 B0; the second half of these is split, and their W wait. Then p-1-r times W I0, and r+1 W.

The pipeline has to be filled, m >= 2p. A rank holds at most 2p + 1 chunk activations. With F = I = W and no
transfer time the span of rank r is p-1-r passes longer than its work.
"""

from __future__ import annotations

from collections import deque

from parallel.pipeline.actions import Action, Op
from parallel.pipeline.program import Program
from parallel.pipeline.schedules.registry import Request, register, require
from parallel.pipeline.schedules.v_shape import stages_of, v_program


@register(
    "dualpipe-v",
    summary="V-shaped, forwards and backwards in pairs",
    source="DualPipe, github.com/deepseek-ai/DualPipe; DeepSeek-V3, arXiv:2412.19437",
    chunks=(2,),
)
def dualpipe_v(request: Request) -> Program:
    """The phases on every rank. Costs do not matter."""
    ranks, microbatches = request.ranks, request.microbatches
    require(
        microbatches >= 2 * ranks,
        value=f"microbatches={microbatches}",
        rule=f"dualpipe-v needs at least 2 x ranks = {2 * ranks}",
        fix=f"set it to {2 * ranks} or more, or choose zb-v",
    )
    return v_program("dualpipe-v", request, (_Rank(rank, ranks).actions(microbatches) for rank in range(ranks)))


class _Rank:
    """The list of a rank as it grows. Every pass is of the next micro-batch of its stage."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.begun, self.others = rank + 1, ranks - 1 - rank  # so many ranks above and with, so many below
        self.ranks = ranks
        self.lower, self.upper = stages_of(rank, ranks)
        self.listed: list[Action] = []
        self.forwards = dict.fromkeys((self.lower, self.upper), 0)
        self.backwards = dict.fromkeys((self.lower, self.upper), 0)
        self.due: deque[Action] = deque()

    def actions(self, microbatches: int) -> list[Action]:
        """All phases."""
        lower, upper = self.lower, self.upper
        for _ in range(2 * self.others):
            self._forward(lower)
        for _ in range(self.begun):
            self._forward(lower)
            self._forward(upper)
        for _ in range(self.others):
            self._backward(upper, split=True)
            self._weight_gradient()
            self._forward(upper)
        for _ in range(microbatches - 2 * self.ranks + self.begun):
            self._forward(lower)
            self._backward(upper)
            self._forward(upper)
            self._backward(lower)
        for _ in range(self.others):
            self._backward(upper)
            self._forward(upper)
            self._backward(lower)
        for number in range(2 * self.begun):
            self._backward(lower if number % 2 else upper, split=number >= self.begun)
        for _ in range(self.others):
            self._weight_gradient()
            self._backward(lower, split=True)
        for _ in range(self.begun):
            self._weight_gradient()
        return self.listed

    def _forward(self, stage: int) -> None:
        self.listed.append(Action(Op.F, stage, self.forwards[stage]))
        self.forwards[stage] += 1

    def _backward(self, stage: int, *, split: bool = False) -> None:
        microbatch = self.backwards[stage]
        self.backwards[stage] += 1
        self.listed.append(Action(Op.I if split else Op.B, stage, microbatch))
        if split:
            self.due.append(Action(Op.W, stage, microbatch))

    def _weight_gradient(self) -> None:
        self.listed.append(self.due.popleft())
