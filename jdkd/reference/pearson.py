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
ROWS = 5  # of the coefficient table: a, b, k, rounded mean of x, rounded mean of y

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


def pearson_fwd(students: Sequence[Tensor], teachers: Sequence[Tensor], loss_weight: float) -> tuple[Tensor, Tensor]:
    """The closed form of the loss, and what its gradient needs.

    Args:
        students: levels ``[N, C, H, W]``.
        teachers: levels of the same shapes.
        loss_weight: factor of the loss.

    Returns:
        The loss, a scalar, and the coefficients ``[2, 5, sum of C]``: rows ``a, b, k, mean_x, mean_y`` of
        the gradient with respect to the student (entry 0) and the teacher (entry 1), times ``loss_weight /
        C``. Both are float32, or float64 where the levels are.
    """
    losses, tables = zip(
        *(_level(s, t, loss_weight / s.shape[1]) for s, t in zip(students, teachers, strict=True)),
        strict=True,
    )
    dtype = result_dtype(students, teachers)
    return torch.stack(losses).sum().to(dtype), torch.cat(tables, dim=2).to(dtype)


def pearson_bwd(dloss: Tensor, x: Sequence[Tensor], y: Sequence[Tensor], coefficients: Tensor) -> list[Tensor]:
    """The gradient of the loss with respect to ``x``, one of the two sides.

    Args:
        dloss: incoming gradient, a scalar.
        x: levels ``[N, C, H, W]``, all students or all teachers.
        y: the levels of the other side.
        coefficients: ``[5, sum of C]``, the entry of ``x`` in the table of :func:`pearson_fwd`.

    Returns:
        ``dloss (a (x - mean_x) + b (y - mean_y) + k)`` for every level, in the dtype and layout of ``x``.
    """
    gradients, first = [], 0
    for left, right in zip(x, y, strict=True):
        channels = left.shape[1]
        rows = coefficients[:, first : first + channels].view(ROWS, 1, channels, 1, 1)
        first += channels
        a, b, k, mean_x, mean_y = rows.unbind()
        dx = dloss * (a * (left.to(rows.dtype) - mean_x) + (b * (right.to(rows.dtype) - mean_y) + k))
        gradients.append(dx.to(left.dtype))
    return gradients


def result_dtype(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> torch.dtype:
    """Returns: float64 if any level is float64, else float32."""
    double = any(level.dtype == torch.float64 for level in (*students, *teachers))
    return torch.float64 if double else torch.float32


def _level(student: Tensor, teacher: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Loss (scalar) and coefficients ``[2, 5, C]`` of one level, times ``scale``."""
    n, c, h, w = student.shape
    m = n * h * w
    dtype = result_dtype([student], [teacher])
    wide = torch.float32 if student.device.type == "mps" else torch.float64
    over = (0, 2, 3)

    def centred(level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        level = level.to(dtype)
        mean = level.mean(over, keepdim=True)  # rounded; rest is what the rounding left out
        d = level - mean
        rest = d.sum(over).to(wide) / m
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

    degrees = max(m - 1, 1)
    std_s, std_t = (ss / degrees).sqrt(), (tt / degrees).sqrt()
    scale = scale / m if m > 1 else 0.0  # one element has no variance: loss and gradient are defined as zero
    cross = st / ((std_s + EPS) * (std_t + EPS))
    losses = (ss / (std_s + EPS).square() + tt / (std_t + EPS).square() - 2 * cross).clamp(min=0) / 2
    table = torch.stack(
        [
            _gradient_rows(scale, std_s, std_t, mean_s, mean_t, cross / degrees, dtype),
            _gradient_rows(scale, std_t, std_s, mean_t, mean_s, cross / degrees, dtype),
        ]
    )
    return scale * losses.sum(), table


def _gradient_rows(
    scale: float, std_x: Tensor, std_y: Tensor, mean_x: Tensor, mean_y: Tensor, r: Tensor, dtype: torch.dtype
) -> Tensor:
    """Coefficients ``[5, C]`` of the gradient with respect to x, in ``dtype``; ``r`` is the correlation."""
    dx, dy = std_x + EPS, std_y + EPS
    a = torch.where(std_x > 0, EPS / dx**3 + r / (std_x * dx), 0.0)
    a = (scale * a).to(dtype)
    b = (-scale / (dx * dy)).to(dtype)
    shift_x, shift_y = mean_x.to(dtype), mean_y.to(dtype)
    k = -a.to(dx.dtype) * (mean_x - shift_x) - b.to(dx.dtype) * (mean_y - shift_y)
    return torch.stack([a, b, k.to(dtype), shift_x, shift_y])
