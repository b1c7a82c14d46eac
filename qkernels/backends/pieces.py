"""Over how many blocks the GPU backends split a row where there are few rows, and what each block gets of it."""

from __future__ import annotations

# Entries that a block of 128 threads loads of bf16 rows at a time: four 16-byte loads of each thread.
ITERATION = 4096


def pieces_for(rows: int, vocab: int, processors: int, *, blocks: int, smallest: int, most: int) -> int:
    """Pieces of a row, at most: 1 unless there are too few rows to keep all processors busy.

    Rounded down: all blocks should run at once, and one more than that would start when the others have finished. What
    is computed of the rows does not matter: a log-prob has the same bits beside the reference and alone.

    Args:
        rows, vocab: size of the logits.
        processors: SMs of the device.
        blocks: how many there should be for each of them.
        smallest: fewest entries of a piece.
        most: pieces that the second kernel can combine.
    """
    return max(1, min(blocks * processors // max(rows, 1), -(-vocab // smallest), most))


def span_of(vocab: int, pieces: int) -> int:
    """Entries of a piece, for at most so many of them; of the last one fewer.

    Pieces of more than half an iteration are whole iterations, because a part of one waits for the memory as long as a
    whole one. All are multiples of 8: they have the same alignment. (`split_row` of csrc/cuda/row_tiling.h.)
    """
    least = -(-vocab // pieces)
    step = ITERATION if least > ITERATION // 2 else 8
    return -(-least // step) * step
