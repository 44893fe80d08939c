"""Known bugs planted in the source of kernels: each must make a test of the CPU tier fail.

A mutant is a copy of the package with one change; the named tests run on it in a process of their own, in Triton's
interpreter. On the package as it is the same tests pass, which `make test` shows. random_mutants.py draws others.
"""

import pytest
from mutants import KERNELS, TESTS, is_seen, run_on_mutant

# file of vitfast/kernels/triton, text, what takes its place, and tests that are meant to see it
MUTANTS = {
    "tail mask dropped": (
        "attention_forward.py", "    if M:\n", "    if False:\n", "test_forward_kernel_is_wrong_at_a_length and fp32"
    ),
    "tail mask dropped in the backward": (
        "attention_backward.py", "    if MASKED:\n        p = tl.where((columns",
        "    if False:\n        p = tl.where((columns", "test_large_logits_overflow",
    ),
    "scale from the padded head dim": (
        "attention.py", "self.scale = float(scale)\n", "self.scale = scale * (self.D / self.width) ** 0.5\n",
        "test_head_dim_is_padded_wrongly and fp32",
    ),
    "stride of v ignored": (
        "attention_forward.py", "v = advance(advance(v, b, v_batch, UNIT), h, v_head, UNIT)",
        "v = advance(advance(v, b, k_batch, UNIT), h, k_head, UNIT)", "test_stride_is_ignored and fp32",
    ),
    **{
        f"32-bit row offset in {kernels}": (
            "addresses.py", "tl.cast(index, tl.int64) * (tl.cast(stride, tl.int64) * UNIT)",
            "index * (stride * UNIT)", f"test_row_past_two_to_the_31 and test_{kernels}",
        )
        for kernels in ("attention", "layer_norm", "linear")
    },
    "lse of base 2": (
        "attention_forward.py", "top * scale + (tl.log2(total) - tl.fma(top, scale_log2, -shift)) * LN2",
        "top * scale_log2 + tl.log2(total)",
        "test_forward_kernel_is_wrong_at_a_length and fp32",
    ),
    "lse read in base 2": (
        "attention_backward.py", "- log_sum[None, :]) * LOG2E", "- log_sum[None, :])",
        "test_backward_kernel_is_wrong_at_a_length and fp32",
    ),
    "dropout of the backward shifted": (
        "attention_backward.py", "kept(seed, bh, rows[None, :], columns[:, None], threshold)",
        "kept(seed, bh, rows[None, :] + 1, columns[:, None], threshold)", "test_dropout_draws_another_mask and fp32",
    ),
    "padding not masked": (
        "attention_forward.py", "n = tl.minimum(tl.load(lengths + b), keys)", "n = keys",
        "test_padding_takes_part and fp32",
    ),
    "second part of a row left out": (
        "attention_tiles.py", "        s = tl.dot(a1, tl.trans(b1), s, input_precision=PRECISION)\n", "        s = s\n",
        "test_head_dim_is_padded_wrongly and fp32",
    ),
    "delta without the second part": (
        "attention_backward.py", "        total += tl.sum(a1.to(tl.float32) * b1.to(tl.float32), 1)\n",
        "        total += 0\n",
        "test_head_dim_is_padded_wrongly and fp32",
    ),
    "eps ten times as large": (
        "layer_norm_rows.py", "tl.sqrt_rn(variance + eps)", "tl.sqrt_rn(variance + 10.0 * eps)",
        "test_width_is_padded_wrongly and fp32",
    ),
    "variance over padded lanes": (
        "layer_norm_rows.py", "centered = tl.where((columns < C)[None, :], tile - mean[:, None], 0.0)",
        "centered = tile - mean[:, None]", "test_width_is_padded_wrongly and fp32",
    ),
    "variance as a difference of squares": (
        "layer_norm_rows.py", "variance = tl.sum(centered * centered, 1) / C",
        "variance = tl.sum(tile * tile, 1) / C - mean * mean", "test_variance_is_a_difference",
    ),
    "GELU of tanh": (
        "activations.py", '    if ACT == "gelu":\n        x, _ = gelu_and_tail(x, TYPE.primitive_bitwidth == 32)\n',
        '    if ACT == "gelu":\n        x = x * sigmoid(TANH_SCALE * (x + TANH_CUBE * x * x * x))\n',
        "test_activation_is_of_another_flavour and fp32",
    ),
    "slope of another GELU": (
        "activations.py", "+ x * bell * 0.3989422804014327", "+ x * bell * 0.4",
        "test_activation_is_of_another_flavour and fp32",
    ),
    "cube that overflows": (
        "activations.py", "near = tl.minimum(tl.maximum(x, -TANH_ENDS, tl.PropagateNan.ALL), TANH_ENDS, "
        "tl.PropagateNan.ALL)", "near = x", "test_activation_overflows and fp32",
    ),
    "last rows dropped": (
        "linear.py", "tiles_m, tiles_n = -(-M // config.block_m),", "tiles_m, tiles_n = max(1, M // config.block_m),",
        "test_size_leaves_a_tail_out",
    ),
    "K tail not masked": (
        "linear_product.py", "tl.load(a_at + k, mask=(k + inner < K)[None, :], other=0.0)", "tl.load(a_at + k)",
        "test_stride_is_ignored and pointers",
    ),
    "partial sum lost": (
        "linear_product.py", "for i in tl.static_range(SPLIT):", "for i in tl.static_range(SPLIT - 1):",
        "test_residual_and_scales_are_forgotten",
    ),
    "residual added twice": (
        "linear_finish.py", "v = v + widened(tile, v)", "v = v + 2.0 * widened(tile, v)",
        "test_residual_and_scales_are_forgotten",
    ),
    "residual of the MLP without a gradient": (
        "linear_grads.py", "total_grad=residual_grad\n", "total_grad=None\n", "test_gradient_of_an_mlp_is_wrong",
    ),
    "drop path forgotten in the backward": (
        "layer_norm_rows.py", "                d = d * load_row_scale(row_scale, first, left, tokens, BM)[:, None]\n",
        "                d = d\n", "test_gradient_of_an_mlp_is_wrong and scaled",
    ),
    "drop path of another image": (
        "linear_finish.py", "tl.load(row_scale + rows // tokens", "tl.load(row_scale + rows % tokens * 0",
        "test_residual_and_scales_are_forgotten",
    ),
    "fold without the mean": (
        "linear_finish.py", "v = v - means[:, None] * of_mean[None, :]", "v = v",
        "test_size_leaves_a_tail_out",
    ),
    "sums of another column": (
        "linear_finish.py", "load_columns(column_sums, columns, N)", "load_columns(column_sums, columns ^ 1, N)",
        "test_size_leaves_a_tail_out",
    ),
    "what is read ahead is of this part": (
        "linear_finish.py", "row, column + BN, beside_step, M, N,", "row, column, beside_step, M, N,",
        "test_residual_and_scales_are_forgotten and ahead",
    ),
    "statistics of other rows": (
        "linear_finish.py", "    rows = row + tl.arange(0, BM)\n    if PIECES",
        "    rows = row + 1 + tl.arange(0, BM)\n    if PIECES", "test_statistics_that_travel",
    ),
    "one piece's mean for all": (
        "linear_finish.py", "tl.where(piece < PIECES, away - means[None, :], 0.0)", "away * 0.0",
        "test_statistics_that_travel",
    ),
    "statistics of what was not rounded": (
        "linear_finish.py", "v = rounded(v, ", "v = v + 0.0 * rounded(v, ", "test_statistics_that_travel",
    ),
    "bias added twice": (
        "linear_finish.py", "v = v + offsets[None, :]", "v = v + 2.0 * offsets[None, :]", "test_size_leaves_a_tail_out",
    ),
    "counters of a split sum left as they are": (
        "linear_product.py", "                tl.store(arrived + t, 0)\n", "", "test_next_product_counts_on",
    ),
    "GELU of half precision in fp32": (
        "activations.py", "TYPE.primitive_bitwidth == 32", "False", "test_gelu_is_further_off and fp32",
    ),
    "one program's sums of columns lost": (
        "layer_norm_rows.py", "(first + rows < programs)[:, None]", "(first + rows < programs - 1)[:, None]",
        "test_width_is_padded_wrongly and fp32",
    ),
    "rows past the end in a bias's gradient": (
        "linear_finish.py", "        v = tl.where((rows < M)[:, None], v, 0.0)\n", "",
        "test_mlp_is_wrong_in_one_way or test_gradient_of_an_mlp",
    ),
    # what has no other effect than on memory of somebody else
    "statistics written past their end": (
        "linear_finish.py", "inside = (rows < M) & (column < N)", "inside = rows < M",
        "test_kernel_touches and statistics",
    ),
    "mask of a load dropped": (
        "layer_norm_rows.py", "mask=(rows < left)[:, None] & (columns < C)[None, :], other=0.0).to(tl.float32)",
        "mask=(columns < C)[None, :], other=0.0).to(tl.float32)", "test_kernel_touches and norm",
    ),
    "store of a row too far": (
        "attention_tiles.py", "    mask = (rows < left)[:, None]\n", "    mask = (rows < left + 1)[:, None]\n",
        "test_kernel_touches and attention",
    ),
    "grid of a program too many": (
        "linear.py", "    programs = tiles_m * tiles_n * split\n", "    programs = tiles_m * tiles_n * split + 1\n",
        "test_kernel_touches and linear",
    ),
}  # fmt: skip


# one a file, and one a kind of bug
QUICK = (
    "tail mask dropped", "lse read in base 2", "eps ten times as large", "32-bit row offset in linear",
    "slope of another GELU", "residual added twice", "mask of a load dropped",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "mutant", [pytest.param(name, marks=[pytest.mark.full] * (name not in QUICK)) for name in MUTANTS]
)
def test_a_planted_bug_is_not_seen(mutant, tmp_path):
    name, before, after, chosen = MUTANTS[mutant]
    text = (KERNELS / name).read_text()
    assert before in text, f"{name} has no {before!r} any more"
    done = run_on_mutant(tmp_path, name, text.replace(before, after), "-k", chosen, TESTS / "kernels")
    assert is_seen(done), done.stdout[-2000:]


def test_a_masked_load_leaves_what_it_does_not_read_undefined():
    """The interpreter gives 0 there, a GPU anything."""
    files = sorted(KERNELS.glob("*.py"))
    assert len(files) > 10
    for file in files:
        for call in file.read_text().split("tl.load(")[1:]:
            depth, end = 1, 0
            while depth:
                depth += {"(": 1, ")": -1}.get(call[end], 0)
                end += 1
            arguments = call[:end]
            assert "mask=" not in arguments or "other=" in arguments, f"{file.name}: tl.load({arguments}"
