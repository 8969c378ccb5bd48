"""Golden values of the single operations, for tools/golden.py. Layout is channels last.

Each case is a plain function of named inputs. It is evaluated in float64 from float32 inputs and
rounded once, so that the file is the truth, not another implementation's rounding errors.
Only fake quantization runs in float32: its rounding is part of its definition.
"""
import math

import torch
import torch.nn.functional as F
from torch.ao.quantization import (FakeQuantize, MovingAverageMinMaxObserver,
                                   MovingAveragePerChannelMinMaxObserver)

nchw = lambda x: x.permute(0, 3, 1, 2)
nhwc = lambda x: x.permute(0, 2, 3, 1)


class Golden(dict):
    """Named tensors; `case` runs a function forward and backward and keeps all of it."""

    def __init__(self, seed):
        super().__init__()
        self.rng = torch.Generator().manual_seed(seed)

    def randn(self, *shape, scale=1.0):
        return torch.randn(*shape, generator=self.rng) * scale

    def put(self, name, value):
        """Keep a tensor or number: float32, int32, or bytes when it is uint8/int8."""
        value = torch.as_tensor(value).detach()
        if value.dtype not in (torch.uint8, torch.int8):
            value = value.to(torch.float32 if value.is_floating_point() else torch.int32)
        assert name not in self, name
        self[name] = value.reshape(value.shape or (1,)).clone().contiguous()

    def case(self, name, function, p=None, const=None, **inputs):
        """Keep inputs, p, y = function(inputs), a random dy, and d<input> for each input."""
        leaves = {k: v.double().requires_grad_() for k, v in inputs.items()}
        y = function(*leaves.values(), *(const or {}).values())
        dy = self.randn(*y.shape) if y.dim() else torch.ones(())
        y.backward(dy.double())
        for key, value in {**inputs, **(const or {}), "y": y, "dy": dy}.items():
            self.put(f"{name}/{key}", value)
        for key, value in leaves.items():
            self.put(f"{name}/d{key}", value.grad)
        if p is not None:
            self.put(f"{name}/p", p)


def conv2d(g):
    cases = {  # n, h, w, ic, oc, kh, kw, stride, pad top left bottom right
        "k1": (2, 5, 7, 19, 13, 1, 1, 1, 0, 0, 0, 0),
        "k3": (2, 7, 5, 17, 33, 3, 3, 1, 1, 1, 1, 1),
        "k3s2": (2, 9, 6, 12, 20, 3, 3, 2, 1, 1, 1, 1),
        "k3s2asym": (1, 8, 11, 7, 16, 3, 3, 2, 0, 0, 1, 1),
        "k3thin": (2, 6, 6, 4, 3, 3, 3, 1, 1, 1, 1, 1),
        "k3one": (1, 1, 1, 32, 16, 3, 3, 1, 1, 1, 1, 1),
    }
    for name, (n, h, w, ic, oc, kh, kw, stride, top, left, bottom, right) in cases.items():
        def run(x, w, b):
            x = F.pad(nchw(x), (left, right, top, bottom))
            return nhwc(F.conv2d(x, nchw(w), b, stride))
        g.case(f"conv2d/{name}", run, p=[kh, kw, stride, top, left, bottom, right],
               x=g.randn(n, h, w, ic), w=g.randn(oc, kh, kw, ic, scale=(kh * kw * ic) ** -0.5),
               b=g.randn(oc))


def linear(g):
    for name, (shape, i, o) in {"odd": ((2, 5), 19, 13), "wide": ((3,), 64, 80),
                                "one": ((1, 1), 7, 1)}.items():
        g.case(f"linear/{name}", F.linear, x=g.randn(*shape, i), w=g.randn(o, i, scale=i ** -0.5),
               b=g.randn(o))
    g.case("linear/nobias", F.linear, x=g.randn(2, 7, 24),
           w=g.randn(40, 24, scale=0.2))


def norms(g):
    cases = {"one": (2, 4, 4, 24, 1, 1e-5), "odd": (2, 3, 5, 30, 5, 1e-6),
             "each": (1, 5, 2, 17, 17, 1e-5), "offset": (2, 4, 3, 32, 4, 1e-5)}
    for name, (n, h, w, c, groups, eps) in cases.items():
        plain = lambda x, w, b: nhwc(F.group_norm(nchw(x), groups, w, b, eps))
        silu = lambda x, w, b: F.silu(plain(x, w, b))
        for op, run in (("group_norm", plain), ("group_norm_silu", silu)):
            shift = 50.0 if name == "offset" else 0.3
            g.case(f"{op}/{name}", run, p=[float(groups), eps], x=g.randn(n, h, w, c) * 2 + shift,
                   w=1 + g.randn(c, scale=0.3), b=g.randn(c, scale=0.3))
    for name, shape in {"odd": (2, 5, 37), "wide": (1, 3, 320), "two": (4, 2)}.items():
        d = shape[-1]
        g.case(f"layer_norm/{name}", lambda x, w, b: F.layer_norm(x, (d,), w, b, 1e-5), p=[1e-5],
               x=g.randn(*shape) * 3 + 1, w=1 + g.randn(d, scale=0.3), b=g.randn(d, scale=0.3))


def pointwise(g):
    quick = lambda x: x * torch.sigmoid(1.702 * x)
    ends = torch.tensor([0.0, -0.0, 1e-30, -1e-8, 5.0, -5.0, 12.0, -12.0, 40.0, -40.0, 90.0, -90.0])
    for op, run in (("gelu", F.gelu), ("quick_gelu", quick), ("silu", F.silu)):
        g.case(f"{op}/odd", run, x=g.randn(2, 3, 5, 7, scale=2))
        g.case(f"{op}/ends", run, x=ends)
    def geglu(x):
        hidden, gate = x.chunk(2, -1)
        return hidden * F.gelu(gate)
    g.case("geglu/odd", geglu, x=g.randn(2, 5, 38, scale=2))
    g.case("geglu/one", geglu, x=g.randn(3, 2, scale=2))
    softmax = lambda x: torch.softmax(x, -1)
    g.case("softmax/odd", softmax, x=g.randn(2, 3, 77))
    g.case("softmax/large", softmax, x=g.randn(5, 19, scale=40))
    g.case("softmax/one", softmax, x=g.randn(4, 1))


def attention(g):
    cases = {  # n, tq, tk, heads, d, causal, scale of q
        "self": (2, 35, 35, 2, 16, 0, 1), "cross": (2, 24, 11, 3, 40, 0, 1),
        "causal": (2, 13, 13, 2, 20, 1, 1), "odd": (1, 17, 77, 1, 5, 0, 1),
        "large": (1, 70, 70, 1, 8, 0, 12), "one": (1, 1, 1, 2, 4, 0, 1)}
    for name, (n, tq, tk, heads, d, causal, scale) in cases.items():
        split = lambda x: x.unflatten(-1, (heads, d)).transpose(1, 2)
        def run(q, k, v):
            score = split(q) @ split(k).transpose(-1, -2) / math.sqrt(d)
            if causal:
                score = score + torch.full((tq, tk), -torch.inf).triu(1).double()
            return (score.softmax(-1) @ split(v)).transpose(1, 2).flatten(2)
        g.case(f"attention/{name}", run, p=[heads, causal],
               q=g.randn(n, tq, heads * d, scale=scale), k=g.randn(n, tk, heads * d),
               v=g.randn(n, tk, heads * d))


def shapes(g):
    for name, (n, h, w, c, oh, ow) in {"x2": (2, 3, 5, 7, 6, 10), "odd": (1, 3, 4, 18, 5, 7),
                                       "one": (2, 1, 1, 3, 1, 2)}.items():
        g.case(f"upsample/{name}", lambda x: nhwc(F.interpolate(nchw(x), (oh, ow))), p=[oh, ow],
               x=g.randn(n, h, w, c))
    for name, (n, h, w, c0, c1) in {"odd": (2, 3, 5, 7, 12), "same": (1, 4, 4, 16, 16)}.items():
        g.case(f"concat/{name}", lambda x0, x1: torch.cat([x0, x1], -1), x0=g.randn(n, h, w, c0),
               x1=g.randn(n, h, w, c1))
    g.case("add/odd", lambda x0, x1: x0 + x1, x0=g.randn(2, 3, 5, 7), x1=g.randn(2, 3, 5, 7))
    g.case("add/channel", lambda x0, x1: x0 + x1[:, None, None], x0=g.randn(2, 3, 5, 7),
           x1=g.randn(2, 7))  # the time embedding: one vector per picture
    ids = torch.tensor([[3, 0, 10, 3, 3], [9, 10, 1, 0, 5]])
    g.case("embedding/repeated", lambda table, ids: F.embedding(ids, table), const={"ids": ids},
           table=g.randn(11, 18))
    from diffusers.models.embeddings import get_timestep_embedding
    for name, dim in {"d320": 320, "d18": 18}.items():
        t = torch.tensor([0.0, 1.0, 521.5, 981.0, 999.0])
        half = torch.arange(dim // 2, dtype=torch.float64) * (-math.log(10000) / (dim // 2))
        angle = t.double()[:, None] * half.exp()
        y = torch.cat([angle.cos(), angle.sin()], -1)
        assert (y - get_timestep_embedding(t, dim, True, 0)).abs().max() < 2e-4
        g.put(f"time_embedding/{name}/t", t)
        g.put(f"time_embedding/{name}/y", y)


def losses(g):
    for name, shape in {"odd": (2, 3, 5, 7), "one": (1, 1)}.items():
        for op, run in (("mse", F.mse_loss), ("l1", F.l1_loss)):
            g.case(f"{op}/{name}", run, x=g.randn(*shape),
                   target=g.randn(*shape))
    def kl(x):
        mean, logvar = x.chunk(2, -1)
        logvar = logvar.clamp(-30, 20)
        return 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()
    g.case("kl/odd", kl, x=g.randn(2, 3, 5, 8))
    moments = g.randn(1, 2, 2, 6)
    logvar = torch.tensor([-40.0, 5.0, 21.0, -29.0, 0.0, -30.5])  # clamped to -30..20
    moments[..., 3:] = logvar.repeat(2).view(1, 2, 2, 3)
    g.case("kl/clamped", kl, x=moments)


def optimizers(g):
    cases = {"default": (1e-3, 0.9, 0.999, 1e-8, 1e-2), "fast": (8e-4, 0.9, 0.99, 1e-8, 1e-3),
             "nodecay": (1e-2, 0.5, 0.9, 1e-5, 0.0)}
    for name, (lr, b1, b2, eps, decay) in cases.items():
        start, grads = g.randn(19), g.randn(5, 19, scale=0.1)
        grads[:, 3] = 0
        grads[2, 5] = 1e-12
        w = start.double().requires_grad_()
        adam = torch.optim.AdamW([w], lr, (b1, b2), eps, decay, foreach=False)
        steps = []
        for grad in grads:
            w.grad = grad.double()
            adam.step()
            steps.append(w.detach().clone())
        g.put(f"adamw/{name}/p", torch.tensor([lr, b1, b2, eps, decay]))
        g.put(f"adamw/{name}/x", start)
        g.put(f"adamw/{name}/grads", grads)
        g.put(f"adamw/{name}/y", torch.stack(steps))
        g.put(f"adamw/{name}/m", adam.state[w]["exp_avg"])
        g.put(f"adamw/{name}/v", adam.state[w]["exp_avg_sq"])
    for name, scale in {"clipped": 1.0, "kept": 0.01}.items():
        grads = [g.randn(7, 3, scale=scale), g.randn(5, scale=scale), g.randn(2, 2, 3, scale=scale)]
        params = [torch.zeros(v.shape, dtype=torch.float64, requires_grad=True) for v in grads]
        for i, (param, grad) in enumerate(zip(params, grads)):
            param.grad = grad.double()
            g.put(f"clip_grad_norm/{name}/x{i}", grad)
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        g.put(f"clip_grad_norm/{name}/p", [1.0])
        g.put(f"clip_grad_norm/{name}/norm", norm)
        for i, param in enumerate(params):
            g.put(f"clip_grad_norm/{name}/y{i}", param.grad)


def fake_quant(g):
    """uint8 per tensor, int8 per channel (first dimension); dx is dy times the in-range mask."""
    def act(name, x, scale, zero):
        leaf = x.clone().requires_grad_()
        y = torch.fake_quantize_per_tensor_affine(leaf, scale, zero, 0, 255)
        keep(f"fake_quant_u8/{name}", x, torch.tensor(scale), torch.tensor(zero), leaf, y)

    def keep(path, x, scale, zero, leaf, y):
        dy = g.randn(*x.shape)
        y.backward(dy)
        for key, value in (("x", x), ("s", scale), ("z", zero), ("y", y), ("dy", dy),
                           ("dx", leaf.grad)):
            g.put(f"{path}/{key}", value)

    act("clipped", g.randn(2, 5, 19, scale=2), 0.0123, 120)  # both ends cut
    act("positive", g.randn(3, 7).abs(), 3.5 / 255, 0)
    act("ties", torch.arange(-24, 530) * 0.25, 0.5, 9)  # x/s is whole or halfway
    act("tiny", g.randn(9, scale=1e-7), 1.1920929e-07, 128)
    for name, shape in {"conv": (5, 3, 3, 7), "linear": (13, 19)}.items():
        w = g.randn(*shape, scale=0.1)
        w[2] = 0  # an empty channel: scale is the floor
        w[3] = -w[3].abs()
        scale = (w.flatten(1).abs().amax(1) / 127.5).clamp(min=torch.finfo(torch.float32).eps)
        zero = torch.zeros(shape[0], dtype=torch.int32)
        leaf = w.clone().requires_grad_()
        y = torch.fake_quantize_per_channel_affine(leaf, scale, zero, 0, -128, 127)
        keep(f"fake_quant_s8/{name}", w, scale, zero, leaf, y)


def observers(g):
    """Batches through torch's moving observer and fake quantizer: state after each, and outputs.

    Not the fused module: its scale never gets below 6.1e-5 (and is 0.1 for an all-zero input).
    """
    act = lambda: FakeQuantize(MovingAverageMinMaxObserver, 0, 255, dtype=torch.quint8,
                               qscheme=torch.per_tensor_affine, averaging_constant=0.01)
    weight = lambda: FakeQuantize(MovingAveragePerChannelMinMaxObserver, -128, 127,
                                  dtype=torch.qint8, qscheme=torch.per_channel_symmetric,
                                  averaging_constant=0.01)
    scales = ((1, 0.2), (3, 0), (0.5, -1), (8, 2))
    cases = {
        "act": (act(), [g.randn(2, 3, 11, scale=s) + o for s, o in scales]),
        "positive": (act(), [g.randn(3, 5).abs() + 0.5 + i for i in range(4)]),
        "zero": (act(), [torch.zeros(2, 3), torch.ones(2, 3), -torch.ones(2, 3),
                         torch.zeros(2, 3)]),
        "weight": (weight(), [g.randn(5, 3, 3, 4, scale=0.1 + 0.05 * i) for i in range(4)]),
    }
    for name, (quantizer, inputs) in cases.items():
        state = {"min": [], "max": [], "s": [], "z": []}
        for i, x in enumerate(inputs):
            y = quantizer(x)
            observer = quantizer.activation_post_process
            for key, value in zip(state, (observer.min_val, observer.max_val, quantizer.scale,
                                          quantizer.zero_point)):
                state[key].append(value.clone().reshape(-1))
            g.put(f"observer/{name}/x{i}", x)
            g.put(f"observer/{name}/y{i}", y)
        for key, value in state.items():
            g.put(f"observer/{name}/{key}", torch.stack(value))
        g.put(f"observer/{name}/p", [0.01])


def lsq(g):
    """Learned scale: y = (clamp(round(x/s)+z) - z) s, straight through; ds / sqrt(N qmax)."""
    def run(path, x, s, z, qmin, qmax, count):
        x0, s0 = x.clone().requires_grad_(), s.clone().requires_grad_()
        shape = (-1,) + (1,) * (x.dim() - 1) if s.numel() > 1 else (1,) * x.dim()
        scale = s0.view(shape)
        v = x0 * (1 / scale)
        rounded = v + (v.round() - v).detach()
        inside = ((v.round() + z) >= qmin) & ((v.round() + z) <= qmax)
        ends = torch.where(v.round() + z < qmin, float(qmin - z), float(qmax - z))
        y = torch.where(inside, rounded, ends) * scale
        dy = g.randn(*x.shape)
        y.backward(dy)
        for key, value in (("x", x), ("s", s), ("z", z), ("y", y), ("dy", dy), ("dx", x0.grad),
                           ("ds", s0.grad / math.sqrt(count * qmax)), ("p", [qmin, qmax, count])):
            g.put(f"lsq/{path}/{key}", value)
    run("act", g.randn(2, 5, 7, scale=2), torch.tensor([0.011]), 110, 0, 255, 35)
    scales = torch.rand(6, generator=g.rng) * 0.01 + 0.01
    run("weight", g.randn(6, 3, 3, 5), scales, 0, -128, 127, 45)


def build():
    g = Golden(20230701)
    for part in (conv2d, linear, norms, pointwise, attention, shapes, losses, optimizers,
                 fake_quant, observers, lsq):
        part(g)
    return dict(g)
