r"""The Pearson distillation loss (PKD) in plain torch.

Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient",
NeurIPS 2022, section 3. For the ``m = N H W`` positions of one channel, :math:`\hat s = (s - \bar s) / D_s`
with :math:`D_s = \sigma_s + \varepsilon`, the unbiased standard deviation :math:`\sigma_s` and
:math:`\varepsilon = 10^{-6}`,

.. math:: L_c = \frac{1}{2m} \sum_i (\hat s_i - \hat t_i)^2

is averaged over channels and summed over levels; up to :math:`\varepsilon` it is
:math:`(1 - r_c)(m - 1) / m` for the Pearson correlation :math:`r_c`. :func:`pkd_loss` says just that, and
autograd differentiates it.

**Closed form.** With the centred sums :math:`Q_s, Q_t, Q_{st}`,

.. math::
    L_c = \frac{1}{2m} \left(\frac{Q_s}{D_s^2} + \frac{Q_t}{D_t^2} - \frac{2 Q_{st}}{D_s D_t}\right), \qquad
    \frac{\partial L_c}{\partial s_i} = a (s_i - \bar s) + b (t_i - \bar t)

    b = \frac{-1}{m D_s D_t}, \qquad
    a = \frac{1}{m} \left(\frac{\varepsilon}{D_s^3} + \frac{Q_{st}}{(m - 1)\, \sigma_s D_s^2 D_t}\right),
    \quad a = 0 \text{ where } \sigma_s = 0

and the same with the roles exchanged for the teacher. Means are subtracted before anything is multiplied:
folding them into one constant is exact on paper and loses the gradient once they exceed a few hundred
deviations. They are subtracted as float32, and the constant :math:`k = -a(\bar s - k_s) - b(\bar t - k_t)`
holds what rounding them to :math:`k_s, k_t` left out; it is formed in float64 from the rounded :math:`a`
and :math:`b`.

**Moments.** All of it follows from six numbers a channel. Those of two sets of positions are joined by the
formula of Chan, Golub and LeVeque (1983), so chunks, tiles and the shares of several processes make one.

**Residual.** Near :math:`r = 1` the terms of :math:`L_c` cancel. So :math:`Q_{st}` is taken from
:math:`E = \sum_i ((s_i - \bar s) - \beta (t_i - \bar t))^2` as :math:`(Q_s + \beta^2 Q_t - E) / 2\beta` with
:math:`\beta = \sqrt{Q_s / Q_t}`: rounding errors of :math:`Q_s` and :math:`Q_t` then cancel as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6
MOMENTS = 6  # of a channel: number of positions, mean_s, mean_t, and the centred sums of s^2, t^2, s t
ROWS = 5  # of the coefficient table: a, b, k, rounded mean of x, rounded mean of y
CONSTANT = 2.0**-20  # a deviation below this part of the mean is the rounding of a constant

Features: TypeAlias = Tensor | Iterable[Tensor] | Mapping[str, Tensor]


def normalize(feature: Tensor) -> Tensor:
    """Standardises every channel over batch and positions, as the public PKDLoss does.

    Args:
        feature: ``[N, C, H, W]``.

    Returns:
        ``[N, C, H, W]``. A channel of one element becomes 0, where the public loss gives NaN.
    """
    n, c, h, w = feature.shape
    flat = feature.permute(1, 0, 2, 3).reshape(c, -1)  # [C, NHW]
    mean = flat.mean(dim=-1, keepdim=True)
    std = flat.std(dim=-1, keepdim=True) if n * h * w > 1 else torch.zeros_like(mean)
    return ((flat - mean) / (std + EPS)).reshape(c, n, h, w).permute(1, 0, 2, 3)


def match_size(student: Tensor, teacher: Tensor, resize_stu: bool = True) -> tuple[Tensor, Tensor]:
    """Brings two levels of different size together by bilinear interpolation.

    Args:
        student: ``[N, C, H, W]``.
        teacher: ``[N, C, H', W']``.
        resize_stu: resize the student to the teacher's size, else the reverse.

    Returns:
        Both levels, of one size; untouched if they were so already.
    """
    if student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    if resize_stu:
        return F.interpolate(student, teacher.shape[2:], mode="bilinear"), teacher
    return student, F.interpolate(teacher, student.shape[2:], mode="bilinear")


def pkd_loss(
    students: Sequence[Tensor], teachers: Sequence[Tensor], loss_weight: float = 1.0, resize_stu: bool = True
) -> Tensor:
    """The loss as the paper's authors write it, one operation after the other.

    Args:
        students: levels ``[N, C, H, W]``.
        teachers: as many levels, with the same batch and channels.
        loss_weight: factor of the loss.
        resize_stu: see :func:`match_size`.

    Returns:
        Scalar, in the dtype of the levels.
    """
    loss = students[0].new_zeros(())
    for student, teacher in zip(students, teachers, strict=True):
        student, teacher = match_size(student, teacher, resize_stu)
        loss = loss + F.mse_loss(normalize(student), normalize(teacher)) / 2
    return loss * loss_weight


def plain_loss(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    weights: Sequence[float],
    eps: float = EPS,
    skip_constant: bool = False,
    instance: bool = False,
    masks: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """The loss with all its options, one operation after the other, for whatever differentiates or batches these.

    Args:
        students: levels ``[N, C, H, W]``.
        teachers: levels of the same shapes.
        weights: factor of each level's loss.
        eps: what is added to the standard deviations.
        skip_constant: leave out channels in which student or teacher never changes.
        instance: statistics of every image by itself.
        masks: bool ``[N, 1, H, W]`` per level, True where a position counts; or none, and all count.

    Returns:
        The loss, a scalar, and its levels ``[L]``, weighted; float32, or float64 if a level is.
    """
    dtype, over = result_dtype(students, teachers), (2, 3) if instance else (0, 2, 3)
    losses = []
    for i, (weight, *pair) in enumerate(zip(weights, students, teachers, strict=True)):
        mask = masks[i] if masks else torch.ones_like(pair[0][:, :1], dtype=torch.bool)
        m = mask.sum(over, keepdim=True).to(dtype)  # [N or 1, 1, 1, 1]
        counted, standardised = m > 1, []
        for level in pair:
            level = level.to(dtype)
            mean = torch.where(mask, level, 0).sum(over, keepdim=True) / m.clamp(min=1)
            d = torch.where(mask, level - mean, 0)
            variance = d.square().sum(over, keepdim=True) / (m - 1).clamp(min=1)
            std = torch.where(variance > 0, torch.where(variance > 0, variance, 1).sqrt(), 0)  # its gradient is 0 at 0
            standardised.append(d / (std + eps))
            if skip_constant:
                counted = counted & ~(std <= CONSTANT * mean.abs())
        s, t = standardised
        channels = (s - t).square().sum(over, keepdim=True) / (2 * m.clamp(min=1))  # [N or 1, C, 1, 1]
        losses.append((weight * torch.where(counted, channels, 0)).mean())  # jvp widens the tangent of a scaled scalar
    return torch.stack(losses).sum(), torch.stack(losses)


def pearson_fwd(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    weights: Sequence[float],
    eps: float = EPS,
    skip_constant: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The closed form of the loss, and what its gradient needs.

    Args:
        students, teachers, weights, eps, skip_constant: as of :func:`plain_loss`.

    Returns:
        As :func:`finish`, and the moments ``[6, sum of C]``, see :func:`moments`.
    """
    sums = moments(students, teachers)
    channels = [level.shape[1] for level in students]
    dtype = result_dtype(students, teachers)
    return *finish(sums, channels, weights, eps, skip_constant, dtype), sums


def pearson_bwd(
    dloss: Tensor, x: Sequence[Tensor], y: Sequence[Tensor], coefficients: Tensor, dout: Sequence[Tensor] = ()
) -> list[Tensor]:
    """The gradient of the loss with respect to ``x``, one of the two sides, and what else reaches ``x``.

    Args:
        dloss: incoming gradient, a scalar.
        x: levels ``[N, C, H, W]``, all students or all teachers.
        y: the levels of the other side.
        coefficients: ``[5, sum of C]``, the entry of ``x`` in the table of :func:`pearson_fwd`.
        dout: gradients to be added, of the shapes and dtypes of ``x``, or none.

    Returns:
        ``dout + dloss (a (x - mean_x) + b (y - mean_y) + k)`` for every level, rounded once, in the dtype and
        layout of ``x``.
    """
    gradients, first = [], 0
    for index, (left, right) in enumerate(zip(x, y, strict=True)):
        channels = left.shape[1]
        rows = coefficients[:, first : first + channels].view(ROWS, 1, channels, 1, 1)
        first += channels
        a, b, k, mean_x, mean_y = rows.unbind()
        dx = dloss * (a * (left.to(rows.dtype) - mean_x) + (b * (right.to(rows.dtype) - mean_y) + k))
        if dout:
            dx = dx + dout[index]
        gradients.append(torch.empty_like(left).copy_(dx))
    return gradients


def result_dtype(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> torch.dtype:
    """Returns: float64 if any level is float64, else float32."""
    double = any(level.dtype == torch.float64 for level in (*students, *teachers))
    return torch.float64 if double else torch.float32


def wide_dtype(device: torch.device) -> torch.dtype:
    """Returns: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def moments(students: Sequence[Tensor], teachers: Sequence[Tensor], masks: Sequence[Tensor] = ()) -> Tensor:
    """The statistics of every channel.

    Args:
        students: levels ``[N, C, H, W]``.
        teachers: levels of the same shapes.
        masks: bool ``[N, 1 or C, H, W]`` per level, True where a position counts; or none, and all count.

    Returns:
        ``[6, sum of C]``, float64: number of positions, mean of s, mean of t, and the centred sums of s^2, t^2
        and s t. Float32 on devices without float64.
    """
    dtype = result_dtype(students, teachers)
    pairs = zip(students, teachers, strict=True)
    return torch.cat([_moments(s, t, masks[i] if masks else None, dtype) for i, (s, t) in enumerate(pairs)], dim=1)


def _moments(student: Tensor, teacher: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """:func:`moments` of one level, ``[6, C]``."""
    n, c, h, w = student.shape
    wide = wide_dtype(student.device)
    over = (0, 2, 3)
    m = student.new_full((1,), n * h * w, dtype=wide) if mask is None else mask.sum(over, dtype=wide)  # [1 or C]
    count = m.clamp(min=1)

    def kept(values: Tensor) -> Tensor:
        return values if mask is None else torch.where(mask, values, 0)

    def centred(level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        level = kept(level.to(dtype))
        mean = level.sum(over, keepdim=True) / count.to(dtype).view(1, -1, 1, 1)  # rounded; rest is what was left out
        d = kept(level - mean)
        rest = d.sum(over).to(wide) / count
        return d, mean.view(c).to(wide) + rest, rest

    def centred_square_sum(d: Tensor, rest: Tensor) -> Tensor:
        return (d.square().sum(over).to(wide) - m * rest.square()).clamp(min=0)

    ds, mean_s, rest_s = centred(student)  # [N, C, H, W], [C], [C]
    dt, mean_t, rest_t = centred(teacher)
    ss, tt = centred_square_sum(ds, rest_s), centred_square_sum(dt, rest_t)  # [C]
    beta = torch.where((ss > 0) & (tt > 0), (ss / tt).sqrt(), 1.0).clamp(1e-15, 1e15).to(dtype)
    residual = ds - beta.view(1, c, 1, 1) * dt
    beta = beta.to(wide)
    residual_sum = centred_square_sum(residual, rest_s - beta * rest_t)
    st = torch.where((ss == 0) | (tt == 0), 0.0, (ss + beta.square() * tt - residual_sum) / (2 * beta))
    return torch.stack([m.expand(c), mean_s, mean_t, ss, tt, st])


def join(parts: Tensor) -> Tensor:
    """Joins the moments of disjoint sets of positions (Chan, Golub, LeVeque 1983).

    Args:
        parts: ``[R, 6, C]``, as :func:`moments` gives them. Parts without positions add nothing.

    Returns:
        ``[6, C]``.
    """
    n, means, squares = parts[:, :1], parts[:, 1:3], parts[:, 3:]  # [R, 1, C], [R, 2, C], [R, 3, C]
    total = n.sum(0)
    means_shift = means[:1]
    mean = means_shift[0] + (n * (means - means_shift)).sum(0) / total.clamp(min=1)
    gap_s, gap_t = (means - mean).unbind(1)  # [R, C]
    gaps = torch.stack([gap_s * gap_s, gap_t * gap_t, gap_s * gap_t], dim=1)
    return torch.cat([total, mean, (squares + n * gaps).sum(0)])


def finish(
    sums: Tensor,
    channels: Sequence[int],
    weights: Sequence[float],
    eps: float = EPS,
    skip_constant: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and coefficients from the moments of every channel.

    Args:
        sums: ``[6, sum of C]``, see :func:`moments`.
        channels: C of every level.
        weights: factor of each level's loss.
        eps: what is added to the standard deviations.
        skip_constant: leave out channels in which student or teacher never changes: they add 0 to the mean
            over the channels, and have no gradient.
        dtype: of the results.

    Returns:
        The loss, a scalar; its levels ``[L]``, weighted, which add up to it; and the coefficients
        ``[2, 5, sum of C]``: rows ``a, b, k, mean_x, mean_y`` of the gradient with respect to the student
        (entry 0) and the teacher (entry 1), times ``weight / C``.
    """
    m, mean_s, mean_t, ss, tt, st = sums
    scale = torch.cat([sums.new_full((c,), weight / c) for c, weight in zip(channels, weights, strict=True)])
    degrees = (m - 1).clamp(min=1)
    std_s, std_t = (ss / degrees).sqrt(), (tt / degrees).sqrt()
    counted = m > 1  # one element has no variance: loss and gradient are defined as zero
    if skip_constant:
        constant = (std_s <= CONSTANT * mean_s.abs()) | (std_t <= CONSTANT * mean_t.abs())  # never where one is NaN
        counted = counted & ~constant
    scale = torch.where(counted, scale / m.clamp(min=1), 0.0)
    cross = st / ((std_s + eps) * (std_t + eps))
    losses = (ss / (std_s + eps).square() + tt / (std_t + eps).square() - 2 * cross).clamp(min=0) / 2
    losses = torch.stack([level.sum() for level in (scale * losses).split(list(channels))])
    table = torch.stack(
        [
            _gradient_rows(scale, std_s, std_t, mean_s, mean_t, cross / degrees, eps, dtype),
            _gradient_rows(scale, std_t, std_s, mean_t, mean_s, cross / degrees, eps, dtype),
        ]
    )
    return losses.sum().to(dtype), losses.to(dtype), table


def _gradient_rows(
    scale: Tensor,
    std_x: Tensor,
    std_y: Tensor,
    mean_x: Tensor,
    mean_y: Tensor,
    r: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Coefficients ``[5, C]`` of the gradient with respect to x, in ``dtype``; ``r`` is the correlation."""
    dx, dy = std_x + eps, std_y + eps
    a = torch.where(std_x > 0, eps / dx**3 + r / (std_x * dx), 0.0)
    a = (scale * a).to(dtype)
    b = (-scale / (dx * dy)).to(dtype)
    shift_x, shift_y = mean_x.to(dtype), mean_y.to(dtype)
    k = -a.to(dx.dtype) * (mean_x - shift_x) - b.to(dx.dtype) * (mean_y - shift_y)
    return torch.stack([a, b, k.to(dtype), shift_x, shift_y])
