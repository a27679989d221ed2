"""The low-rank branch beside an integer matrix, in the data file and in a graph: y + gsum(x) A^T B^T, not merged.

Group sums come by Reshape and ReduceSum, not by a matrix [K, rank] that repeats the rows of A^T over their groups: that
matrix is ``block`` times as large as A^T and is read for every token, and two small nodes cost less. Seen with
onnxruntime 1.32, one thread, microseconds of a whole branch of rank 16, sums / repeated: K = N = 576: 4.7 / 4.8,
1536: 5.9 / 7.0, 2048: 12.9 / 17.0; rank 48 from 4096 to 6144: 94 / 130.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch

from export.graph_builder import GraphBuilder

Branch = tuple[torch.Tensor, torch.Tensor]  # A [rank, K/block], B [N, rank]


def stack_branches(
    branches: Sequence[Branch | None], rows: Sequence[int]
) -> tuple[torch.Tensor | None, torch.Tensor] | None:
    """The branch of stacked matrices over one input, as one pair of matrices; None where none has a branch.

    As are stacked and Bs stand on a diagonal. Where all As are one, as where each group has a number of its own (A the
    identity), it is kept once and Bs are stacked.

    Args:
        branches: of each matrix, None where it has none.
        rows: N of each matrix.

    Returns:
        A [rank, groups], None for the identity, and B [sum of rows, rank].
    """
    there = [branch for branch in branches if branch is not None]
    if not there:
        return None
    first = there[0][0]
    if all(torch.equal(a, first) for a, _ in there):
        a, empty = first, len(first)
        b = torch.cat([torch.zeros(n, empty) if x is None else x[1] for x, n in zip(branches, rows, strict=True)])
    else:
        a = torch.cat([a for a, _ in there])
        diagonal = [torch.zeros(n, 0) if x is None else x[1] for x, n in zip(branches, rows, strict=True)]
        b = torch.block_diag(*diagonal)
    identity = a.shape[0] == a.shape[1] and torch.equal(a, torch.eye(len(a)))
    return None if identity else a, b


def add_branch(graph: GraphBuilder, y: ir.Value, x: ir.Value, name: str, block: int) -> ir.Value:
    """y [batch, sequence, N] plus the branch of a matrix over x [batch, sequence, K], if the data file holds one."""
    if f"{name}.branch_b" not in graph.tensors:
        return y
    grouped = graph.op("Reshape", x, graph.constant(f"groups_of.{block}", [0, 0, -1, block]))
    sums = graph.op("ReduceSum", grouped, graph.constant("last_axis", [-1]), keepdims=0)
    if f"{name}.branch_a" in graph.tensors:
        sums = graph.op("MatMul", sums, graph.weight(f"{name}.branch_a"))
    return graph.op("Add", y, graph.op("MatMul", sums, graph.weight(f"{name}.branch_b")))
