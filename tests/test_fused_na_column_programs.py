"""How programs by columns share the samples."""

import pytest

from fused_na.triton.column_blocks import blocks_of
from fused_na.triton.column_programs import samples_of_program
from fused_na.triton.tiles import Workload, choose_tiles
from fused_na.window import Axis


@pytest.mark.parametrize(
    ("length", "dilation", "heads", "batch", "expected"),
    [
        (56, 1, 2, 128, 8),  # of 196 columns, so that all programs run at once three times
        (28, 1, 4, 128, 15),
        (14, 1, 8, 128, 1),  # long columns
        (7, 1, 16, 128, 3),
        (56, 8, 2, 128, 22),
        (56, 1, 2, 1, 1),
        (7, 1, 2, 64, 1),  # fewer programs than run at once
        (70, 10, 2, 10**6, 64),  # no program has more
    ],
)
def test_samples_of_a_program(length: int, dilation: int, heads: int, batch: int, expected: int) -> None:
    axis = Axis(length, 7, 1, dilation)
    tiles = choose_tiles("key_value", Workload((axis, axis), 32, 32, 2, has_columns=True))
    blocks = blocks_of(axis, tiles.key[0] // 4, False)
    columns = heads * dilation**2 * -(-length // dilation // tiles.key[0]) * -(-length // dilation // tiles.key[2])
    samples = samples_of_program(blocks, tiles.key, tiles.query, tiles.max_registers, columns, batch, 132)
    assert samples == expected
