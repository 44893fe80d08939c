"""Known bugs planted in the source of kernels: each must make a test of the CPU tier fail.

A mutant is a copy of the package with one change; the named tests run on it in a process of their own, in Triton's
interpreter. On the package as it is the same tests pass, which `make test` shows. random_mutants.py draws others.
"""

import pytest
from mutants import KERNELS, TESTS, is_seen, run_on_mutant

BLOCK = "../../inference/gpu_block.py"
# file, as seen from vitfast/kernels/triton, text, what takes its place, and tests that are meant to see it
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
    "third part of the keys without their gradient of q": (
        "attention_backward_short.py", "dq0, dq1 = query_rows(ds2, k20, k21, dq0, dq1, W1, TURNED, PRECISION)", "pass",
        "test_backward_kernel_is_wrong_at_a_length and three",
    ),
    "third part of the keys masked as if further on": (
        "attention_backward_short.py", "dv20, dv21, i, P0 + P1, n,", "dv20, dv21, i, P0 + P1 + P2, n,",
        "test_backward_kernel_is_wrong_at_a_length and three",
    ),
    "delta of the next row": (
        "attention_backward_short.py", "            sums = tl.load(delta + i + rows, mask=rows < left, other=0.0)\n",
        "            sums = tl.load(delta + i + rows + 1, mask=rows < left - 1, other=0.0)\n",
        "test_backward_kernel_is_wrong_at_a_length and fp32 and first",
    ),
    "bulk copy of another part of a row": (
        "attention_tiles.py", "second.load([image, head, row, W0])", "second.load([image, head, row, 0])",
        "test_head_dim_is_padded_wrongly and descriptors",
    ),
    "bulk copy of the next keys": (
        "attention_tiles.py", "first.load([image, head, row, 0])", "first.load([image, head, row + 1, 0])",
        "test_forward_kernel_is_wrong_at_a_length and descriptors",
    ),
    "bulk copy of another head": (
        "attention_tiles.py", "first.load([image, head, row, 0])", "first.load([image, 0, row, 0])",
        "test_forward_kernel_is_wrong_at_a_length and descriptors",
    ),
    "rows of zeros seen by a key of infinities": (
        "attention_backward.py", "    if TAIL:\n", "    if False:\n", "test_a_key_that_no_query_sees",
    ),
    "bulk copy of grad as of q": (
        "attention_backward.py", "load_boxes(grad, grad_rest, b", "load_boxes(q, q_rest, b",
        "test_backward_kernel_is_wrong_at_a_length and descriptors",
    ),
    "bulk copies of padding": (
        "attention.py", "return not self.packed and not self.has_lengths", "return not self.packed",
        "test_padding_takes_part and descriptors",
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
    # of the form of a prepared block that defers biases
    "deferred bias carried twice": (
        BLOCK, "    return added + bias\n", "    return added + 2 * bias\n", "test_deferred_biases_are_lost and plain",
    ),
    "deferred bias not carried": (
        BLOCK, "self.leaving = _with_bias(None if second else self.between, self.fc2.bias)",
        "self.leaving = None if second else self.between", "test_deferred_biases_are_lost and plain",
    ),
    "deferred bias of the norm before": (
        BLOCK, "deferred.normed(h, self.between, None", "deferred.normed(h, self.entering, None",
        "test_deferred_biases_are_lost and plain",
    ),
    "deferred biases forgotten by the final norm": (
        BLOCK, "deferred.normed(self.x, self.added, weight", "deferred.normed(self.x, None, weight",
        "test_deferred_biases_are_lost and plain",
    ),
    "deferred biases forgotten where nobody norms": (
        BLOCK, "torch.add(self.x, self.added, out", "torch.add(self.x, 0 * self.added, out",
        "test_deferred_biases_are_lost and mean",
    ),
    "deferred biases added again after they were written": (
        BLOCK, "_with_bias(None if first else added, self.proj.bias)", "_with_bias(added, self.proj.bias)",
        "test_deferred_biases_change_a_model and aligned",
    ),
    "deferred biases not written back": (
        "layer_norm_rows.py", "    if ADDED:\n        tile += load_vector(added, columns, C)[None, :]\n    if TOTAL:\n"
        "        store_tile(total, first, left, columns, tile, C, BM)\n", "    if TOTAL:\n"
        "        store_tile(total, first, left, columns, tile, C, BM)\n    if ADDED:\n"
        "        tile += load_vector(added, columns, C)[None, :]\n",
        "test_norm_of_rows_and_a_vector_is_wrong",
    ),
    "tokens of somebody else added to": (
        BLOCK, "if not stream.own:", "if False:", "test_tensor_of_somebody_else_is_written_to",
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
    "slope of another GELU", "residual added twice", "mask of a load dropped", "deferred bias carried twice",
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
