"""An op with a kernel whose results, times and failures a test decides, on the CPU."""

import torch

from vitfast.check import families
from vitfast.check.calls import Call, contiguous
from vitfast.choose import builtin, dispatch, tuning_cache
from vitfast.choose.builtin import Builtin

KEY = {"device": "Fake GPU 9000", "driver": "1.2.3", "torch": "2", "triton": "3", "vitfast": "0", "kernels": "0"}
DEVICE = 0


def right(x, config=None):
    """A softmax that adds in another order than torch's."""
    wide = x.float()
    e = (wide - wide.amax(-1, keepdim=True)).exp()
    return (e / e.flip(-1).sum(-1, keepdim=True)).to(x.dtype)


class Fake:
    """`kernel(x, config)` may be replaced; `ran` has who ran what."""

    def __init__(self):
        self.kernel, self.stock = right, lambda x: torch.softmax(x, -1)
        self.why_not, self.builtin, self.builtin_config = [], True, None
        self.configs = [{"block": 64}]
        self.ran = []

    def run(self, x):
        shape = ("rows", *x.shape)
        if dispatch.choose("fake", shape, DEVICE, self.why_not):
            config = dispatch.config_for("fake", shape, DEVICE)
            self.ran.append(("kernel", config, tuple(x.shape)))
            return self.kernel(x, config)
        self.ran.append(("stock", None, tuple(x.shape)))
        return self.stock(x)

    def family(self):
        return families.Family(
            kernel="fake", run=lambda x: self.run(x), truth=lambda x: torch.softmax(x, -1),
            smaller=lambda call: [rows(17, 33, call.dtype), rows(64, 128, call.dtype)],
            configs=lambda call, device: self.configs, draw=families.draw_all,
        )  # fmt: skip

    def who(self, *shape):
        """Who runs a call of this shape."""
        self.run(torch.zeros(shape))
        return self.ran[-1][0]


def rows(n, width, dtype=torch.float32):
    return Call("fake_softmax", (contiguous(n, width, dtype=dtype),))


def restart(monkeypatch):
    """Forget what this process decided, as if it began anew."""
    monkeypatch.setattr(dispatch, "_forced", {})
    monkeypatch.setattr(dispatch, "_off", {})
    monkeypatch.setattr(dispatch, "_tables", {})
    monkeypatch.setattr(tuning_cache, "_warned", set())


def prepared(monkeypatch, tmp_path):
    """For a fixture: a `Fake` in the tables of kernels and ops, with caches of its own."""
    restart(monkeypatch)
    monkeypatch.setenv("VITFAST_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning_cache, "key_of", lambda device: dict(KEY))
    monkeypatch.setitem(dispatch.KERNELS, "fake", "vitfast/kernels/triton/fake.py")
    made = Fake()
    said = lambda *asked: Builtin(made.builtin, made.builtin_config, "as the test says")  # noqa: E731
    monkeypatch.setattr(builtin, "builtin", said)
    monkeypatch.setattr(dispatch, "_architecture", lambda device: 90)
    monkeypatch.setitem(families.FAMILIES, "fake_softmax", made.family())
    return made
