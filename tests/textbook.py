"""Stock operators on a CPU with the products that every machine has: what results are measured by.

The error of a stock product depends on the machine's library. One accumulator a result, which is what a product of many
rows comes to in every library and what our kernels have, makes an error that grows with the root of its length (the
arithmetic is in `vitfast.check.acceptance`); MKL's AVX-512 kernels for few rows add up in several short ones and are 2
to 4 times as exact. In half precision some CPUs accumulate in fp32, and others round on the way. A rule that compares
with whatever is here would accept and refuse the same result by the machine it was computed on.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
# terms that one accumulator adds up before its sum is added to the others': as MKL does without AVX-512, and csrc/
PIECE = 192
# on GPUs cuBLAS adds up the terms of many rows one after the other, as our kernels do, and those of a few rows in parts
ALL = 1 << 31


class Textbook(TorchDispatchMode):
    """Within it products and attention of fp32 and half precision tensors on CPUs are these:

    fp32: one accumulator a result, over 192 terms in their order, and the sums of these pieces likewise. For "cuda" it
    is one over all terms, and there is no other rule.
    fp16, bf16: the sum in fp32, rounded once. Attention rounds the weights and the logits' gradients before they are
    multiplied, as every kernel of attention in half precision has to.

    Whatever else is stock stays as it is; so do calls that no rule here is for.
    """

    def __init__(self, device: str = "cpu"):
        super().__init__()
        self.device, self.piece = device, PIECE if device == "cpu" else ALL
        self.dtypes = (torch.float32, *HALF) if device == "cpu" else (torch.float32,)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        # `types`: tensors without numbers, of which somebody else's mode makes a graph
        mine = not types and isinstance(first, Tensor) and first.device.type == self.device
        if not mine or first.dtype not in self.dtypes:
            return func(*args, **kwargs)
        if func in COMPOSITE:
            # inference mode hands them on whole
            with self:
                return func.decompose(*args, **kwargs)
        if func.namespace == "vitfast" and self.device == "cpu":
            # the stock operators inside
            with self:
                return func.redispatch(CPU, *args, **kwargs)
        out = kwargs.pop("out", None)
        rule, causal = RULES.get(func.overloadpacket), CAUSAL.get(func.overloadpacket)
        if func in CONVOLUTIONS and first.dtype in HALF:
            found = _in_fp32(func, first.dtype, args, kwargs)
        elif rule and func._overloadname in ("default", "out") and not (causal and any(args[causal])):
            found = getattr(self, rule)(*args, **kwargs)
        else:
            return func(*args, **kwargs) if out is None else func(*args, out=out, **kwargs)
        return found if out is None else out.copy_(found)

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """a [..., M, K] b [..., K, N] in fp32, [..., M, N]; of numbers in half precision only the rounding matters."""
        if a.dtype in HALF:
            return a.float() @ b.float()
        columns, rows = a.movedim(-1, 0).contiguous()[..., None], b.movedim(-2, 0)[..., None, :]
        total = a.new_zeros(*a.shape[:-1], b.shape[-1])
        for begin in range(0, len(rows), self.piece):
            piece, end = torch.zeros_like(total), begin + self.piece
            for column, row in zip(columns[begin:end], rows[begin:end], strict=True):
                piece.addcmul_(column, row)
            total += piece
        return total

    def product(self, a, b):
        return self.multiply(a, b).to(a.dtype)

    def added(self, c, a, b, *, beta=1, alpha=1):
        sums = self.multiply(a, b)
        sums = sums if alpha == 1 else alpha * sums
        return (sums if beta == 0 else sums + (c if beta == 1 else beta * c)).to(a.dtype)

    def by_vector(self, a, v):
        return self.product(a, v[:, None])[:, 0]

    def by_vector_added(self, c, a, v, **factors):
        return self.added(c.expand(len(a))[:, None], a, v[:, None], **factors)[:, 0]

    def logits(self, q, k, scale, mask):
        """[B H, N, M]"""
        logits = self.multiply(_flat(q), _flat(k).transpose(1, 2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
        return logits if mask is None else logits + _flat(mask.expand(*q.shape[:3], k.shape[2]))

    def attention(self, q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
        logits = self.logits(q, k, scale, attn_mask)
        peak = logits.amax(-1, keepdim=True)
        weights = (logits - peak).exp()
        total = weights.sum(-1, keepdim=True)
        out = (self.multiply(weights.to(q.dtype), _flat(v)) / total).to(q.dtype)
        lse = (peak + total.log()).squeeze(-1).view(q.shape[:3])
        return _tokens_first(out.view(*q.shape[:3], v.shape[-1])), _tokens_first(lse)

    def attention_backward(self, grad, q, k, v, out, lse, dropout_p, is_causal, *, attn_mask=None, scale=None):
        weights = (self.logits(q, k, scale, attn_mask) - _flat(lse)[..., None]).exp()
        delta = (_flat(grad).float() * _flat(out).float()).sum(-1, keepdim=True)
        of_logits = weights * (self.multiply(_flat(grad), _flat(v).transpose(1, 2)) - delta)
        of_logits, weights = of_logits.to(q.dtype), weights.to(q.dtype)
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        grads = (
            factor * self.multiply(of_logits, _flat(k)),
            factor * self.multiply(of_logits.transpose(1, 2), _flat(q)),
            self.multiply(weights.transpose(1, 2), _flat(grad)),
        )
        return tuple(_tokens_first(g.to(t.dtype).view(t.shape)) for g, t in zip(grads, (q, k, v), strict=True))


def _flat(t):
    return t.reshape(-1, *t.shape[2:])


def _tokens_first(t):
    """In the order of torch's kernel, which makes the heads' outputs one row of a token."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def _in_fp32(func, dtype, args, kwargs):
    wide = lambda t: t.float() if isinstance(t, Tensor) and t.dtype == dtype else t  # noqa: E731
    narrow = lambda t: None if t is None else t.to(dtype)  # noqa: E731
    found = func(*map(wide, args), **{name: wide(t) for name, t in kwargs.items()})
    return tuple(map(narrow, found)) if isinstance(found, tuple) else narrow(found)


# the method that computes each
RULES = {
    aten.mm: "product", aten.bmm: "product", aten.addmm: "added", aten.baddbmm: "added", aten.mv: "by_vector",
    aten.addmv: "by_vector_added", aten._scaled_dot_product_flash_attention_for_cpu: "attention",
    aten._scaled_dot_product_flash_attention_for_cpu_backward: "attention_backward",
}  # fmt: skip
# which of the arguments ask for dropout or a causal mask
CAUSAL = {
    aten._scaled_dot_product_flash_attention_for_cpu: slice(3, 5),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: slice(6, 8),
}
# in fp32 oneDNN's have one accumulator a result
CONVOLUTIONS = {aten.convolution.default, aten.convolution_backward.default}
COMPOSITE = {
    aten.linear.default, aten.matmul.default, aten.scaled_dot_product_attention.default, aten.conv2d.default,
    aten.einsum.default,
}  # fmt: skip
