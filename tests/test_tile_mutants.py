"""Bugs planted into what is built on tiles, on plain ones: the programs and cases that check it must see each."""

import pytest
from native_build import must_have_sanitizers, run_tiles_with_bug

# file of csrc/cpu, what stands there, what takes its place where BUG is true
PLANTED = {
    "pairs past the end of a row": ("tile_product.h", "if (there >= 2 * LANES)", "if (BUG || there >= 2 * LANES)"),
    "pairs that are there": (
        "tile_product.h",
        "there * 2);\n  return load_bits<Floats>",
        "(there - BUG) * 2);\n  return load_bits<Floats>",
    ),
    "numbers past the end of a row": ("tile_product.h", "if (there >= LANES)", "if (BUG || there >= LANES)"),
    "panel of one tile": ("tile_product.h", "columns - panel > TILE ? 2 : 1", "BUG || columns - panel > TILE ? 2 : 1"),
    "tile in its panel": (
        "tile_product.h",
        "(step * tiles + (j - panel) / TILE)",
        "(step * (BUG ? 1 : tiles) + (j - panel) / TILE)",
    ),
    "second row of a pair": ("tile_product.h", "row_at(k + 2 * pair + 1)", "row_at(k + 2 * pair + !BUG)"),
    "no transposition": ("tile_product.h", "transpose(cells);", "if (!BUG) transpose(cells);"),
    "first tile of sums": ("tile_product.h", "tiles.zero<0>();", "if (!BUG) tiles.zero<0>();"),
    "last tile of sums": ("tile_product.h", "tiles.zero<3>();", "if (!BUG) tiles.zero<3>();"),
    "step of one tile": ("tile_product.h", "packed += V * TILE_BYTES;", "packed += (BUG ? 2 : V) * TILE_BYTES;"),
    "second rows": (
        "tile_product.h",
        "(const char*)rows.second + column",
        "(const char*)(BUG ? rows.first : rows.second) + column",
    ),
    "place of the second rows' sums": (
        "tile_product.h",
        "tiles.store<2>(sums + TILE * sums_row",
        "tiles.store<2>(sums + (TILE - BUG) * sums_row",
    ),
    "rows past the last": (
        "tile_weight.h",
        "last_tile = end > TILE ? end - TILE : 0;",
        "last_tile = BUG ? row : end > TILE ? end - TILE : 0;",
    ),
    "sums of another row": (
        "tile_weight.h",
        ".skipped = two ? row + TILE - last_tile",
        ".skipped = two ? !BUG * (row + TILE - last_tile)",
    ),
    "sums of one tile": ("tile_weight.h", ": row - last_tile}", ": BUG ? 0 : row - last_tile}"),
    "rows of the first tile": ("tile_weight.h", ".whole = two ? TILE : 0", ".whole = two && !BUG ? TILE : 0"),
    "last block left waiting": (
        "tile_weight.h",
        "while (waiting.done < waiting.count)",
        "while (!BUG && waiting.done < waiting.count)",
    ),
    "rows finished too late": ("tile_weight.h", "due >= steps; due -= steps", "due >= steps + BUG; due -= steps"),
    "bias of another tile": (
        "tile_weight.h",
        "load(w.bias + column + i * LANES)",
        "load(w.bias + column + !BUG * i * LANES)",
    ),
    "narrow panel": (
        "tile_weight.h",
        "const bool wide = columns - block.column > TILE;",
        "const bool wide = !BUG && columns - block.column > TILE;",
    ),
    "rows of a task too few to read": (
        "linear.h",
        "rows < Weight::LEAST_ROWS) {",
        "rows < Weight::LEAST_ROWS - 15 * BUG) {",
    ),
    "memory for few rows": (
        "linear.h",
        "(rows < Weight::LEAST_ROWS ? Weight::LEAST_ROWS : rows)",
        "(!BUG && rows < Weight::LEAST_ROWS ? Weight::LEAST_ROWS : rows)",
    ),
    "zeros beside x": (
        "linear.h",
        "if (Weight::readable(K) > K) memset",
        "if (!BUG && Weight::readable(K) > K) memset",
    ),
    "zeros beside hidden values": (
        "linear.h",
        "Weight::readable(hidden) > hidden && row",
        "!BUG && Weight::readable(hidden) > hidden && row",
    ),
    "x that is not moved": ("linear.h", "|| Weight::readable(K) > K;", "|| (!BUG && Weight::readable(K) > K);"),
    "shared rows of the first block": (
        "linear.h",
        "(T*)shared.of(0) + first * moved.row);",
        "(T*)shared.of(0) + !BUG * first * moved.row);",
    ),
    "keys in whole tiles": (
        "attention_tiles.h",
        "keys(round_up(Nk, TILE))",
        "keys(Nk / TILE * TILE + (BUG && Nk > TILE ? 0 : Nk % TILE ? TILE : 0))",
    ),
    "second tile of queries": (
        "attention_tiles.h",
        "count > TILE ? rows + TILE * row",
        "count > TILE && !BUG ? rows + TILE * row",
    ),
    "zeros beside a query": ("attention_tiles.h", "      memset(to + r", "      if (!BUG) memset(to + r"),
    "values of another step": (
        "attention_tiles.h",
        "pack_pairs_of_rows(value_at, step * TILE_NUMBERS",
        "pack_pairs_of_rows(value_at, (step - BUG * (step > 0)) * TILE_NUMBERS",
    ),
    "weights of keys beyond the last": (
        "attention.h",
        "logits[j] = -INFINITY;\n  for (int64_t j = 0; j < padded; j += LANES) {\n    Floats logit",
        "logits[j] = BUG ? 0 : -INFINITY;\n  for (int64_t j = 0; j < padded; j += LANES) {\n    Floats logit",
    ),
    "unpacked: rows past the last": (
        "linear_unpacked.h",
        "if (i >= last) return nullptr;",
        "if (!BUG && i >= last) return nullptr;",
    ),
    "unpacked: second tile of the weight": (
        "linear_unpacked.h",
        "D - column > TILE ? weight",
        "D - column > TILE * (1 + BUG) ? weight",
    ),
    "unpacked: y^T not transposed": ("linear_unpacked.h", "transpose(square);", "if (!BUG) transpose(square);"),
    "unpacked: bias of a row": (
        "linear_unpacked.h",
        "load(a.weight.bias + column)",
        "load(a.weight.bias + !BUG * column)",
    ),
    "unpacked: shared panels": (
        "linear_unpacked.h",
        "shared.of(0) + packed_size(first));",
        "shared.of(0) + !BUG * packed_size(first));",
    ),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    must_have_sanitizers(tmp_path_factory)
    return lambda bug: run_tiles_with_bug(tmp_path_factory, list(PLANTED.values()), bug)


@pytest.mark.slow
def test_programs_without_a_bug_fail(run):
    done = run(-1)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_bug_is_not_seen(name, run):
    done = run([*PLANTED].index(name))
    assert done.returncode, f"{name}: nothing saw it"
