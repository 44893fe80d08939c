"""How much memory a piece of code takes at its peak, in a process of its own: what is not a view of a file."""

import subprocess
import sys
import textwrap

PROGRAM = """
import sys, threading
import torch

torch.set_num_threads(1)


def anonymous():
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("RssAnon")).split()[1]) << 10


class Peak:
    def __enter__(self):
        self.first = self.peak = anonymous()
        self.done, self.thread = threading.Event(), threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.done.wait(0.0005):
            self.peak = max(self.peak, anonymous())

    def __exit__(self, *_):
        self.peak = max(self.peak, anonymous())
        self.done.set()
        self.thread.join()


args = sys.argv[1:]
{first}
with Peak() as taken:
{code}
print(taken.peak - taken.first)
"""


def peak_of(code, *args, first="pass"):
    """Bytes. The code has its `args` as strings; what `first` does, such as imports, isn't counted."""
    program = PROGRAM.format(first=textwrap.dedent(first), code=textwrap.indent(textwrap.dedent(code), "    "))
    # large tensors then go back to the system at once, as large arrays do
    env = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, args)],
        capture_output=True,
        text=True,
        env={**__import__("os").environ, **env},
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return int(done.stdout)
