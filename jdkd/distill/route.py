"""The way of the images through a detector: where they enter, and where its pyramid comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jdkd.distill.alignment import PyramidSnapshot
from jdkd.distill.hooks import Hook
from jdkd.distill.neck import Pyramid, found_levels
from jdkd.distill.student_input import StudentInput, parameters_of
from jdkd.errors import InputError, said
from jdkd.nn.necks import (
    BACKBONE,
    NECK,
    NotReached,
    backbone_of,
    has_module,
    head_of,
    holders,
    neck_of,
    outermost,
    run_until,
)
from jdkd.nn.unwrapping import unwrapped
from jdkd.ops.pearson_strides import Size

GIVEN = ":input"  # after the path of a head that is called with the pyramid
HOLDERS = ("ema", "module", "model", "ema_model")  # where objects that are no modules keep a model


def module_of(model: Any, who: str) -> nn.Module:
    """The model itself, or the one that a running average which is no module holds.

    Raises:
        InputError: there is none.
    """
    if isinstance(model, nn.Module):
        return model
    held = (getattr(model, name, None) for name in HOLDERS)
    found = next((one for one in held if isinstance(one, nn.Module)), None)
    if found is None:
        raise InputError(f"the {who} is {_named(model)}; pass a detector, a torch.nn.Module")
    return found


@dataclass(frozen=True, eq=False)
class Route:
    """The way of the images through a detector.

    Args:
        caller: the module whose forward takes images past the entrance to the neck.
        entrance: what the normalised images go into: the backbone that is next to the neck, or else the caller.
        neck: what returns the pyramid, or is called with it.
        chain: the modules around the entrance, from the model that was given inwards.
        given: whether the pyramid is what the neck, a head then, is called with.
    """

    caller: nn.Module
    entrance: nn.Module
    neck: nn.Module
    chain: tuple[nn.Module, ...]
    given: bool = False

    def run(self, seen: StudentInput, images: Tensor) -> Pyramid:
        """The pyramid of images ``[N, C, H, W]``, normalised as the entrance expects; nothing runs after the neck.

        Args:
            seen: how the student was given its images; masks of padding are passed on to a detector that takes them.
            images: ``[N, C, H, W]``.

        Raises:
            InputError: the neck is not on the way of the images, or the entrance asks for something unknown.
        """
        if self.neck is self.entrance and not self.given:
            return self._enter(self.entrance, seen, images)
        inside = any(module is self.neck for module in self.entrance.modules())
        caller = self.entrance if inside else self.caller
        with ExitStack() as stack:
            if caller is not self.entrance:  # what it makes of the images on the way, such as resizing, is replaced
                swap = _swapped(images)
                stack.callback(self.entrance.register_forward_pre_hook(swap, with_kwargs=True).remove)
            try:
                return run_until(self.neck, lambda: self._enter(caller, seen, images), given=self.given)
            except NotReached:
                raise InputError(
                    f"{type(caller).__name__} never called {type(self.neck).__name__}, which teacher_neck names, on a "
                    "batch of images; name a submodule that it calls"
                ) from None

    def watch_pyramid(self, see: Callable[[nn.Module, tuple[Any, ...], Pyramid], Pyramid | None]) -> Any:
        """A hook that is called with the neck, its inputs and the pyramid, and may return another for the heads."""
        if not self.given:
            return self.neck.register_forward_hook(Hook(see))

        def called(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not inputs:
                raise InputError(f"the {type(head).__name__} is called without its levels as the first argument")
            pyramid = see(head, (), inputs[0])
            return None if pyramid is None else (pyramid, *inputs[1:])

        return self.neck.register_forward_pre_hook(Hook(called))

    def writers(self) -> list[nn.Module]:
        """Activations outside of the neck and backbone that write to what they are given."""
        inside = set(self.neck.modules()) if not self.given else set()
        if self.entrance is not self.chain[-1]:
            inside |= set(self.entrance.modules())
        return [
            part for part in self.chain[0].modules() if getattr(part, "inplace", False) is True and part not in inside
        ]

    def watch_sizes(self, see: Callable[[list[Size] | None], None]) -> list[Any]:
        """Hooks that say height and width of every image before it was padded, as torchvision's transform does."""

        def transformed(transform: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            images = output[0] if isinstance(output, tuple) and output else output
            sizes = getattr(images, "image_sizes", None)
            see(None if sizes is None else [tuple(size) for size in sizes])

        transform = getattr(self.chain[-1], "transform", None)
        return [transform.register_forward_hook(Hook(transformed))] if isinstance(transform, nn.Module) else []

    def look(self, model: nn.Module, images: Sequence[Tensor], who: str) -> tuple[StudentInput, PyramidSnapshot]:
        """What goes into the entrance, and what comes of it, when a detector is given images; its heads do not run.

        Args:
            model: the detector, whose forward takes a list of images as torchvision's do.
            images: ``[3, H, W]`` in 0..1.
            who: what errors call it.

        Raises:
            InputError: it does not run on them, does not call its neck, or that returns no levels.
        """
        remedy = (
            "a list of images [3, H, W] ({}); give a detector that does, as torchvision's do, or wrap it with "
            "jdkd.detect.adopt"
        )
        return self.observe(lambda: model(list(images)), model, who, remedy)

    def observe(
        self, run: Callable[[], Any], model: nn.Module, who: str, remedy: str = "that batch ({}); mend how it is called"
    ) -> tuple[StudentInput, PyramidSnapshot]:
        """What :meth:`look` says, where ``run`` calls the detector.

        Raises:
            InputError: it does not run, does not call its neck, or that returns no levels.
        """
        kind, seen, sizes = type(model).__name__, [], []

        def see(entrance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found = StudentInput.of(parameters_of(entrance), args, kwargs)
            if found is not None and (not found.sizes or entrance is self.chain[-1]):
                seen.append(found)

        hooks = [self.entrance.register_forward_pre_hook(see, with_kwargs=True), *self.watch_sizes(sizes.append)]
        try:
            pyramid = run_until(self.neck, run, given=self.given)
        except (torch.OutOfMemoryError, InputError):
            raise
        except (NotReached, TypeError, AttributeError, RuntimeError, ValueError, AssertionError, LookupError) as error:
            missed = isinstance(error, NotReached)
            reason = f"it never called its {type(self.neck).__name__}" if missed else said(error)
            raise InputError(f"the {who} ({kind}) does not run up to its neck on {remedy.format(reason)}") from error
        finally:
            for hook in hooks:
                hook.remove()
        if not seen:
            raise InputError(
                f"the {who} ({kind}) calls its {type(self.entrance).__name__} with no images; keep what is called with "
                "a batch [N, 3, H, W] in a submodule called backbone"
            )
        return seen[-1], PyramidSnapshot.of(found_levels(pyramid, who), seen[-1], next(reversed(sizes), None))

    def _enter(self, module: nn.Module, seen: StudentInput, images: Tensor) -> Any:
        takes_list = bool(seen.sizes) and module is self.chain[-1]
        args, kwargs = seen.arguments_for(module, seen.as_list(images) if takes_list else images)
        try:
            pyramid = module(*args, **kwargs)
        except (torch.OutOfMemoryError, InputError):
            raise
        except (RuntimeError, ValueError, AssertionError) as error:
            raise InputError(
                f"the teacher's {type(module).__name__} does not run on the student's images, {list(images.shape)} of "
                f"{images.dtype} on {images.device} ({said(error)}); if they are too small for it, let the student's "
                "be larger (its min_size)"
            ) from error
        return list(pyramid) if isinstance(pyramid, Iterator) else pyramid


def route_of(model: nn.Module, who: str, path: str | None = None) -> Route:
    """Finds the way of the images through a detector, wherever wrappers have put it.

    Args:
        model: a detector, or what wraps one: ``DistributedDataParallel``, ``AveragedModel``, ``torch.compile``, or
            a module with one detector in it.
        who: what errors call it.
        path: dotted name of the submodule that returns the pyramid, in the model as given, without torch's wrappers,
            or in the detector inside ("" is the model itself), or, with ``":input"`` behind it, of a head that is
            called with it; by default ``neck``, or else ``backbone``, or else what Ultralytics' heads are called with.

    Raises:
        InputError: there is no such submodule, several detectors have one, or the model is scripted.
    """
    if path is not None and not isinstance(path, str):
        raise InputError(
            f"{'teacher_neck' if who == 'teacher' else 'neck'} is {_named(path)}; pass a dotted name, or None"
        )
    inner = unwrapped(model)
    if isinstance(inner, torch.jit.ScriptModule):
        raise InputError(
            f"the {who} is a scripted or traced module, whose parts nobody can listen to; pass the module that it was "
            "made from"
        )
    found = holders(inner)
    if path is None:
        if (neck := neck_of(inner)) is not None:
            return _route(inner, neck, who)
        if not found and (head := head_of(inner)) is not None:
            return _route(inner, head, who, given=True)
        raise InputError(_nowhere(inner, who, f"{NECK} or {BACKBONE}", found))
    given, path = path.endswith(GIVEN), path.removesuffix(GIVEN)
    for root in (model, inner):
        if has_module(root, path):
            return _route(root, path, who, given=given)
    if len(found) == 1 and has_module(found[0][1], path):
        return _route(inner, f"{found[0][0]}.{path}".strip("."), who, given=given)
    raise InputError(_nowhere(inner, who, path, []))


def _route(root: nn.Module, path: str, who: str, *, given: bool = False) -> Route:
    neck = root.get_submodule(path)
    names = path.split(".") if path else []
    chain = [root, *(root.get_submodule(".".join(names[: i + 1])) for i in range(len(names) - 1))]
    owner = next((module for module in reversed(chain) if backbone_of(module) is not None), None)
    if owner is not None:
        around = tuple(chain[: chain.index(owner) + 1])
        return Route(owner, backbone_of(owner), neck, around, given)
    owners = outermost(root, lambda module: backbone_of(module) is not None)
    if len(owners) == 1:
        prefix, owner = owners[0]
        names = prefix.split(".")
        around = tuple(root.get_submodule(".".join(names[:i])) for i in range(len(names) + 1))
        return Route(root, backbone_of(owner), neck, around, given)
    if given:  # a sequence of layers that the model goes through by itself is never called
        chain = [module for module in chain if not isinstance(module, nn.Sequential)] or chain
    inmost = _inmost(chain)
    transform = getattr(inmost, "transform", None)
    if hasattr(transform, "image_mean") and hasattr(transform, "min_size"):
        raise InputError(
            f"the {who} ({type(inmost).__name__}) resizes and normalises images in its transform, and has no backbone "
            "that could be given them after that; keep what follows the transform in a submodule called backbone"
        )
    return Route(inmost, inmost, neck, tuple(chain[: chain.index(inmost) + 1]), given)


def _inmost(chain: list[nn.Module]) -> nn.Module:
    """The model inside modules on the way to a neck that have no weights but those of the next, as wrappers do."""
    model = chain[0]
    for module in chain[1:]:
        weights = {id(parameter) for parameter in module.parameters()}
        if any(id(parameter) not in weights for parameter in model.parameters()):
            break
        model = module
    return model


def _nowhere(model: nn.Module, who: str, wanted: str, holders: list[tuple[str, nn.Module]]) -> str:
    argument = "teacher_neck" if who == "teacher" else "neck"
    children = ", ".join(name for name, _ in model.named_children()) or "none"
    if holders:
        places = ", ".join(prefix for prefix, _ in holders)
        return (
            f"the {who} ({type(model).__name__}) holds several detectors ({places}); pass the one that is meant, or "
            f"the dotted path of its pyramid as {argument}"
        )
    return (
        f"the {who} ({type(model).__name__}) has no submodule {wanted}; name the one that returns its pyramid with "
        f"{argument}, a dotted path, or a head that is called with it, 'head{GIVEN}' (its children: {children})"
    )


def _named(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _swapped(images: Tensor) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    """A hook that lets an entrance be called with these images in place of its own."""

    def swap(entrance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
        own = StudentInput.of(parameters_of(entrance), args, kwargs)
        if own is None or own.sizes:
            return (images, *args[1:]), kwargs
        names = [*parameters_of(entrance), *map(str, range(len(args)))]  # as StudentInput counts them
        theirs = (dict(zip(names, args, strict=False)) | kwargs).get(own.name)
        same = lambda value: isinstance(value, Tensor) and value is theirs  # noqa: E731
        changed = {name: images if same(value) else value for name, value in kwargs.items()}
        return tuple(images if same(value) else value for value in args), changed

    return swap
