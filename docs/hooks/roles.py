"""Docstrings name each other as Sphinx writes it, ``:func:`jdkd.nn.set_subnet```; the site links what is public."""

import importlib
import re

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|exc):`~?([^`]+)`")
EXAMPLE = re.compile(r"::$", re.MULTILINE)


def public_names() -> dict[str, str]:
    """The public path of everything that is public, by every path that it has; methods go to their class."""
    import jdkd

    found = {}
    for package in jdkd._PACKAGES:
        module = importlib.import_module(f"jdkd.{package}")
        for name in getattr(module, "__all__", ()):
            path, thing = f"jdkd.{package}.{name}", getattr(module, name)
            found[path] = path
            if hasattr(thing, "__qualname__"):
                found[f"{thing.__module__}.{thing.__qualname__}"] = path
    return found


class Roles(griffe.Extension):
    """Rewrites the docstrings of a package before they are parsed."""

    def __init__(self) -> None:
        self.public = public_names()

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            text = ROLE.sub(lambda role: self.linked(role.group(1), obj), obj.docstring.value)
            obj.docstring.value = EXAMPLE.sub(":", text)

    def on_package(self, *, pkg, loader, **kwargs):
        """Where a package's function has the name of its own module, such as ``jdkd.graph.trace``, the function is
        meant; everything else is looked up before."""
        loader.resolve_aliases(implicit=True, external=False)
        packages = [member for member in pkg.members.values() if not member.is_alias and member.is_module]
        for package in packages:
            for name in map(str, package.exports or ()):
                module = package.members.get(name)
                if module is not None and not module.is_alias and module.is_module:
                    self.rewrite(module)  # which no walk finds any more
                    package.set_member(name, griffe.Alias(name, module.members[name], parent=package))

    def rewrite(self, obj: griffe.Object) -> None:
        """Rewrites the docstrings of an object and of all that it defines."""
        self.on_object(obj=obj)
        for member in obj.members.values():
            if not member.is_alias:
                self.rewrite(member)

    def linked(self, target: str, obj: griffe.Object) -> str:
        """A link to what a role names, or its name where that is no page of the site."""
        beside = f"{obj.module.path}.{target}"
        path = self.public.get(target) or self.public.get(beside)
        return f"[`{target.removeprefix('jdkd.')}`][{path}]" if path and documented(path) else f"`{target}`"


def documented(path: str) -> bool:
    """Whether the site has it: everything public but what is experimental."""
    return not path.startswith(("jdkd.experimental.", "jdkd.ops."))
