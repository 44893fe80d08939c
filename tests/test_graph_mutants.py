"""Bugs planted in `vitfast.inference.graphs`: does the device that pretends see them?"""

import pytest
from mutants import PACKAGE, TESTS, is_seen, run_on_mutant

# file, text, what stands in its place, the tests that see it
MUTANTS = {
    "result not cloned": (
        "graphs.py", "return result if self.views else result.clone()", "return result", "captured_twice or copies",
    ),
    "no lock around a replay": (
        "graphs.py", "self._lock = threading.RLock()", "self._lock = __import__('contextlib').nullcontext()",
        "test_threads_see",
    ),
    "cut to the wrong rows": ("graphs.py", "graph.result[:batch]\n", "graph.result[-batch:]\n", "captured_twice"),
    "not cut": (
        "graphs.py", "result = graph.result if batch == kind.batch else graph.result[:batch]", "result = graph.result",
        "captured_twice",
    ),
    "bucket too small": ("graphs.py", "return -(-batch // step) * step", "return batch // step * step", "fifth"),
    "images not copied": ("graphs.py", "if not _is_in(static, x):", "if False:", "captured_twice"),
    "part of the memory taken for its first rows": (
        "graphs.py", "return x.data_ptr() == static.data_ptr() and", "return _share(x, static) and", "overlaps",
    ),
    "overlapping rows copied onto themselves": ("graphs.py", "x = x.clone()", "pass", "overlaps"),
    "images' memory cleared before it is read": (
        "graphs.py", "if alike and not _share(graph.static, x):", "if alike:", "overlaps",
    ),
    "memory of fewer images shared": (
        "graphs.py", "and len(graph.static) >= kind.batch", "", "captured_twice or shared",
    ),
    "choices forgotten": ("graphs.py", "dispatch.decided(), id(", "0, id(", "choice_is_changed"),
    "configuration forgotten": ("graphs.py", "id(model.config)", "0", "replaced_and"),
    "replaced parts forgotten": (
        "graphs.py", "if not self._places.same():\n            with", "if False:\n            with", "replaced_and",
    ),
    "dtype forgotten": (
        "graphs.py", "x.dtype if x.dtype is torch.uint8 else self.floats", "self.floats", "captured_twice",
    ),
    "layout forgotten": (
        "graphs.py", "layout = torch.channels_last if kind.channels_last else torch.contiguous_format",
        "layout = torch.contiguous_format", "captured_twice or context or shared",
    ),
    "least recently used kept": ("graphs.py", "self._graphs.move_to_end(kind)", "pass", "more_graphs"),
    "captured for ever": ("graphs.py", "if self._captured[kind] > MOST_CAPTURES:", "if False:", "more_graphs"),
    "kinds remembered for ever": (
        "graphs.py", "if kind not in self._captured and len(self._captured) >= MOST_KINDS:", "if False:", "without_end",
    ),
    "patched forwards forgotten": (
        "graphs.py", "map(operator.contains, self._own,", "map(operator.contains, [],", "patched",
    ),
    "new part looked at twice": (
        "graphs.py", "                if not self._places.same():", "                if True:", "another_looks",
    ),
    "failure tried again": ("graphs.py", "            self._refused[kind] = why\n", "", "failed_capture"),
    "memory of a failure kept": (
        "graphs.py", "if not self._graphs or self.device.pool_bytes() > before:", "if False:", "failed_capture",
    ),
    "caller's context captured": (
        "graphs.py", "with torch.inference_mode(False), torch.no_grad():", "if True:", "context_of_the_first",
    ),
    "positions dropped": ("graphs.py", "kept[:] = model._positions_of.values()", "pass", "positions_are_dropped"),
    "positions of a graph kept": ("prepare.py", "if not capturing(self.device):", "if True:", "positions_are_dropped"),
    "callers' captures forgotten": ("graphs.py", "if self.device.capturing():", "if False:", "callers_own"),
    "masks forgotten": ("graphs.py", "        if how:\n", "        if False:\n", "masks"),
    "hooks forgotten": ("graphs.py", "if any(self._hooks) or any_global_hook():", "if False:", "hook"),
    "stale weights": ("original.py", "(places.same() and places.unwritten())", "places.same()", "original_is_changed"),
}  # fmt: skip
FILES = TESTS / "test_graphs.py", TESTS / "test_graph_changes.py"
QUICK = ("result not cloned", "no lock around a replay", "cut to the wrong rows")


@pytest.mark.slow
@pytest.mark.parametrize(
    "mutant", [pytest.param(name, marks=[pytest.mark.full] * (name not in QUICK)) for name in MUTANTS]
)
def test_a_planted_bug_is_not_seen(mutant, tmp_path):
    name, before, after, chosen = MUTANTS[mutant]
    text = (PACKAGE / "inference" / name).read_text()
    assert text.count(before) == 1, f"{name} has {before!r} {text.count(before)} times"
    done = run_on_mutant(tmp_path, name, text.replace(before, after), "-k", chosen, *FILES, room="inference")
    assert is_seen(done), done.stdout[-2000:]
