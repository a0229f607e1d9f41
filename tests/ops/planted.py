"""Bugs planted in a copy of the CUDA sources, each behind a switch, so that all of them take one compilation."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import NamedTuple

from tests.ops.emulated import SOURCES


class Bug(NamedTuple):
    """In ``file``, ``right`` becomes ``wrong``, where ``BUG`` is true or 1 while the bug is switched on."""

    what: str
    trial: str  # what must show it,
    net: str  # and how
    file: str
    right: str
    wrong: str


# What the emulation says, or the comparison with float64.
NETS = {
    "page": "touches memory .* an allocation",
    "outside": "touches memory .* an allocation|overflows, leaves an array",
    "sanitizer": "overflows, leaves an array, or uses a pointer that is not aligned",
    "vector": "a vector access is not aligned",
    "wait": "waits for ever",
    "warp": "lanes of a warp wait at .* and at",
    "copy": "a bulk copy reads past its tensor",
    "barrier": "an mbarrier is used before it was initialised",
    "bytes": "copies land that it did not expect",
    "leave": "a block leaves while a bulk copy to it is under way",
    "phase": "waits for ever|errs by|^assert",
    "value": "errs by|^assert",
}
BUGS = (
    # ---- Pearson, split form: planes ----
    Bug(
        "a chunk of a plane is one element too long",
        "planes", "page", "cuda/pearson_planes.cuh",
        "min(level.chunk, level.hw - start)) : 0", "min(level.chunk, level.hw - start)) + BUG : 0",
    ),
    Bug(
        "the last edge of a plane gets no gradient",
        "planes", "value", "cuda/pearson_planes.cuh",
        "lane < split.edges;\n  if (split.packs > 0) {\n    batch",
        "lane < split.edges - BUG;\n  if (split.packs > 0) {\n    batch",
    ),
    Bug(
        "the last vector of a plane gets no gradient",
        "planes", "value", "cuda/pearson_planes.cuh",
        "first < split.packs; first +=", "first < split.packs - BUG; first +=",
    ),
    Bug(
        "the teacher is read in vectors whatever its address",
        "planes", "vector", "cuda/pearson_planes.cuh",
        "wide = is_pack_aligned(t + split.head)", "wide = BUG || is_pack_aligned(t + split.head)",
    ),
    Bug(
        "the gradient is written in vectors whatever its address",
        "planes", "vector", "cuda/pearson_planes.cuh",
        "&& is_pack_aligned(dx + split.head)", "&& (BUG || is_pack_aligned(dx + split.head))",
    ),
    Bug(
        "images share a cell",
        "planes", "value", "cuda/pearson_planes.cuh",
        "plane / level.c * level.chunks + piece", "plane / level.c * level.chunks * !BUG + piece",
    ),
    Bug(
        "the heads' gradient is left out of vectors",
        "planes", "value", "cuda/pearson_planes.cuh", "adds ? added[i][e]", "adds && !BUG ? added[i][e]",
    ),
    Bug(
        "what stands in for packs past the last one is summed",
        "planes", "value", "cuda/pearson_sweep.cuh", "if (all || first", "if (all || BUG || first",
    ),
    Bug(
        "packs past the last one are read",
        "planes", "page", "cuda/pearson_sweep.cuh",
        "min(first + i * kApart, last) * pitch", "(BUG ? first + i * kApart : min(first + i * kApart, last)) * pitch",
    ),
    Bug(
        "a plane without packs is read before its first element",
        "planes", "page", "cuda/pearson_planes.cuh", "  if (last >= 0) {", "  if (BUG || last >= 0) {",
    ),
    Bug(
        "packs are summed twice and others never",
        "planes", "value", "cuda/pearson_sweep.cuh",
        "load(held, first + 2 * kStep);", "load(held, first + (2 - BUG) * kStep);",
    ),
    Bug(
        "the sums of a plane's threads are not added",
        "planes", "value", "cuda/pearson_planes.cuh",
        "  team_sum<kTeam>(sums.of, scratch);\n", "  if (!BUG) team_sum<kTeam>(sums.of, scratch);\n",
    ),
    Bug(
        "the sum before may still be read from the scratch",
        "planes", "value", "common/reduce.cuh",
        "__syncthreads();  // whoever", "if (!BUG) __syncthreads();  // whoever",
    ),
    Bug(
        "the scratch is read before it is written",
        "planes", "value", "common/reduce.cuh",
        "  __syncthreads();\n#pragma unroll", "  if (!BUG) __syncthreads();\n#pragma unroll",
    ),
    Bug(
        "the scratch is used past its end",
        "planes", "sanitizer", "common/reduce.cuh",
        "scratch[threadIdx.x / 32 * N + i]", "scratch[(threadIdx.x / 32 + BUG * 25) * N + i]",
    ),
    Bug(
        "lanes of a warp part at a barrier",
        "planes", "warp", "common/reduce.cuh",
        "  warp_sum(values);\n",
        "  warp_sum(values);\n  if (BUG && threadIdx.x % 2) {\n    __syncthreads();\n  } else\n",
    ),
    Bug(
        "half a warp leaves before the sum",
        "planes", "wait", "common/reduce.cuh",
        "  constexpr int kWarps = kThreads / 32;\n",
        "  constexpr int kWarps = kThreads / 32;\n  if (BUG && threadIdx.x == 40) return;\n",
    ),
    # ---- rows ----
    Bug(
        "a chunk has a row too many",
        "rows", "page", "cuda/pearson_rows.cuh", "min(begin + stretch, rows)", "min(begin + stretch, rows + BUG)",
    ),
    Bug(
        "rows of one stretch are summed with another, too",
        "rows", "value", "cuda/pearson_rows.cuh",
        "is_inside ? min(begin + stretch", "is_inside ? min(begin + stretch + BUG",
    ),
    Bug(
        "rows past the last one are read for the gradient",
        "rows", "page", "cuda/pearson_rows.cuh",
        "min(first + i * Shape::kLanes, last - 1) * c",
        "min(first + i * Shape::kLanes, BUG ? last + 8 : last - 1) * c",
    ),
    Bug(
        "channels past the last one are read",
        "rows", "page", "cuda/pearson_rows.cuh", "is_inside ? min(", "BUG || is_inside ? min(",
    ),
    Bug(
        "channels past the last one get a gradient",
        "rows", "page", "cuda/pearson_rows.cuh",
        "if (where.channel >= level.c) {", "if (!BUG && where.channel >= level.c) {",
    ),
    Bug(
        "the last row of a chunk gets no gradient",
        "rows", "value", "cuda/pearson_rows.cuh",
        "last = min(first + level.chunk, level.n * level.hw);",
        "last = min(first + level.chunk, level.n * level.hw) - BUG;",
    ),
    Bug(
        "totals are added before every warp has put its sums",
        "rows", "value", "cuda/pearson_rows.cuh",
        "    __syncthreads();\n  };", "    if (!BUG) __syncthreads();\n  };",
    ),
    Bug(
        "means are read before they are written",
        "rows", "value", "cuda/pearson_rows.cuh",
        "/ sampled;\n  }\n  __syncthreads();", "/ sampled;\n  }\n  if (!BUG) __syncthreads();",
    ),
    Bug(
        "betas are read before they are written",
        "rows", "value", "cuda/pearson_rows.cuh",
        "threadIdx.x));\n  }\n  __syncthreads();", "threadIdx.x));\n  }\n  if (!BUG) __syncthreads();",
    ),
    Bug(
        "sums of a chunk are added before every warp has put its own",
        "rows", "value", "cuda/pearson_rows.cuh",
        "  __syncthreads();\n  if (threadIdx.x >= kChannels) {",
        "  if (!BUG) __syncthreads();\n  if (threadIdx.x >= kChannels) {",
    ),
    Bug(
        "rows are taken for vectors whatever their address",
        "rows", "vector", "cuda/pearson_split.cu",
        "== 0 && is_pack_aligned(args.x)", "== 0 && (BUG || is_pack_aligned(args.x))",
    ),
    # ---- what both share ----
    Bug(
        "a block takes the level before its own",
        "planes", "value", "cuda/pearson_levels.cuh",
        ">= levels.at[i + 1].first_block", ">= levels.at[i + 1].first_block + BUG",
    ),
    Bug(
        "every second chunk is joined",
        "rows", "value", "cuda/pearson_kernels.cuh",
        "if (lane < count) {", "if (lane < count && !(BUG && lane % 2)) {",
    ),
    Bug(
        "the losses of levels are read before they are written",
        "planes", "value", "cuda/pearson_kernels.cuh",
        "  __syncthreads();\n  if (threadIdx.x == 0) {", "  if (!BUG) __syncthreads();\n  if (threadIdx.x == 0) {",
    ),
    Bug(
        "nobody sets the ticket to 0",
        "planes", "value", "cuda/pearson_kernels.cuh",
        "if (blockIdx.x == 0 && threadIdx.x == 0) {", "if (!BUG && blockIdx.x == 0 && threadIdx.x == 0) {",
    ),
    Bug(
        "the last block but one adds up the losses",
        "rows", "value", "common/ticket.cuh", "== gridDim.x - 1", "== gridDim.x - 1 - (BUG && gridDim.x > 1)",
    ),
    Bug(
        "threads of a block go on before they know whether it is the last",
        "planes", "sanitizer", "common/ticket.cuh",
        "  }\n  __syncthreads();\n  return", "  }\n  if (!BUG) __syncthreads();\n  return",
    ),
    Bug(
        "the shares have no place for the ticket",
        "planes", "page", "cuda/pearson_split.cu", "{columns + 2}", "{columns + 2 - BUG}",
    ),
    # ---- packing ----
    Bug(
        "a piece has a row too many",
        "pack", "page", "cuda/pack.cu",
        "min(part.tile_rows, part.rows - piece.row)", "min(part.tile_rows, part.rows - piece.row + BUG)",
    ),
    Bug(
        "a piece has a column too few",
        "pack", "value", "cuda/pack.cu",
        "min(part.tile_columns, part.columns - piece.column)",
        "min(part.tile_columns, part.columns - piece.column - BUG)",
    ),
    Bug(
        "the last of a piece is not moved",
        "pack", "value", "cuda/pack.cu",
        "(total - static_cast<int>(threadIdx.x)", "(total - BUG - static_cast<int>(threadIdx.x)",
    ),
    Bug(
        "what follows a piece is asked for",
        "pack", "outside", "cuda/pack.cu", "is_own = k < left", "is_own = BUG || k < left",
    ),
    Bug(
        "a thread walks on by a column too few",
        "pack", "value", "cuda/pack.cu",
        "inner_step = kThreads - step * inners", "inner_step = kThreads - step * inners - BUG",
    ),
    Bug(
        "a turn takes vectors past its last",
        "pack", "outside", "cuda/pack.cu", "      if (place < total) {", "      if (BUG || place < total) {",
    ),
    Bug(
        "the last element is not gathered",
        "pack", "value", "cuda/pack.cu", "work.taps, work.columns,\n", "work.taps, work.columns - BUG,\n",
    ),
    Bug(
        "rows lie one element further apart",
        "pack", "sanitizer", "cuda/pack.cu", "* part.row_stride;", "* (part.row_stride + BUG);",
    ),
    Bug(
        "a list is read one place further on",
        "pack", "page", "cuda/pack.cu", "index[part.column_list + column]", "index[part.column_list + column + BUG]",
    ),
    Bug(
        "vectors are copied whatever the shared side's address",
        "pack", "sanitizer", "cuda/pack.cu",
        "packed_wide && is_pack_aligned(work.shared)", "packed_wide && (BUG || is_pack_aligned(work.shared))",
    ),
    Bug(
        "a turn reads vectors whatever the address",
        "pack", "sanitizer", "cuda/pack.cu",
        "per_row % 4 == 0 &&\n      is_pack_aligned(work.shared)",
        "per_row % 4 == 0 &&\n      (BUG || is_pack_aligned(work.shared))",
    ),
    Bug(
        "packed weights are read from the turn before it is full",
        "pack", "value", "cuda/pack.cu",
        "      turn_shared_side<action>(work, cells, pitch);\n      __syncthreads();",
        "      turn_shared_side<action>(work, cells, pitch);\n      if (!BUG) __syncthreads();",
    ),
    Bug(
        "gradients are read from the turn before it is full",
        "pack", "value", "cuda/pack.cu",
        "      __syncthreads();\n      turn_shared_side<action>",
        "      if (!BUG) __syncthreads();\n      turn_shared_side<action>",
    ),
    Bug(
        "the turn is used past its end",
        "pack", "sanitizer", "cuda/pack.cu",
        "(work.columns + 3) / 4 * 4 + 4;", "(work.columns + 3) / 4 * 4 + 4 + 400 * BUG;",
    ),
    Bug(
        "a gradient replaces what it should be added to",
        "pack", "value", "cuda/pack.cu",
        "action == Action::kAdd ? as_float(shared) + packed",
        "action == Action::kAdd && !BUG ? as_float(shared) + packed",
    ),
    # ---- Pearson, single pass ----
    Bug(
        "a bulk copy reads past the tensor",
        "single", "copy", "ops/pearson_plan.h",
        "return vectors_of(r) < left ?", "return BUG || vectors_of(r) < left ?",
    ),
    Bug(
        "a stage waits for half of its bytes",
        "single", "bytes", "cuda/pearson_single_team.cuh",
        "hopper::barrier_expect(barriers + stage, 2 * bytes);",
        "hopper::barrier_expect(barriers + stage, (2 - BUG) * bytes);",
    ),
    Bug(
        "a sweep does not wait for its stage",
        "single", "value", "cuda/pearson_single.cuh",
        "hopper::barrier_wait(barriers + stage);", "if (!BUG) hopper::barrier_wait(barriers + stage);",
    ),
    Bug(
        "a stage is over before its bytes are expected",
        "single", "phase", "cuda/pearson_single_team.cuh",
        "  for (int r = team.thread; r < slice.rows; r += 32) {",
        "  for (int stage = team.thread; BUG && stage * kStage < slice.vectors; stage += 32) {\n"
        "    hopper::barrier_arrive(barriers + stage);\n  }\n"
        "  for (int r = team.thread; r < slice.rows; r += 32) {",
    ),
    Bug(
        "a copy lands on a barrier of no stage",
        "single", "barrier", "cuda/pearson_single_team.cuh",
        "source.s + place, bytes, barriers + stage);",
        "source.s + place, bytes, barriers + (BUG && team.index == 0 ? kMaxBarriers - 1 : stage));",
    ),
    Bug(
        "nobody waits for a copy",
        "single", "leave", "cuda/pearson_single.cuh",
        "      team.total(square, fixed.squares);\n",
        "      team.total(square, fixed.squares);\n"
        "      if (BUG) hopper::barrier_expect(barriers, 16), hopper::bulk_load(s, source.s, 16, barriers);\n",
    ),
    Bug(
        "lanes of a warp meet at two copies of one barrier",
        "single", "warp", "cuda/pearson_single_team.cuh",
        "    sync();\n  }\n  template <int N>",
        "    if (BUG && thread % 2) sync(); else sync();\n  }\n  template <int N>",
    ),
    Bug(
        "the first warp of a level is left out of its sum",
        "single", "value", "cuda/pearson_single.cu",
        "warps[warp * count + lane]", "warps[warp * count + lane + BUG]",
    ),
    Bug(
        "the last barrier is not initialised",
        "single", "barrier", "cuda/pearson_single.cuh",
        "i < stages << level.geometry.team_bits;", "i < (stages << level.geometry.team_bits) - BUG;",
    ),
    Bug(
        "barriers are used before they are initialised",
        "single", "barrier", "cuda/pearson_single.cuh",
        "  __syncthreads();\n  if (V > 1 && team.thread < 32) {",
        "  if (!BUG) __syncthreads();\n  if (V > 1 && team.thread < 32) {",
    ),
    Bug(
        "plain loads are swept before they have landed",
        "single", "value", "cuda/pearson_single.cuh",
        "  team.sync();\n  sweep_statistics", "  if (!BUG) team.sync();\n  sweep_statistics",
    ),
    Bug(
        "moments are read before the others have written theirs",
        "single", "value", "cuda/pearson_single.cuh",
        "    hopper::cluster_arrive();\n    hopper::cluster_wait();",
        "    hopper::cluster_arrive();\n    if (!BUG) hopper::cluster_wait();",
    ),
    Bug(
        "a block leaves while others read its moments",
        "single", "value", "cuda/pearson_single.cuh",
        "hopper::cluster_wait();  // others", "if (!BUG) hopper::cluster_wait();  // others",
    ),
    Bug(
        "the coefficients are read before they are finished",
        "single", "value", "cuda/pearson_single.cuh",
        "  if (works) {\n    team.sync();", "  if (works) {\n    if (!BUG) team.sync();",
    ),
    Bug(
        "the losses of warps are added before all are there",
        "single", "value", "cuda/pearson_single.cu",
        "  __syncthreads();\n  if (warp < ends.count) {", "  if (!BUG) __syncthreads();\n  if (warp < ends.count) {",
    ),
)  # fmt: skip


def planted_sources(folder: Path) -> Path:
    """A copy of ``csrc`` in which bug i + 1 of :data:`BUGS` is behind ``planted == i + 1``."""
    shutil.copytree(SOURCES, folder)
    texts: dict[str, str] = {}
    for number, bug in enumerate(BUGS, start=1):
        text = texts.setdefault(bug.file, (folder / bug.file).read_text())
        assert text.count(bug.right) == 1, f"{bug.what}: {bug.file} has {text.count(bug.right)} times {bug.right!r}"
        texts[bug.file] = text.replace(bug.right, bug.wrong.replace("BUG", f"(planted == {number})"))
    types = "common/element_type.cuh"  # all of them as float32: what is not compiled takes no time
    texts[types] = re.sub(r"launch\(__\w+\{\}\)", "launch(float{})", (folder / types).read_text())
    for file, text in texts.items():
        (folder / file).write_text(text)
    return folder
