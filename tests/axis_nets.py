# mypy: ignore-errors
# ruff: noqa: C408
"""Tiny nets that use every op of the axis rules, most of them in unusual ways; each names how many classes must be free.

A net is a function of itself and its input over parameters of the given shapes. Sizes coincide on purpose (two heads of
four, three heads of three, five rows and five positions), so that an axis taken for another does not go unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

linear, conv, attend = F.linear, F.conv2d, F.scaled_dot_product_attention


class Net(nn.Module):
    """``function(net, x)`` over parameters of the given shapes and whatever else it holds."""

    def __init__(self, function: Callable[..., Tensor], shapes: dict[str, tuple[int, ...]], held: dict[str, Any]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape) / 2))
        for name, value in held.items():
            if isinstance(value, nn.Module):
                setattr(self, name, value)
            else:
                self.register_buffer(name, value)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


@dataclass(frozen=True)
class Case:
    """How to build a net and its input, and how many of its classes are free."""

    make: Callable[[], tuple[Net, Tensor]]
    free: int


def plain(function, x=(5, 6), *, free, held=dict, **shapes) -> Case:
    """Any function of an input of shape ``x``."""
    return Case(lambda: (Net(function, shapes, held()), torch.randn(x)), free)


def image(function, *, free, **rest) -> Case:
    """A function of two images of three channels."""
    return plain(function, (2, 3, 6, 6), free=free, **rest)


def hidden(function, *, free, c=8, out=8, **rest) -> Case:
    """``[5, 6] -> linear a -> [5, c] -> function -> [5, out] -> linear b -> [5, 3]``: what is free between two linears?"""
    return plain(lambda m, x: linear(function(m, linear(x, m.a)), m.b), free=free, a=(c, 6), b=(3, out), **rest)


def heads(function, extra=None, h=2, d=4, *, free) -> Case:
    """Attention over projections of its own for queries, keys and values ``[2, h, 5, d]``, and one out of it."""

    def forward(m, x):
        q, k, v = (linear(x, w).view(2, 5, h, d).transpose(1, 2) for w in (m.q, m.k, m.v))
        return linear(function(m, q, k, v).transpose(1, 2).flatten(2), m.b)

    shapes = dict(q=(h * d, 6), k=(h * d, 6), v=(h * d, 6), b=(6, h * d), **(extra or {}))
    return plain(forward, (2, 5, 6), free=free, **shapes)


def rope_half(t):
    pos = torch.arange(t.shape[-2])[:, None] * (0.3 ** torch.arange(2))[None]
    c, s = torch.cat([pos.cos()] * 2, -1), torch.cat([pos.sin()] * 2, -1)
    a, b = t.chunk(2, -1)
    return t * c + torch.cat([-b, a], -1) * s


def rope_inter(t):
    pos = torch.arange(t.shape[-2])[:, None] * (0.3 ** torch.arange(2))[None]
    c, s = pos.cos(), pos.sin()
    a, b = t[..., 0::2], t[..., 1::2]
    return torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2)


def rope_inter2(t):
    c = torch.polar(torch.ones(5, 2), torch.arange(5.0)[:, None] * (0.3 ** torch.arange(2))[None])
    return torch.view_as_real(
        torch.view_as_complex(t.unflatten(-1, (-1, 2)))
        * c.to(torch.complex128 if t.dtype == torch.float64 else torch.complex64)
    ).flatten(-2)


def write_slices(m, h):
    h = h.clone()
    h[:, 2:4] = m.p
    h[:, 5] = 0
    h[0] += 1
    return h


def write_stack(m, h):
    z = torch.zeros(5, 3, 2, 4, dtype=h.dtype)
    z[:, 0] = h.view(5, 2, 4)
    z[:, 1] = h.view(5, 2, 4) * 2
    z[:, 2] = m.p
    return z.flatten(1)


def write_heads(m, h):
    z = torch.zeros(5, 2, 4, dtype=h.dtype)
    z[:, torch.tensor([1, 0])] = h.view(5, 2, 4)
    return (z + h.view(5, 2, 4)).flatten(1)


def write_where(m, h):
    h = h.clone()
    h[h < 0] = 0.5
    return h


def write_rows(m, h):
    h = h.clone()
    h[torch.tensor([True, False, True, False, True])] = m.p
    return h


def write_views(m, h):
    h = h.clone()
    h.view(5, 2, 4)[:, 0].mul_(2.0)
    h.view(5, 2, 4)[..., 1].add_(m.p)
    return h


def write_steps(m, h):
    h = h.clone()
    h[:, ::2] = h[:, 1::2]
    return h


def write_transposed(m, h):
    h = h.clone()
    h.t_()
    h.mul_(m.p[:, None])
    return h.t()


def write_diagonal(m, h):
    h = h.clone()
    h.diagonal(dim1=0, dim2=1).add_(m.p)
    return h


def write_copy(m, h):
    h = h.clone()
    h.T.copy_(m.p[:, None] * 2)
    return h


def write_flipped(m, h):
    z = h.new_zeros(3, 5, 8)
    z[0] = h
    z[1] = h.flip(1)
    z[2] = m.p
    return z.sum(0)


def write_swapped(m, h):
    z = h.new_zeros(5, 2, 4)
    z[:, 0] = h.view(5, 2, 4)[:, 1]
    z[:, 1] = h.view(5, 2, 4)[:, 0]
    return (z + h.view(5, 2, 4)).flatten(1)


def without_grad(m, h):
    with torch.no_grad():
        g = h * m.p
    return h + g


def buffer_without_grad(m, h):
    with torch.no_grad():
        m.n.mul_(0.0).add_(m.p * 2)
    return h * m.n


def without_autocast(m, h):
    with torch.autocast("cpu", enabled=False):
        return h * m.p


def moe_loop(m, h):
    g = linear(h, m.g).softmax(-1)
    w, i = g.topk(2, -1)
    o = torch.zeros_like(h)
    for e in range(4):
        mask = (i == e).to(h.dtype) * w
        o = o + mask.sum(-1, keepdim=True) * linear(linear(h, m.e[e]).relu(), m.f[e])
    return o


def moe_gathered(m, h):
    g = linear(h, m.g).softmax(-1)
    i = g.argmax(-1)
    return torch.einsum("bf,bof->bo", torch.einsum("bi,bfi->bf", h, m.e[i]).relu(), m.f[i]) * g.amax(-1, keepdim=True)


def moe_sorted(m, h):
    g = linear(h, m.g).softmax(-1)
    i = g.argmax(-1)
    o = i.argsort()
    s = h[o]
    c = torch.bincount(i, minlength=4)
    z = torch.einsum("bf,bof->bo", torch.einsum("bi,bfi->bf", s, m.e[i[o]]).relu(), m.f[i[o]])
    return torch.zeros_like(h).index_add(0, o, z) * c.sum()


def moe_dense(m, h):
    g = linear(h, m.g).softmax(-1)
    y = torch.einsum("ebf,eof->ebo", torch.einsum("bi,efi->ebf", h, m.e).relu(), m.f)
    return torch.einsum("be,ebo->bo", g, y)


def moe_interleaved(m, h):
    g = linear(h, m.g).softmax(-1)
    gu = torch.bmm(h[None].expand(4, 5, 8), m.e)
    a, b = gu[..., ::2], gu[..., 1::2]
    return (torch.bmm(a * b.sigmoid(), m.f) * g.T[..., None]).sum(0)


def state_space(m, h):
    s = torch.zeros(8, 4, dtype=h.dtype)
    A = -m.A.exp()
    ys = []
    for t in range(5):
        s = s * A.exp() + h[t][:, None] * linear(h[t], m.B)[None]
        ys.append((s * linear(h[t], m.C)[None]).sum(-1))
    return torch.stack(ys)


def mamba2(m, h):
    z, x, Bc, dt = linear(h, m.w).split([8, 8, 4, 2], -1)
    y = (x.view(5, 2, 4) * dt.sigmoid()[..., None])[..., None] * Bc[:, None, None, :]
    y = y.cumsum(0).sum(-1) + x.view(5, 2, 4) * m.D[:, None]
    return F.rms_norm(y.flatten(1) * F.silu(z), (8,), m.nw)


def mla(m, h):
    q = linear(h, m.q).view(5, 2, 6)
    qn, qr = q.split([4, 2], -1)
    ckv = linear(h, m.kv)
    c, kr = ckv.split([6, 2], -1)
    kv = linear(F.rms_norm(c, (6,), m.n), m.up).view(5, 2, 7)
    kn, v = kv.split([4, 3], -1)
    k = torch.cat([kn, kr[:, None].expand(5, 2, 2)], -1)
    q = torch.cat([qn, qr.flip(-1)], -1)
    return attend(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)).transpose(0, 1).flatten(1)


def swin_v2_bias(m, h):
    b = torch.cat([m.qb, torch.zeros_like(m.vb), m.vb])
    q, k, v = linear(h, m.w, b).view(5, 3, 2, 4).permute(1, 2, 0, 3).unbind(0)
    return attend(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v).transpose(0, 1).flatten(1)


def swin_v2_zero(m, h):
    b = m.bb.clone()
    b[8:16].zero_()
    q, k, v = linear(h, m.w, b).view(5, 3, 2, 4).permute(1, 2, 0, 3).unbind(0)
    return attend(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v).transpose(0, 1).flatten(1)


CASES: dict[str, Case] = {
    # Elementwise, and what only looks like it
    "where_param0d": hidden(lambda m, h: torch.where(h > m.s, h, m.s), s=(), free=1),
    "clamp_tensor": hidden(lambda m, h: torch.clamp(h, min=m.lo), lo=(8,), free=1),
    "addcmul": hidden(lambda m, h: torch.addcmul(h, m.p, h, value=2), p=(8,), free=1),
    "polar": hidden(lambda m, h: torch.polar(h.abs(), h).abs(), free=1),
    "frexp": hidden(lambda m, h: torch.frexp(h)[0], free=1),
    "prelu_c": hidden(lambda m, h: F.prelu(h, m.p), p=(8,), free=1),
    "logic": hidden(lambda m, h: ((h > 0) & (m.p > 0) | ~(h < 1) ^ (h > 2)).to(h.dtype) * h, p=(8,), free=1),
    "heaviside_etc": hidden(
        lambda m, h: (
            torch.heaviside(h, m.p)
            + torch.xlogy(h, h.abs() + 1)
            + torch.hypot(h, m.p)
            + torch.copysign(h, m.p)
            + torch.fmod(h, m.p)
            + torch.remainder(h, m.p)
            + torch.atan2(h, m.p)
            + torch.logaddexp(h, m.p)
            + torch.nan_to_num(h)
            + torch.special.entr(h.abs())
            + torch.erf(h)
            + torch.sinc(h)
            + h.sign()
            + h.round()
            + h.trunc()
            + h.frac()
            + torch.float_power(h.abs(), 2).to(h.dtype)
            + h.pow(2)
            + torch.pow(2, h)
            + 1 / (h.abs() + 1)
            + h.rsqrt().nan_to_num(0)
            + h.expm1()
            + h.log1p().nan_to_num(0)
        ),
        p=(8,),
        free=1,
    ),
    "pairdiff_flat": hidden(lambda m, h: (h[:, :, None] - h[:, None, :]).flatten(1), out=64, free=1),
    "xxT": hidden(lambda m, h: (h.T @ h)[None].sum(1) * h, free=1),
    "batch_eq_channels": hidden(lambda m, h: h + h.T[:5, :5].sum(), c=8, free=2),
    "broadcast_tensors": hidden(lambda m, h: sum(torch.broadcast_tensors(h, m.p)), p=(8,), free=1),
    "bce": hidden(lambda m, h: h * F.binary_cross_entropy_with_logits(h, m.p.expand_as(h).sigmoid()), p=(8,), free=1),
    "kl": hidden(
        lambda m, h: h * F.kl_div(h.log_softmax(-1), m.p.softmax(-1).expand_as(h), reduction="batchmean"), p=(8,), free=1
    ),
    "mse_none": hidden(
        lambda m, h: F.mse_loss(h, m.p.expand_as(h), reduction="none") + F.huber_loss(h, m.p.expand_as(h), reduction="none"),
        p=(8,),
        free=1,
    ),
    "mse_pair": hidden(
        lambda m, h: h * F.mse_loss(h.view(5, 2, 1, 4).expand(5, 2, 2, 4), h.view(5, 1, 2, 4).expand(5, 2, 2, 4)), free=2
    ),
    "ce": hidden(lambda m, h: h * F.cross_entropy(h, torch.zeros(5, dtype=torch.long)), free=0),
    # Views: factors that meet, and factors that cut across each other
    "heads_view": hidden(lambda m, h: h.view(5, 2, 4).transpose(1, 2).reshape(5, 8), free=2),
    "shuffle": hidden(lambda m, h: F.channel_shuffle(h[:, :, None, None], 2)[:, :, 0, 0], free=2),
    "shuffle_manual_add": hidden(lambda m, h: h + h.view(5, 4, 2).transpose(1, 2).reshape(5, 8), free=1),
    "shuffle3": hidden(lambda m, h: h + h.view(5, 2, 3, 2).permute(0, 3, 1, 2).reshape(5, 12), c=12, out=12, free=0),
    "bad_reshape": hidden(lambda m, h: h.reshape(20, 2).reshape(4, 10).reshape(5, 8), free=0),
    "odd_reshape": hidden(lambda m, h: h.reshape(5, 2, 6).reshape(5, 3, 4).sum(1), c=12, out=4, free=0),
    "movedim": hidden(lambda m, h: h.view(5, 2, 4).movedim(-1, 1).movedim((0, 1), (1, 0)).movedim(0, 1).flatten(1), free=2),
    "squeeze_un": hidden(lambda m, h: h.unsqueeze(-1).unsqueeze(0).squeeze().squeeze(-1), free=1),
    "square_T": hidden(lambda m, h: h + (h.view(5, 2, 2)).mT.reshape(5, 4), c=4, out=4, free=1),
    "sq_sq": hidden(lambda m, h: h.view(5, 3, 3).matmul(h.view(5, 3, 3)).flatten(1), c=9, out=9, free=1),
    "two_views": hidden(
        lambda m, h: h.view(5, 2, 6).softmax(-1).reshape(5, 12) + h.view(5, 3, 4).softmax(-1).reshape(5, 12),
        c=12,
        out=12,
        free=0,
    ),
    "two_views_mid": hidden(
        lambda m, h: h.view(5, 4, 3).softmax(-1).reshape(5, 12) + h.view(5, 6, 2).softmax(1).reshape(5, 12),
        c=12,
        out=12,
        free=0,
    ),
    "two_head_counts": hidden(
        lambda m, h: h.view(5, 2, 4).softmax(-1).flatten(1) + h.view(5, 4, 2).softmax(-1).flatten(1), free=3
    ),
    "nested3": hidden(lambda m, h: h.view(5, 2, 3, 4).softmax(-1).sum(2).flatten(1), c=24, out=8, free=3),
    "nested3c": hidden(
        lambda m, h: (h.view(5, 2, 3, 4) * m.p[:, :, None] + m.q[:, None]).flatten(1), c=24, out=24, p=(2, 3), q=(2, 4), free=3
    ),
    "nested3d": hidden(
        lambda m, h: (h.view(5, 2, 3, 4) * m.p[:, :, None] + m.q[None]).flatten(1), c=24, out=24, p=(2, 3), q=(3, 4), free=3
    ),
    "transitive": plain(
        lambda m, x: linear(
            torch.einsum("bi,gki->bgk", x, m.w).view(5, 2, 3, 4).flatten(1)
            * linear(x, m.g).view(5, 2, 3, 1).expand(5, 2, 3, 4).flatten(1),
            m.b,
        ),
        w=(2, 12, 6),
        g=(6, 6),
        b=(3, 24),
        free=3,
    ),
    "two_param_axes": plain(
        lambda m, x: linear(
            (torch.einsum("bi,gki->bgk", x, m.w).view(5, 2, 3, 4) * (linear(x, m.g).view(5, 2, 3)[..., None])).flatten(1), m.b
        ),
        w=(2, 12, 6),
        g=(6, 6),
        b=(3, 24),
        free=3,
    ),
    "rep_vs_inter": hidden(lambda m, h: h.repeat_interleave(2, dim=-1) * h.repeat(1, 2), out=16, free=1),
    "repeat_then_weight": hidden(lambda m, h: h.repeat(1, 2) * m.p, out=16, p=(16,), free=2),
    "repeat_interleave": hidden(lambda m, h: h.repeat_interleave(2, dim=-1) * m.p, out=16, p=(16,), free=2),
    "expand_gqa": hidden(lambda m, h: h.view(5, 2, 1, 4).expand(5, 2, 3, 4).reshape(5, 24) * m.p, out=24, p=(24,), free=3),
    "pixel_shuffle_twice": hidden(
        lambda m, h: F.pixel_shuffle(h.view(5, 16, 1, 1), 2).flatten(1) + F.pixel_shuffle(h.view(5, 16, 1, 1), 4).flatten(1),
        c=16,
        out=16,
        free=3,
    ),
    "pixel_unshuffle": hidden(lambda m, h: F.pixel_unshuffle(F.pixel_shuffle(h[:, :, None, None], 2), 2).flatten(1), free=3),
    "view_as_complex": hidden(lambda m, h: torch.view_as_real(torch.view_as_complex(h.view(5, 4, 2)) * 2j).flatten(1), free=1),
    "complex_ri": hidden(lambda m, h: (torch.complex(h, h) * torch.complex(h, h)).real + torch.complex(h, h).imag, free=1),
    "meshgrid": hidden(lambda m, h: h + torch.meshgrid(m.p, m.q, indexing="ij")[0].sum(1), p=(8,), q=(8,), free=2),
    # Across heads: what mixes them leaves one order for all
    "softmax_heads": hidden(lambda m, h: h.view(5, 2, 4).softmax(1).reshape(5, 8), free=2),
    "cumsum_heads": hidden(lambda m, h: h.view(5, 2, 4).cumsum(1).reshape(5, 8), free=1),
    "mean_heads_keep": hidden(lambda m, h: (h.view(5, 2, 4) - h.view(5, 2, 4).mean(1, keepdim=True)).flatten(1), free=2),
    "ln_heads": hidden(lambda m, h: F.layer_norm(h.view(5, 2, 4), (4,), m.p).flatten(1), p=(4,), free=2),
    "ln_heads_noaffine": hidden(lambda m, h: F.layer_norm(h.view(5, 2, 4), (4,)).flatten(1), free=2),
    "ln_over_heads": hidden(lambda m, h: F.layer_norm(h.view(5, 2, 4).mT, (2,), m.p).mT.flatten(1), p=(2,), free=2),
    "talking_heads_res": hidden(
        lambda m, h: (h.view(5, 2, 4) + linear(h.view(5, 2, 4).mT, m.p).mT).reshape(5, 8), p=(2, 2), free=2
    ),
    "talking_einsum": hidden(lambda m, h: torch.einsum("bhd,hg->bgd", h.view(5, 2, 4), m.p).reshape(5, 8), p=(2, 2), free=3),
    "conv_over_heads": hidden(lambda m, h: F.conv1d(h.view(5, 2, 4).mT, m.p, padding=1).mT.reshape(5, 8), p=(4, 4, 3), free=2),
    "conv_depthwise_over_heads": hidden(
        lambda m, h: F.conv1d(h.view(5, 2, 4).mT, m.p, padding=1, groups=4).mT.reshape(5, 8), p=(4, 1, 3), free=1
    ),
    "max_heads": hidden(lambda m, h: h.view(5, 2, 4).max(1).values, out=4, free=2),
    "sort_heads": hidden(lambda m, h: h.view(5, 2, 4).sort(1).values.flatten(1), free=2),
    "sort_pair": hidden(lambda m, h: (h.view(5, 2, 4).sort(1).values * h.view(5, 2, 4)).flatten(1), free=1),
    "flip_heads_add": hidden(lambda m, h: (h.view(5, 2, 4) + h.view(5, 2, 4).flip(1)).flatten(1), free=1),
    "roll_heads_add": hidden(lambda m, h: (h.view(5, 4, 2) + h.view(5, 4, 2).roll(1, 1)).flatten(1), free=1),
    "roll_by_cat": hidden(
        lambda m, h: (h.view(5, 4, 2) + torch.cat([h.view(5, 4, 2)[:, 1:], h.view(5, 4, 2)[:, :1]], 1)).flatten(1), free=1
    ),
    "swap_halves_heads": hidden(
        lambda m, h: (h.view(5, 4, 3) + torch.cat([h.view(5, 4, 3)[:, 2:], h.view(5, 4, 3)[:, :2]], 1)).flatten(1),
        c=12,
        out=12,
        free=2,
    ),
    "outer_heads": hidden(lambda m, h: (h.view(5, 2, 1, 4) + h.view(5, 1, 2, 4)).flatten(1), out=16, free=2),
    "head_eq_dim": hidden(lambda m, h: (h.view(5, 3, 3) * h.view(5, 3, 3).transpose(1, 2)).flatten(1), c=9, out=9, free=1),
    "bmm_perhead": hidden(lambda m, h: torch.einsum("bhd,hde->bhe", h.view(5, 2, 4), m.p).flatten(1), p=(2, 4, 4), free=3),
    "bmm_perhead_res": hidden(
        lambda m, h: (h.view(5, 2, 4) + torch.einsum("bhd,hde->bhe", h.view(5, 2, 4), m.p)).flatten(1), p=(2, 4, 4), free=2
    ),
    "perhead_param_swapped": hidden(lambda m, h: (h.view(5, 2, 4) + m.p.T).flatten(1) + h.sum(), p=(4, 2), free=2),
    "expand_pair": hidden(
        lambda m, h: (h.view(5, 2, 1, 4).expand(5, 2, 2, 4) * h.view(5, 1, 2, 4).expand(5, 2, 2, 4)).flatten(1), out=16, free=2
    ),
    "repeat_heads_pair": hidden(
        lambda m, h: (h.view(5, 2, 4).repeat(1, 2, 1) * h.view(5, 2, 4).repeat_interleave(2, 1)).flatten(1), out=16, free=2
    ),
    "sdpa_h_is_tokens": hidden(lambda m, h: (lambda z: attend(z, z, z).flatten(1))(h.view(5, 2, 4)), free=2),
    "pool_of_view": hidden(lambda m, h: F.avg_pool1d(h.view(5, 2, 4).mT, 3, 1, 1).mT.flatten(1), free=1),
    "conv_of_viewT": hidden(
        lambda m, h: F.conv1d(h.view(5, 2, 4).permute(2, 0, 1), m.p, padding=1).permute(1, 2, 0).flatten(1),
        p=(5, 5, 3),
        free=1,
    ),
    "gn_of_viewT": hidden(lambda m, h: F.group_norm(h.view(5, 2, 4).mT, 2).mT.flatten(1), free=3),
    "bn_of_view": hidden(
        lambda m, h: F.batch_norm(h.view(5, 2, 4), m.r, m.v).flatten(1),
        held=lambda: dict(r=torch.rand(2), v=torch.rand(2) + 1),
        free=2,
    ),
    "in_of_view": hidden(lambda m, h: F.instance_norm(h.view(5, 2, 4)).flatten(1), free=2),
    "in_of_viewT2": hidden(lambda m, h: F.instance_norm(h.view(5, 2, 4).permute(2, 0, 1)).permute(1, 2, 0).flatten(1), free=2),
    "cosine_pair": hidden(
        lambda m, h: F.cosine_similarity(h.view(5, 2, 1, 4), h.view(5, 1, 2, 4), dim=-1).flatten(1), out=4, free=2
    ),
    "fftshift_heads": hidden(lambda m, h: (torch.fft.fftshift(h.view(5, 2, 4), dim=1) + h.view(5, 2, 4)).flatten(1), free=1),
    "rot_heads": hidden(lambda m, h: (h.view(5, 2, 2, 2).rot90(1, (1, 2)) + h.view(5, 2, 2, 2)).flatten(1), free=1),
    "cdist_heads": hidden(lambda m, h: torch.cdist(h.view(5, 2, 4), h.view(5, 2, 4)).flatten(1), out=4, free=2),
    # Parts: sums, families, and parts that come twice
    "two_of_one_axis_cut": hidden(
        lambda m, h: (
            linear((h[:, None, :] * h[:, :, None]).view(5, 4, 3, 12).flatten(1), m.w)
            + linear(torch.cat([h[:, 6:], h[:, :6]], 1), m.v)
        ),
        c=12,
        w=(8, 144),
        v=(8, 12),
        free=4,
    ),
    "two_of_one_axis_cut_into_ones": hidden(
        lambda m, h: torch.cat([(h.view(5, 2, 1, 4) * h.view(5, 1, 2, 4)).flatten(1), torch.cat([h[:, 4:], h[:, :4]], 1)], 1),
        out=24,
        free=1,
    ),
    "dup_key": hidden(
        lambda m, h: (
            linear((h.view(5, 4, 3) * torch.cat([m.u, m.u])[:, None])[:, :2].flatten(1), m.w)
            + linear((h.view(5, 4, 3) * torch.cat([m.u, m.u])[:, None])[:, 2:].flatten(1), m.v)
        ),
        c=12,
        out=7,
        u=(2,),
        w=(7, 6),
        v=(7, 6),
        free=3,
    ),
    "dup_key2": hidden(
        lambda m, h: linear((h.view(5, 4, 3) * torch.cat([m.u, m.u])[:, None])[:, :2].flatten(1), m.w),
        c=12,
        out=7,
        u=(2,),
        w=(7, 6),
        free=3,
    ),
    "dup_key_late": hidden(
        lambda m, h: (
            linear(h.view(5, 4, 3)[:, :2].flatten(1), m.w)
            + linear(h.view(5, 4, 3)[:, 2:].flatten(1), m.v)
            + linear((h.view(5, 4, 3) * torch.cat([m.u, m.u])[:, None]).flatten(1), m.z)
        ),
        c=12,
        out=7,
        u=(2,),
        w=(7, 6),
        v=(7, 6),
        z=(7, 12),
        free=3,
    ),
    "self_key_halves_add": hidden(
        lambda m, h: (h.view(5, 4, 3)[:, :2] + h.view(5, 4, 3)[:, 2:]).flatten(1), c=12, out=6, free=2
    ),
    "cat_self_add": hidden(lambda m, h: torch.cat([h, h], 1)[:, 4:12] + h, out=8, free=1),
    "cat_scale": hidden(lambda m, h: torch.cat([h, -h], 1) * m.p, out=16, p=(16,), free=1),
    "crelu_view": hidden(lambda m, h: torch.cat([h, -h], 1).view(5, 8, 2).sum(-1), out=8, free=2),
    "cat_1s": hidden(lambda m, h: torch.cat([h.mean(1, keepdim=True), h.amax(1, keepdim=True)], 1), out=2, free=1),
    "cat_const": hidden(lambda m, h: torch.cat([h, torch.ones(5, 1)], 1), out=9, free=1),
    "stack_mid": hidden(lambda m, h: torch.stack([h, m.p.expand_as(h)], 1).flatten(1), out=16, p=(8,), free=1),
    "unbind_heads": hidden(lambda m, h: torch.cat([t * (i + 1) for i, t in enumerate(h.view(5, 2, 4).unbind(1))], 1), free=2),
    "unbind_restack": hidden(lambda m, h: torch.stack(h.view(5, 2, 4).unbind(1)[::-1], 1).flatten(1) + h, free=1),
    "split_uneven": hidden(lambda m, h: (lambda p, q, r: torch.cat([r, p, q], 1))(*h.split(3, 1)), free=3),
    "split_sizes_add": hidden(
        lambda m, h: (lambda p, q, r: p.sum(1, keepdim=True) + q * r)(*h.split([2, 3, 3], 1)), out=3, free=2
    ),
    "slice_neg2": hidden(lambda m, h: h[:, 1:-3], out=4, free=2),
    "slice_overlap_add": hidden(lambda m, h: h[:, 1:] + h[:, :-1], out=7, free=0),
    "slice_overlap_mid": hidden(lambda m, h: h[:, 2:6] * h[:, 4:8], out=4, free=2),
    "narrow": hidden(lambda m, h: h.narrow(-1, 2, 4) + h.narrow(1, -4, 4), out=4, free=2),
    "select": hidden(lambda m, h: h.select(1, 3)[:, None] * h, free=2),
    "pad_c_val": hidden(lambda m, h: F.pad(h, (1, 2), value=1.0) * m.p, out=11, p=(11,), free=2),
    "pad_shift_add": hidden(lambda m, h: h + F.pad(h, (1, -1)), free=0),
    "pad_heads_add": hidden(lambda m, h: (h.view(5, 2, 4) + F.pad(h.view(5, 2, 4), (0, 0, 1, -1))).flatten(1), free=0),
    "glu": hidden(lambda m, h: F.glu(h, -1), out=4, free=1),
    "glu_interleave": hidden(lambda m, h: h[..., 0::2] * F.silu(h[..., 1::2]), out=4, free=0),
    "glu_view": hidden(lambda m, h: (lambda z: z[..., 0] * F.silu(z[..., 1]))(h.view(5, 4, 2)), out=4, free=1),
    "maxout": hidden(lambda m, h: h.view(5, 4, 2).max(-1).values, out=4, free=2),
    "swinv2_bias": hidden(swin_v2_bias, qb=(8,), vb=(8,), w=(24, 8), free=4),
    "swinv2_zero": hidden(swin_v2_zero, bb=(24,), w=(24, 8), free=4),
    "cat_heads": hidden(
        lambda m, h: torch.cat([h.view(5, 2, 4), m.p.expand(5, 3, 4)], 1).softmax(-1).flatten(1), out=20, p=(3, 4), free=3
    ),
    "cat_dims": hidden(
        lambda m, h: torch.cat([h.view(5, 2, 4), m.p.expand(5, 2, 3)], 2).softmax(1).flatten(1), out=14, p=(2, 3), free=3
    ),
    "cat_then_heads": hidden(
        lambda m, h: torch.cat([h[:, :4], linear(h, m.w)], 1).view(5, 3, 4).softmax(-1).flatten(1), w=(8, 8), out=12, free=4
    ),
    "cat_then_heads_mix": hidden(
        lambda m, h: torch.cat([h[:, :4], linear(h, m.w)], 1).view(5, 3, 4).softmax(1).flatten(1), w=(8, 8), out=12, free=3
    ),
    "family_res": hidden(
        lambda m, h: (lambda y: (y + y.softmax(-1)).flatten(1))(linear(h, m.w).view(5, 3, 2, 4)), w=(24, 8), out=24, free=4
    ),
    "family_mix_two": hidden(
        lambda m, h: (lambda y: torch.cat([(y[:, :2].sum(1)).flatten(1), y[:, 2].softmax(1).flatten(1)], 1))(
            linear(h, m.w).view(5, 3, 2, 4)
        ),
        w=(24, 8),
        out=16,
        free=6,
    ),
    "family_then_index": hidden(
        lambda m, h: (lambda y: torch.cat([y[:, :2].flatten(1), y[:, [2, 0]].flatten(1)], 1))(linear(h, m.w).view(5, 3, 2, 4)),
        w=(24, 8),
        out=32,
        free=3,
    ),
    "family_rejoin": hidden(
        lambda m, h: (lambda q, k, v: torch.stack([v, q, k], 1).flatten(1))(*linear(h, m.w).view(5, 3, 2, 4).unbind(1)),
        w=(24, 8),
        out=24,
        free=3,
    ),
    "family_rejoin_add": hidden(
        lambda m, h: (lambda y: (lambda q, k, v: (torch.stack([v, q, k], 1) + y).flatten(1))(*y.unbind(1)))(
            linear(h, m.w).view(5, 3, 2, 4)
        ),
        w=(24, 8),
        out=24,
        free=3,
    ),
    "family_nested_part": hidden(
        lambda m, h: (
            lambda y: y[:, 0].softmax(1).flatten(1) + y[:, 1].softmax(2).flatten(1) + y[:, 0, 0].flatten(1).repeat(1, 2)
        )(linear(h, m.w).view(5, 2, 2, 2, 3)),
        w=(24, 8),
        out=12,
        free=1,
    ),
    "family_overlap_cut": hidden(
        lambda m, h: (lambda y: (y[:, 0:2] * y[:, 1:3]).flatten(1))(linear(h, m.w).view(5, 3, 2, 4)), w=(24, 8), out=16, free=3
    ),
    "family_two_cuts": hidden(
        lambda m, h: (lambda y: torch.cat([y[:, 0:2].softmax(-1).flatten(1), y[:, 1:3].softmax(-2).flatten(1)], 1))(
            linear(h, m.w).view(5, 3, 2, 4)
        ),
        w=(24, 8),
        out=32,
        free=7,
    ),
    "grouped_qkv_conv": hidden(
        lambda m, h: F.conv1d(h[:, :, None], m.w, groups=2)[:, :, 0].view(5, 2, 3, 4).unbind(2)[2].flatten(1),
        w=(24, 4, 1),
        free=5,
    ),
    "complex_chain": hidden(
        lambda m, h: (
            torch.cat(
                [h.view(5, 4, 2)[:, :2].reshape(5, 2, 2).transpose(1, 2).flatten(1), h.view(5, 4, 2)[:, 2:].flatten(1)], 1
            )
            * m.p
        ),
        p=(8,),
        free=4,
    ),
    "sum_of_products": hidden(
        lambda m, h: torch.cat([h.view(5, 2, 4).softmax(-1).flatten(1), h.view(5, 4, 2).softmax(-1).flatten(1)], 1),
        out=16,
        free=3,
    ),
    # Writes into views
    "inplace_slices": hidden(write_slices, p=(2,), free=3),
    "inplace_stack": hidden(write_stack, p=(2, 4), out=24, free=2),
    "inplace_view": hidden(write_views, p=(2,), free=2),
    "inplace_step": hidden(write_steps, free=0),
    "inplace_t": hidden(write_transposed, p=(8,), free=1),
    "inplace_diag": hidden(write_diagonal, p=(5,), free=0),
    "inplace_copyT": hidden(write_copy, p=(8,), free=1),
    "inplace_flip": hidden(write_flipped, p=(8,), free=0),
    "inplace_swap": hidden(write_swapped, free=1),
    "index_put_heads": hidden(write_heads, free=1),
    "index_put_bool": hidden(write_where, free=1),
    "index_put_boolrow": hidden(write_rows, p=(8,), free=1),
    "foreach": hidden(
        lambda m, h: (lambda g: (torch._foreach_add_([g], [m.p.expand_as(g)]), g)[1])(h.clone()), p=(8,), free=0
    ),
    "no_grad_inplace2": hidden(buffer_without_grad, p=(8,), held=lambda: dict(n=torch.rand(8)), free=1),
    # Look-ups, ranks and counts
    "idx_const": hidden(lambda m, h: h[:, torch.tensor([2, 0, 4])], out=3, free=0),
    "idx_list_neg": hidden(lambda m, h: h[:, [-3, -2, -1]], out=3, free=2),
    "idx_list_wrap": hidden(lambda m, h: h[:, [-1, 0, 1]], out=3, free=0),
    "idx_computed": hidden(lambda m, h: h[:, h.mean(0).argsort()[:3]], out=3, free=0),
    "idx_heads_add": hidden(lambda m, h: (h.view(5, 2, 4)[:, torch.tensor([1, 0])] + h.view(5, 2, 4)).flatten(1), free=1),
    "idx_bool": hidden(lambda m, h: h[:, torch.tensor([1, 0, 1, 0, 1, 0, 1, 0]).bool()], out=4, free=0),
    "idx_step_add": hidden(lambda m, h: h[:, ::2] + h[:, 1::2], out=4, free=0),
    "multi_idx_apart": hidden(
        lambda m, h: h.view(5, 2, 4)[torch.tensor([0, 1, 1, 2, 3]), :, torch.tensor([1, 2, 3, 0, 0])], out=2, free=1
    ),
    "gather_heads_fix_add": hidden(
        lambda m, h: (
            h.view(5, 2, 4) + h.view(5, 2, 4).gather(1, torch.tensor([1, 0])[None, :, None].expand(5, 2, 4))
        ).flatten(1),
        free=1,
    ),
    "take_along": hidden(lambda m, h: torch.take_along_dim(h, h.argsort(1), 1), free=0),
    "scatter_heads_add": hidden(
        lambda m, h: (
            h.view(5, 2, 4).scatter_add(1, torch.tensor([1, 0])[None, :, None].expand(5, 2, 4), h.view(5, 2, 4)).flatten(1)
        ),
        free=1,
    ),
    "scatter_part": hidden(lambda m, h: h.scatter(0, torch.zeros(2, 4, dtype=torch.long), 1.5), free=0),
    "index_add_h": hidden(lambda m, h: h.view(5, 2, 4).index_add(1, torch.tensor([1, 0]), h.view(5, 2, 4)).flatten(1), free=1),
    "index_fill": hidden(lambda m, h: h.index_fill(1, torch.tensor([3, 1]), 0.0), free=0),
    "masked_scatter": hidden(lambda m, h: h.masked_scatter(h > 0, m.p), p=(40,), free=0),
    "embed_tie": hidden(lambda m, h: (F.embedding(torch.tensor([0, 1, 2, 3, 4]), m.p) + h) @ m.p.T, p=(8, 8), free=1),
    "embed_computed": hidden(lambda m, h: F.embedding((h > 0).long(), m.p).flatten(1), p=(2, 3), out=24, free=2),
    "swin_bias": hidden(
        lambda m, h: (h.view(5, 2, 2, 2) + m.t[torch.tensor([0, 1, 1, 2])].view(2, 2, 2).permute(2, 0, 1)).flatten(1),
        t=(3, 2),
        free=1,
    ),
    "sort_idx": hidden(lambda m, h: h.sort(-1).indices.to(h.dtype) * h, free=0),
    "msort2": hidden(lambda m, h: h * m.p.msort()[:, 0], p=(8, 3), free=2),
    "topk_heads": hidden(lambda m, h: h.view(5, 4, 2).topk(3, 1).values.flatten(1), out=6, free=2),
    "median": hidden(lambda m, h: h * h.median() + h.median(-1, keepdim=True).values, free=1),
    "diff_pre": hidden(lambda m, h: h.diff(dim=0, prepend=m.p[None])[:5], p=(8,), free=1),
    "diff_heads": hidden(lambda m, h: h.view(5, 4, 2).diff(dim=1).flatten(1), out=6, free=1),
    "bincount_w": hidden(
        lambda m, h: h * torch.bincount((m.i % 3), weights=m.p, minlength=3)[0].to(h.dtype),
        p=(8,),
        held=lambda: dict(i=torch.arange(8)),
        free=1,
    ),
    "bincount_w2": hidden(
        lambda m, h: h * torch.bincount((m.q > 0).long(), weights=m.p, minlength=2)[0].to(h.dtype), p=(8,), q=(8,), free=2
    ),
    "one_hot2": hidden(lambda m, h: (F.one_hot((h > 0).long(), 2) * m.p[:, None]).sum(-1).to(h.dtype), p=(8,), free=1),
    "moe_loop": hidden(moe_loop, g=(4, 8), e=(4, 6, 8), f=(4, 8, 6), free=3),
    "moe_sort": hidden(moe_sorted, g=(4, 8), e=(4, 6, 8), f=(4, 8, 6), free=3),
    "moe_gather": hidden(moe_gathered, g=(4, 8), e=(4, 6, 8), f=(4, 8, 6), free=3),
    "moe_dense": hidden(moe_dense, g=(4, 8), e=(4, 6, 8), f=(4, 8, 6), free=4),
    "moe_oss": hidden(moe_interleaved, g=(4, 8), e=(4, 8, 12), f=(4, 6, 8), free=3),
    # Products, weights used twice, diagonals
    "tied_T": plain(lambda m, x: linear(linear(x, m.a).relu(), m.a.T), a=(8, 6), free=1),
    "tied_T_sq": plain(
        lambda m, x: linear(linear(linear(x, m.z), m.a).relu(), m.a.T) @ m.b, z=(8, 6), a=(8, 8), b=(8, 2), free=2
    ),
    "weight_twice": plain(
        lambda m, x: linear(linear(linear(linear(x, m.z), m.a).relu(), m.a), m.b), z=(8, 6), a=(8, 8), b=(3, 8), free=1
    ),
    "prod_T": hidden(lambda m, h: h @ m.p + h @ m.p.T, p=(8, 8), free=1),
    "sym": hidden(lambda m, h: h @ (m.p + m.p.T), p=(8, 8), free=1),
    "sq_two": hidden(lambda m, h: h + h @ m.p, p=(8, 8), free=1),
    "bias_is_row": hidden(lambda m, h: h + m.p[0] + (h * m.p[1]).sum(-1, keepdim=True), p=(2, 8), free=1),
    "bias_row_of_weight": plain(lambda m, x: linear(linear(x, m.a, m.b[0]), m.b), a=(8, 6), b=(8, 8), free=1),
    "lora_chain": plain(
        lambda m, x: linear(linear(x, m.w + m.u @ m.v).relu(), m.b), w=(8, 6), u=(8, 4), v=(4, 6), b=(3, 8), free=2
    ),
    "kron_heads": hidden(lambda m, h: h * torch.kron(m.p, m.q), p=(2,), q=(4,), free=2),
    "kron_swapped": hidden(lambda m, h: h * torch.kron(m.p, m.q) + h * torch.kron(m.q, m.p), p=(2,), q=(4,), free=1),
    "hyper_weight": plain(
        lambda m, x: torch.einsum("bi,boi->bo", x, linear(x, m.g).view(5, 8, 6)) @ m.b, g=(48, 6), b=(8, 3), free=1
    ),
    "outer_ger": plain(lambda m, x: linear(x, torch.outer(m.u, m.v)).relu() @ m.b, u=(8,), v=(6,), b=(8, 3), free=1),
    "tensordot": plain(
        lambda m, x: torch.tensordot(linear(x, m.a).view(5, 2, 4), m.b, dims=([1, 2], [1, 0])), a=(8, 6), b=(4, 2, 3), free=2
    ),
    "tensordot_both": hidden(
        lambda m, h: (
            torch.tensordot(h.view(5, 3, 3), m.p, dims=([1, 2], [1, 0]))
            + torch.tensordot(h.view(5, 3, 3), m.p, dims=([1, 2], [0, 1]))
        ),
        p=(3, 3, 4),
        c=9,
        out=4,
        free=2,
    ),
    "bilinear_self": hidden(lambda m, h: F.bilinear(h, h, m.w), w=(8, 8, 8), free=2),
    "inner": plain(lambda m, x: torch.inner(linear(x, m.a), m.b), a=(8, 6), b=(3, 8), free=1),
    "mv_dot": plain(lambda m, x: (linear(x, m.a) @ m.v)[:, None] * torch.dot(m.v, m.u), a=(8, 6), v=(8,), u=(8,), free=1),
    "chain": plain(lambda m, x: torch.linalg.multi_dot([x, m.a, m.b]), a=(6, 8), b=(8, 3), free=1),
    "vecdot_pair": hidden(lambda m, h: torch.linalg.vecdot(h.view(5, 2, 1, 4), h.view(5, 1, 2, 4)).flatten(1), out=4, free=2),
    "cross_heads": hidden(
        lambda m, h: torch.linalg.cross(h.view(5, 3, 2, 3), m.p.expand(5, 3, 2, 3), dim=1).flatten(1),
        p=(3, 1, 1),
        c=18,
        out=18,
        free=2,
    ),
    "es_diag": hidden(lambda m, h: torch.einsum("bii->bi", h.view(5, 3, 3)), c=9, out=3, free=1),
    "es_outer": hidden(lambda m, h: torch.einsum("bi,bj->bij", h, h).flatten(1), out=64, free=1),
    "es_ellipsis": hidden(lambda m, h: torch.einsum("...hd,hde->...he", h.view(5, 2, 4), m.p).flatten(1), p=(2, 4, 4), free=3),
    "es_hd_dh": hidden(
        lambda m, h: torch.einsum("bhd,bdh->bhd", h.view(5, 3, 3), h.view(5, 3, 3)).flatten(1), c=9, out=9, free=1
    ),
    "es_batch_rep": hidden(
        lambda m, h: torch.einsum("bhd,hh,hd->bhd", h.view(5, 2, 4), m.p, m.q).flatten(1), p=(2, 2), q=(2, 4), free=2
    ),
    "tril_channels": hidden(lambda m, h: (h[:, :, None] * torch.tril(m.p)).sum(1), p=(8, 8), free=0),
    "diag": hidden(lambda m, h: h @ torch.diag(m.p), p=(8,), free=1),
    "diag_embed": hidden(lambda m, h: torch.diag_embed(h) @ m.p, p=(8, 8), free=1),
    "trace": hidden(lambda m, h: h * torch.trace(m.p), p=(8, 8), free=2),
    "eye_mix": hidden(lambda m, h: h @ (torch.eye(8, dtype=h.dtype) + m.p), p=(8, 8), free=0),
    # Norms and reductions
    "ln_bias_row": hidden(lambda m, h: F.layer_norm(h, (8,), m.p[0], m.p[1]), p=(2, 8), free=1),
    "ln_2d_partial": hidden(
        lambda m, h: F.layer_norm(h.view(5, 2, 4).transpose(1, 2), (4, 2), m.p).transpose(1, 2).flatten(1), p=(4, 2), free=2
    ),
    "l2norm": hidden(lambda m, h: F.normalize(h, dim=1) * m.p, p=(8,), free=1),
    "var_mean": hidden(lambda m, h: (lambda v, u: (h - u) / (v + 1))(*torch.var_mean(h, 1, keepdim=True)), free=1),
    "logsumexp": hidden(
        lambda m, h: (
            h
            - h.logsumexp(-1, keepdim=True)
            + h.norm(dim=1, keepdim=True)
            + h.norm()
            + h.abs().sum()
            + h.prod(1, keepdim=True)
            + h.amin(-1, keepdim=True)
            + h.max()
            + (h > 0).all(1, keepdim=True)
            + (h > 0).any()
            + torch.count_nonzero(h)
            + torch.linalg.vector_norm(h, 3, -1, keepdim=True)
        ),
        free=1,
    ),
    "aminmax": hidden(lambda m, h: h * torch.aminmax(h, dim=1, keepdim=True)[0] + torch.aminmax(h)[1], free=1),
    "min_dim": hidden(lambda m, h: h * h.min(1, keepdim=True).values, free=1),
    "argmin_all": hidden(lambda m, h: h * h.argmin(), free=0),
    "softmax_product": hidden(
        lambda m, h: h.view(5, 2, 4).flatten(1).softmax(1).view(5, 2, 4).mul(m.p).flatten(1), p=(2, 1), free=2
    ),
    "window_heads_group": hidden(lambda m, h: F.group_norm(h.view(5, 2, 4).flatten(1), 4, m.p), p=(8,), free=3),
    # Regions and recurrences
    "no_grad": hidden(without_grad, p=(8,), free=1),
    "autocast": hidden(without_autocast, p=(8,), free=1),
    "ckpt": hidden(lambda m, h: checkpoint(lambda t: (t * m.p).relu(), h, use_reentrant=False), p=(8,), free=1),
    "lstmcell_manual": hidden(
        lambda m, h: (lambda i, f, g, o: o.sigmoid() * (i.sigmoid() * g.tanh() + f.sigmoid() * h).tanh())(
            *linear(h, m.w).chunk(4, 1)
        ),
        w=(32, 8),
        free=1,
    ),
    "lstm": hidden(lambda m, h: m.l(h[None])[0][0], held=lambda: dict(l=nn.LSTM(8, 8)), free=1),
    "lstm_both_ways_deep": hidden(
        lambda m, h: m.l(h[None])[0][0], held=lambda: dict(l=nn.LSTM(8, 4, 2, bidirectional=True, batch_first=True)), free=1
    ),
    "gru": hidden(lambda m, h: m.l(h[:, None])[0][:, 0], held=lambda: dict(l=nn.GRU(8, 8)), free=1),
    "rnn_without_bias": hidden(lambda m, h: m.l(h)[0], held=lambda: dict(l=nn.RNN(8, 8, bias=False)), free=1),
    "rnn_state_from_data": hidden(
        lambda m, h: m.l(h[None], h[:1][None])[0][0], held=lambda: dict(l=nn.GRU(8, 8, batch_first=True)), free=0
    ),
    "pointwise_conv_over_hidden": hidden(lambda m, h: F.conv1d(h[None], m.w)[0], w=(5, 5, 1), free=1),
    "pointwise_conv_padded": hidden(lambda m, h: F.conv1d(h[None], m.w, padding=1)[0, :, 1:-1], w=(5, 5, 1), free=0),
    "pointwise_conv_strided": hidden(lambda m, h: F.conv1d(h[None], m.w, stride=2)[0], c=16, w=(5, 5, 1), free=0),
    "pointwise_conv_along_one_axis": hidden(
        lambda m, h: F.conv2d(h[None, None], m.w, padding=(1, 0))[0, 0], w=(1, 1, 3, 1), free=1
    ),
    "pointwise_conv_grouped_same": hidden(
        lambda m, h: F.conv1d(h[None, :4], m.w, padding="same", groups=2)[0], w=(4, 2, 1), free=1
    ),
    "mamba": hidden(state_space, A=(8, 4), B=(4, 8), C=(4, 8), free=2),
    "mamba2": hidden(mamba2, w=(22, 8), D=(2,), nw=(8,), free=4),
    "mla": hidden(mla, q=(12, 8), kv=(8, 8), n=(6,), up=(14, 6), out=6, free=5),
    "parallel_block": hidden(
        lambda m, h: (
            lambda y: linear(
                torch.cat(
                    [
                        attend(*[t.view(5, 2, 4).transpose(0, 1) for t in y[:, :24].chunk(3, 1)]).transpose(0, 1).flatten(1),
                        F.gelu(y[:, 24:]),
                    ],
                    1,
                ),
                m.o,
            )
        )(linear(h, m.w)),
        w=(40, 8),
        o=(8, 24),
        free=6,
    ),
    "gqa_fused_neox": hidden(
        lambda m, h: (
            lambda z: (
                attend(
                    z[:, :, :2].flatten(1, 2).transpose(0, 1),
                    z[:, :, 2:3].expand(5, 2, 2, 4).flatten(1, 2).transpose(0, 1),
                    z[:, :, 3:].expand(5, 2, 2, 4).flatten(1, 2).transpose(0, 1),
                )
                .transpose(0, 1)
                .flatten(1)
            )
        )(linear(h, m.w).view(5, 2, 4, 4)),
        w=(32, 8),
        out=16,
        free=5,
    ),
    "two_head_counts_b": hidden(
        lambda m, h: h.view(5, 2, 4).softmax(1).flatten(1) + h.view(5, 4, 2).softmax(1).flatten(1), free=3
    ),
    # Convolutions
    "c_group_change": image(
        lambda m, x: conv(conv(conv(x, m.a), m.g, groups=2).relu(), m.g2, groups=4).mean((2, 3)) @ m.b,
        a=(8, 3, 1, 1),
        g=(8, 4, 1, 1),
        g2=(8, 2, 1, 1),
        b=(8, 4),
        free=5,
    ),
    "c_group_3_2": image(
        lambda m, x: conv(conv(conv(x, m.a), m.g, groups=2).relu(), m.g2, groups=3).mean((2, 3)) @ m.b,
        a=(12, 3, 1, 1),
        g=(12, 6, 1, 1),
        g2=(12, 4, 1, 1),
        b=(12, 4),
        free=2,
    ),
    "c_group_res": image(
        lambda m, x: (lambda h: conv(h + conv(h, m.g, groups=2), m.b))(conv(x, m.a)),
        a=(8, 3, 1, 1),
        g=(8, 4, 1, 1),
        b=(4, 8, 1, 1),
        free=2,
    ),
    "c_group_shuffle": image(
        lambda m, x: conv(F.channel_shuffle(conv(conv(x, m.a), m.g, groups=2), 2), m.g2, groups=2).mean((2, 3)) @ m.b,
        a=(8, 3, 1, 1),
        g=(8, 4, 1, 1),
        g2=(8, 4, 1, 1),
        b=(8, 4),
        free=5,
    ),
    "c_dw_mult": image(
        lambda m, x: conv(conv(conv(x, m.a), m.g, groups=4, padding=1).relu(), m.b),
        a=(4, 3, 1, 1),
        g=(12, 1, 3, 3),
        b=(4, 12, 1, 1),
        free=2,
    ),
    "c_T_group": image(
        lambda m, x: conv(F.conv_transpose2d(conv(x, m.a), m.g, m.gb, groups=2).relu(), m.b),
        a=(4, 3, 1, 1),
        g=(4, 3, 3, 3),
        gb=(6,),
        b=(4, 6, 1, 1),
        free=3,
    ),
    "c_T_group_sq": image(
        lambda m, x: conv(F.conv_transpose2d(conv(x, m.a), m.g, groups=2).relu(), m.b),
        a=(4, 3, 1, 1),
        g=(4, 2, 3, 3),
        b=(4, 4, 1, 1),
        free=3,
    ),
    "c_gn3_group2": image(
        lambda m, x: conv(F.group_norm(conv(conv(x, m.a), m.g, groups=2), 3, m.p, m.q), m.b),
        a=(12, 3, 1, 1),
        g=(12, 6, 1, 1),
        p=(12,),
        q=(12,),
        b=(4, 12, 1, 1),
        free=1,
    ),
    "c_gn_cat": image(
        lambda m, x: conv(F.group_norm(torch.cat([conv(x, m.a), conv(x, m.a2)], 1), 3, m.p), m.b),
        a=(4, 3, 1, 1),
        a2=(8, 3, 1, 1),
        p=(12,),
        b=(4, 12, 1, 1),
        free=3,
    ),
    "c_gn_cat_across": image(
        lambda m, x: conv(F.group_norm(torch.cat([conv(x, m.a), conv(x, m.a2)], 1), 3, m.p), m.b),
        a=(6, 3, 1, 1),
        a2=(6, 3, 1, 1),
        p=(12,),
        b=(4, 12, 1, 1),
        free=0,
    ),
    "c_in_perm": image(
        lambda m, x: conv(
            F.instance_norm(conv(x, m.a).flatten(2).permute(2, 1, 0)).permute(2, 1, 0).unflatten(2, (6, 6)), m.b
        ),
        a=(8, 3, 1, 1),
        b=(4, 8, 1, 1),
        free=1,
    ),
    "c_bn_eq": image(
        lambda m, x: conv(m.n(conv(x, m.a)) + m.n.weight[:, None, None] * m.n.running_mean[:, None, None], m.b),
        a=(8, 3, 1, 1),
        b=(4, 8, 1, 1),
        held=lambda: dict(n=nn.BatchNorm2d(8)),
        free=1,
    ),
    "c_ln_chw": image(
        lambda m, x: conv(F.layer_norm(conv(x, m.a), (8, 6, 6), m.p), m.b), a=(8, 3, 1, 1), p=(8, 6, 6), b=(4, 8, 1, 1), free=1
    ),
    "c_flatten_pool": image(
        lambda m, x: linear(F.adaptive_avg_pool2d(conv(x, m.a), 2).flatten(1), m.b), a=(8, 3, 1, 1), b=(4, 32), free=1
    ),
    "c_pool_channels": image(
        lambda m, x: linear(F.avg_pool1d(conv(x, m.a).mean((2, 3))[:, None], 2)[:, 0], m.b), a=(8, 3, 1, 1), b=(4, 4), free=0
    ),
    "c_pool_idx": image(
        lambda m, x: conv((lambda r: r[0] + r[1] % 7)(F.max_pool2d(conv(x, m.a), 2, return_indices=True)), m.b),
        a=(8, 3, 1, 1),
        b=(4, 8, 1, 1),
        free=1,
    ),
    "c_pad_neg_pos_c": image(
        lambda m, x: conv(F.pad(conv(x, m.a), (0, 0, 0, 0, -2, 2)), m.b) + conv(conv(x, m.a), m.b),
        a=(8, 3, 1, 1),
        b=(4, 8, 1, 1),
        free=1,
    ),
    "c_pad_refl": image(
        lambda m, x: conv(
            F.pad(conv(x, m.a), (1, 1, 1, 1), mode="reflect")
            + F.pad(conv(x, m.a), (1, 1, 1, 1), mode="replicate")
            + F.pad(conv(x, m.a), (1, 1, 1, 1), mode="circular"),
            m.b,
        ),
        a=(8, 3, 1, 1),
        b=(4, 8, 1, 1),
        free=1,
    ),
    "c_fold": image(
        lambda m, x: conv(F.fold(F.unfold(conv(x, m.a), 2), (6, 6), 2), m.b), a=(4, 3, 1, 1), b=(4, 4, 1, 1), free=1
    ),
    "c_tunfold_c": image(lambda m, x: conv(conv(x, m.a).unfold(1, 2, 2).sum(-1), m.b), a=(4, 3, 1, 1), b=(4, 2, 1, 1), free=0),
    "c_se": image(
        lambda m, x: (lambda h: conv(h * torch.sigmoid(conv(conv(h.mean((2, 3), keepdim=True), m.s).relu(), m.t)), m.b))(
            conv(x, m.a)
        ),
        a=(8, 3, 1, 1),
        s=(2, 8, 1, 1),
        t=(8, 2, 1, 1),
        b=(4, 8, 1, 1),
        free=2,
    ),
    "c_eca": image(
        lambda m, x: (
            lambda h: conv(h * torch.sigmoid(F.conv1d(h.mean((2, 3))[:, None], m.s, padding=1)[:, 0, :, None, None]), m.b)
        )(conv(x, m.a)),
        a=(8, 3, 1, 1),
        s=(1, 1, 3),
        b=(4, 8, 1, 1),
        free=0,
    ),
    "c_cat_slices_across": image(
        lambda m, x: (lambda z: conv(z[:, 4:10], m.b))(torch.cat([conv(x, m.a), conv(x, m.s)], 1)),
        a=(8, 3, 1, 1),
        s=(4, 3, 1, 1),
        b=(4, 6, 1, 1),
        free=4,
    ),
    "c_cat_group_across": image(
        lambda m, x: conv(conv(torch.cat([conv(x, m.a), conv(x, m.s)], 1), m.g, groups=3), m.b),
        a=(6, 3, 1, 1),
        s=(6, 3, 1, 1),
        g=(6, 4, 1, 1),
        b=(4, 6, 1, 1),
        free=1,
    ),
    "c_cat_chunk_add": image(
        lambda m, x: (lambda p, q: conv(p + q, m.b))(*torch.cat([conv(x, m.a), conv(x, m.s)], 1).chunk(2, 1)),
        a=(8, 3, 1, 1),
        s=(4, 3, 1, 1),
        b=(4, 6, 1, 1),
        free=2,
    ),
    "c_split_shuffle": image(
        lambda m, x: (lambda h: conv(F.channel_shuffle(torch.cat([h[:, :4], conv(h[:, 4:], m.g)], 1), 2), m.b))(conv(x, m.a)),
        a=(8, 3, 1, 1),
        g=(4, 4, 1, 1),
        b=(4, 8, 1, 1),
        free=3,
    ),
    "c_shuf_unit2": image(
        lambda m, x: (lambda u: conv(u(u(conv(x, m.a), m.g), m.g2), m.b))(
            lambda h, g: torch.cat([h[:, :4], conv(h[:, 4:], g)], 1).view(2, 2, 4, 6, 6).transpose(1, 2).reshape(2, 8, 6, 6)
        ),
        a=(8, 3, 1, 1),
        g=(4, 4, 1, 1),
        g2=(4, 4, 1, 1),
        b=(4, 8, 1, 1),
        free=6,
    ),
    "c_wn_old": image(
        lambda m, x: conv(
            torch._weight_norm(m.v, m.g, 0)[...].matmul(torch.ones(1, 1))
            if False
            else conv(x, torch._weight_norm(m.v, m.g, 0)),
            m.b,
        ),
        v=(8, 3, 1, 1),
        g=(8, 1, 1, 1),
        b=(4, 8, 1, 1),
        free=1,
    ),
    "c_wn_dim1": image(
        lambda m, x: conv(conv(x, m.a), torch._weight_norm(m.v, m.g, 1)),
        a=(8, 3, 1, 1),
        v=(4, 8, 1, 1),
        g=(1, 8, 1, 1),
        free=1,
    ),
    "c_hyper": image(
        lambda m, x: (
            conv(conv(x, m.a).reshape(1, 16, 6, 6), m.g.repeat(2, 1, 1, 1), groups=2).reshape(2, 8, 6, 6).mean((2, 3)) @ m.b
        ),
        a=(8, 3, 1, 1),
        g=(8, 8, 1, 1),
        b=(8, 4),
        free=2,
    ),
    "c_hyper_perm": image(
        lambda m, x: (
            conv(conv(x, m.a).reshape(1, 16, 6, 6), linear(x.mean((2, 3)), m.g).view(16, 8, 1, 1), groups=2)
            .reshape(2, 8, 6, 6)
            .mean((2, 3))
            @ m.b
        ),
        a=(8, 3, 1, 1),
        g=(64, 3),
        b=(8, 4),
        free=2,
    ),
    "c_convmix_res_gn": image(
        lambda m, x: (lambda h: conv(F.group_norm(h, 4, m.p) + h, m.b))(conv(conv(x, m.a), m.g, groups=2, padding=1)),
        a=(8, 3, 1, 1),
        g=(8, 4, 3, 3),
        p=(8,),
        b=(4, 8, 1, 1),
        free=4,
    ),
    # Attention: what may differ from head to head
    "attn_manual": heads(lambda m, q, k, v: ((q @ k.mT) / 2).softmax(-1) @ v, free=3),
    "attn_causal": heads(lambda m, q, k, v: attend(q, k, v, is_causal=True), free=3),
    "attn_bias_param": heads(lambda m, q, k, v: attend(q, k, v, attn_mask=m.p), dict(p=(2, 5, 5)), free=3),
    "alibi": heads(
        lambda m, q, k, v: attend(
            q, k, v, attn_mask=-(torch.arange(5)[None] - torch.arange(5)[:, None]).abs() * m.p[:, None, None]
        ),
        dict(p=(2,)),
        free=3,
    ),
    "qknorm_ln": heads(
        lambda m, q, k, v: attend(F.layer_norm(q, (4,), m.p), F.layer_norm(k, (4,), m.r), v), dict(p=(4,), r=(4,)), free=3
    ),
    "rope_half": heads(lambda m, q, k, v: attend(rope_half(q), rope_half(k), v), free=2),
    "rope_inter": heads(lambda m, q, k, v: attend(rope_inter(q), rope_inter(k), v), free=2),
    "rope_complex": heads(lambda m, q, k, v: attend(rope_inter2(q), rope_inter2(k), v), free=2),
    "rope_unit_freq": heads(
        lambda m, q, k, v: attend(q * m.c + torch.cat([-q[..., 2:], q[..., :2]], -1) * m.s, k, v),
        dict(c=(5, 1), s=(5, 1)),
        free=3,
    ),
    "talking": heads(
        lambda m, q, k, v: torch.einsum("bhnm,hg->bgnm", (q @ k.mT / 2), m.p).softmax(-1) @ v, dict(p=(2, 2)), free=4
    ),
    "talking_conv_h3": heads(
        lambda m, q, k, v: F.conv2d((q @ k.mT / 2), m.p) @ v.mean(1, keepdim=True) + v, dict(p=(2, 2, 1, 1)), free=4
    ),
    "qk_swapped_heads": heads(lambda m, q, k, v: (q @ k.flip(1).mT).softmax(-1) @ v, free=2),
    "qk_roll_cat": heads(lambda m, q, k, v: (q @ torch.cat([k[:, 1:], k[:, :1]], 1).mT).softmax(-1) @ v, free=4),
    "cross_heads_all": heads(lambda m, q, k, v: (q[:, :, None] @ k[:, None].mT).softmax(-1).mean(2) @ v, free=4),
    "diff_attn": heads(
        lambda m, q, k, v: ((q[:, :1] @ k[:, :1].mT).softmax(-1) - m.l * (q[:, 1:] @ k[:, 1:].mT).softmax(-1)) @ v,
        dict(l=()),
        free=4,
    ),
    "linear_attn_hd": heads(lambda m, q, k, v: q.softmax(-1) @ (k.softmax(-2).mT @ v), h=4, d=4, free=3),
    "per_head_temp": heads(lambda m, q, k, v: (q @ k.mT * m.t).softmax(-1) @ v * m.g, dict(t=(2, 1, 1), g=(2, 1, 4)), free=3),
    "register_kv": heads(
        lambda m, q, k, v: attend(q, torch.cat([m.rk.expand(2, 2, 3, 4), k], 2), torch.cat([m.rv.expand(2, 2, 3, 4), v], 2)),
        dict(rk=(2, 3, 4), rv=(2, 3, 4)),
        free=4,
    ),
    "head_gate_topk": heads(
        lambda m, q, k, v: attend(q, k, v) * (q.mean((-1, -2)).topk(1, 1).indices[..., None, None] + 1), free=2
    ),
    "v_shared_head": heads(lambda m, q, k, v: attend(q, k, v[:, :1].expand_as(v)), free=4),
    "attn_heads_in_batch": heads(
        lambda m, q, k, v: torch.bmm(torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).softmax(-1), v.flatten(0, 1)).unflatten(
            0, (2, 2)
        ),
        free=3,
    ),
    "attn_baddbmm": heads(
        lambda m, q, k, v: (
            torch.baddbmm(m.p.repeat(2, 1, 1), q.flatten(0, 1), k.flatten(0, 1).mT).unflatten(0, (2, 2)).softmax(-1) @ v
        ),
        dict(p=(2, 5, 5)),
        free=3,
    ),
}
