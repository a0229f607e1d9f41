"""What follows a convolution is joined to it where the code of a module says so, and nowhere else."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jdkd import _backend
from jdkd.errors import InputError
from jdkd.patch.chains import Fused, flow_of
from jdkd.patch.convolutions import ATEN, SIZES, TABLE, Call, Convolution, Cudnn, Form, Pointwise


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True)


class Residual(Two):
    def forward(self, x: Tensor) -> Tensor:
        out = self.b(self.relu(self.a(x)))
        out += x
        return self.relu(out)


class Functional(Two):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x.add(self.b(torch.relu(self.a(x)))), inplace=True)


class Broadcast(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.a(x) + self.b(x[:, :, :1, :1]))


class Reused(Two):
    """The convolution is read twice, before and after the ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(F.relu(y)) + y


class IntoIdentity(Two):
    """The sum is written into what the next convolution reads."""

    def forward(self, x: Tensor) -> Tensor:
        z = F.relu(self.a(x))
        z.add_(self.b(x))
        return z + self.b(z)


class Doubled(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.relu(y + y)


class Numbers(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.a(x) * self.scale)

    scale = 2.0


class Branches(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.a(x)) if x.sum() > 0 else self.b(x)


def fused(module: nn.Module) -> Fused:
    known = {id(conv): Convolution(conv, None, Form()) for conv in (module.a, module.b)}
    return Fused(module.eval(), flow_of(module), known)


@pytest.mark.parametrize(
    ("kind", "steps"), [(Residual, 2), (Functional, 2), (Reused, 1), (IntoIdentity, 2), (Doubled, 0)]
)
def test_it_does_what_the_code_does(kind, steps):
    torch.manual_seed(0)
    module, x = kind(), torch.randn(2, 4, 5, 6)
    with torch.no_grad():
        ours = fused(module)
        assert ours.steps == steps
        torch.testing.assert_close(ours(x.clone()), module(x.clone()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [Numbers, Broadcast])
def test_code_that_does_anything_else_is_left_alone(kind):
    assert flow_of(kind().eval()) is None


def test_code_that_cannot_be_followed_is_refused_with_what_it_raised():
    with pytest.raises(InputError, match=r"its code cannot be followed: .*control flow"):
        flow_of(Branches().eval())


def test_a_residual_that_is_broadcast_is_added_as_torch_does():
    module, x = Residual().eval(), torch.randn(1, 4, 5, 6)
    with torch.no_grad():
        one = torch.randn(1, 4, 1, 1)
        ours = Convolution(module.b, None, Form(fused=True)).run(x, one, True)
        torch.testing.assert_close(ours, F.relu(F.conv2d(x, module.b.weight, module.b.bias) + one))


@pytest.mark.parametrize("shape", [(4, 5, 6), (0, 4, 5, 6)], ids=["no batch", "an empty batch"])
def test_unusual_inputs_run_as_in_torch(shape):
    conv = nn.Conv2d(4, 6, 3, padding=1).eval()
    with torch.no_grad():
        x = torch.randn(shape)
        ours = Convolution(conv, None, Form(packed=True))(x)
        torch.testing.assert_close(ours, conv(x))


def test_autocast_still_casts():
    conv = nn.Conv2d(4, 6, 3, padding=1).eval()
    ours = Convolution(conv, None, Form(packed=True))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(1, 4, 5, 6)
        assert ours(x).dtype == conv(x).dtype == torch.bfloat16
        torch.testing.assert_close(ours(x), conv(x))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(4, 8, 3, padding=2, dilation=2, bias=False),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.Conv2d(4, 8, (1, 5), padding="same"),
        nn.Conv2d(4, 8, 3, padding="valid"),
    ],
    ids=["grouped", "dilated", "depthwise", "same", "valid"],
)
def test_packed_weights_serve_every_kind_and_size(conv):
    ours = Convolution(conv.eval(), None, Form(packed=True, fused=True))
    with torch.no_grad():
        for size in ((9, 12), (40, 33)):
            x = torch.randn(2, 4, *size)
            torch.testing.assert_close(ours(x), conv(x), rtol=1e-4, atol=1e-5)
            residual = torch.randn_like(conv(x))
            torch.testing.assert_close(ours.run(x, residual, True), F.relu(conv(x) + residual), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # by the interpreter
@pytest.mark.parametrize("stride", [1, 2])
def test_the_triton_kernel_has_the_same_epilogue(stride):
    """Through Triton's interpreter; on a CPU nobody chooses it."""
    conv = nn.Conv2d(16, 16, 1, stride=stride).eval()
    call = Call(conv, Form(fused=True), torch.device("cpu"), torch.float32)
    assert Pointwise().why_not(call) == Cudnn().why_not(call) == "it fuses an epilogue on a GPU"
    with torch.no_grad():
        x = torch.randn(1, 16, 5, 6).contiguous(memory_format=torch.channels_last)
        y = conv(x)
        residual = torch.randn_like(y)
        for given, relu in ((None, True), (residual, True), (None, False)):
            expected = ATEN.run(x, (conv.weight, conv.bias), conv, given, relu)
            ours = Pointwise().run(x, (conv.weight, conv.bias), conv, given, relu)
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # by the interpreter
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_a_1x1_convolution_whose_padding_is_a_word_takes_a_residual(padding):
    """As where the Triton kernel is chosen, which takes it."""
    conv = nn.Conv2d(16, 16, 1, padding=padding).eval()
    ours = Convolution(conv, None, Form(fused=True))
    with torch.no_grad():
        x, residual = (torch.randn(1, 16, 5, 6).contiguous(memory_format=torch.channels_last) for _ in range(2))
        ours.weights(x)
        ours._run = Pointwise()
        torch.testing.assert_close(ours.run(x, residual, True), F.relu(conv(x) + residual), rtol=1e-4, atol=1e-4)


def test_who_asks_for_a_backend_decides_whether_the_triton_kernel_runs(monkeypatch):
    """On a GPU, which need not be there to be asked about."""
    call = Call(nn.Conv2d(16, 16, 1), Form(fused=True), torch.device("cuda"), torch.float32)
    monkeypatch.setattr(_backend, "_why_unavailable", lambda op, backend: None)
    monkeypatch.setattr(_backend, "seen_right", lambda subject: subject.form == "forward")
    monkeypatch.setattr(_backend, "_chosen", {})
    monkeypatch.delenv("JDKD_BACKEND", raising=False)
    assert TABLE.choose(call)[0].name == "triton"
    assert TABLE.explain(call).source == "checked on this device"
    monkeypatch.setenv("JDKD_BACKEND", "reference")
    assert TABLE.choose(call)[0].name == "cuDNN"
    assert ("triton", "the backend reference was asked for") in TABLE.explain(call).others
    monkeypatch.setattr(_backend, "seen_right", lambda subject: False)
    monkeypatch.delenv("JDKD_BACKEND")
    assert TABLE.choose(call)[0].name == "cuDNN"


def test_a_packed_weight_is_made_for_every_size_and_few_are_kept():
    ours = Convolution(nn.Conv2d(4, 4, 3, padding=1).eval(), None, Form(packed=True))
    made: list[tuple[int, ...]] = []
    reordered = ours.reordered
    ours.reordered = lambda weight, size: made.append(size[2:]) or reordered(weight, size)
    with torch.no_grad():
        for side in (8, 9, 8, *range(10, 10 + SIZES - 1), 9, 8):
            x = torch.randn(1, 4, side, side)
            torch.testing.assert_close(ours(x), ours.module(x), rtol=1e-4, atol=1e-5)
        assert made == [(side, side) for side in (8, 9, *range(10, 10 + SIZES - 1), 8)]
        ours.module.weight.mul_(2)
        torch.testing.assert_close(ours(x), ours.module(x), rtol=1e-4, atol=1e-5)
    assert len(ours._packed) == 1 and made[-1] == (8, 8)
