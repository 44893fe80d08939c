"""Known bugs planted in the source of kernels: each must make a test of the CPU tier fail.

A mutant is a copy of the package with one change; the named tests run on it in a process of their own, in Triton's
interpreter. On the package as it is the same tests pass, which `make test` shows.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vitfast

PACKAGE = Path(vitfast.__file__).parent
TESTS = Path(__file__).parent

# file of vitfast/kernels, text, what takes its place, and tests that are meant to see it
MUTANTS = {
    "tail mask dropped": (
        "attention_forward.py", "    if M:\n", "    if False:\n", "test_forward_kernel_is_wrong_at_a_length and fp32"
    ),
    "tail mask dropped in the backward": (
        "attention_backward.py", "    if MASKED:\n        p = tl.where((columns",
        "    if False:\n        p = tl.where((columns", "test_large_logits_overflow",
    ),
    "scale from the padded head dim": (
        "attention.py", "self.scale = scale\n", "self.scale = scale * (self.D / self.width) ** 0.5\n",
        "test_head_dim_is_padded_wrongly and fp32",
    ),
    "stride of v ignored": (
        "attention_forward.py", "v = advance(advance(v, b, v_batch, UNIT), h, v_head, UNIT)",
        "v = advance(advance(v, b, k_batch, UNIT), h, k_head, UNIT)", "test_stride_is_ignored and fp32",
    ),
    "32-bit row offset": (
        "attention_tiles.py", "tl.cast(index, tl.int64) * (tl.cast(stride, tl.int64) * UNIT)",
        "index * (stride * UNIT)", "test_row_past_two_to_the_31",
    ),
    "lse of base 2": (
        "attention_forward.py", "top * scale + tl.log2(total) * LN2", "top * scale_log2 + tl.log2(total)",
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
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_planted_bug_is_not_seen(mutant, tmp_path):
    name, before, after, chosen = MUTANTS[mutant]
    shutil.copytree(PACKAGE, tmp_path / "vitfast", ignore=shutil.ignore_patterns("__pycache__"))
    source = tmp_path / "vitfast" / "kernels" / name
    text = source.read_text()
    assert before in text, f"{name} has no {before!r} any more"
    source.write_text(text.replace(before, after))
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    code = (
        f"import sys, pytest, vitfast; assert vitfast.__file__.startswith({str(tmp_path)!r}), vitfast.__file__;"
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "-x", "-q", "-p", "no:cacheprovider", "-c", TESTS.parent / "pyproject.toml",
         "-k", chosen, TESTS / "kernels"],
        capture_output=True, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert "AssertionError: /" not in done.stderr, done.stderr
    # 1: a test failed; a crash by a signal, as of an address far away, is seen as well; no test chosen would be 5
    assert done.returncode == 1 or done.returncode < 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_a_masked_load_leaves_what_it_does_not_read_undefined():
    """The interpreter gives 0 there, a GPU anything."""
    for file in sorted((PACKAGE / "kernels").glob("*.py")):
        for call in file.read_text().split("tl.load(")[1:]:
            depth, end = 1, 0
            while depth:
                depth += {"(": 1, ")": -1}.get(call[end], 0)
                end += 1
            arguments = call[:end]
            assert "mask=" not in arguments or "other=" in arguments, f"{file.name}: tl.load({arguments}"
