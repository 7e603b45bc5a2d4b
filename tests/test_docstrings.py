"""Every public name says what it takes and returns, with an example that the tests run."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import typing
from collections.abc import Iterator

import pytest

import hf_flashinfer_attn

PUBLIC = sorted(set(hf_flashinfer_attn.__all__) - {"__version__"})
# Define Triton kernels when they are imported.
NEEDS_TRITON = ("hf_flashinfer_attn.kernels.triton_pad", "hf_flashinfer_attn.ragged.triton_tokens")


def _modules() -> list[str]:
    names = [module.name for module in pkgutil.walk_packages(hf_flashinfer_attn.__path__, "hf_flashinfer_attn.")]
    names.remove("hf_flashinfer_attn.__main__")
    if importlib.util.find_spec("triton") is None:
        names = [name for name in names if name not in NEEDS_TRITON]
    return names


def _classes_in(annotation: object) -> Iterator[type]:
    if isinstance(annotation, type) and annotation.__module__.startswith("hf_flashinfer_attn"):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _classes_in(part)


def _parameters(value: typing.Any) -> list[inspect.Parameter]:
    if inspect.isclass(value) and "__init__" not in vars(value):
        return []
    return list(inspect.signature(value).parameters.values())


def _members(value: type) -> Iterator[tuple[str, object]]:
    for name, member in vars(value).items():
        if not name.startswith("_") and (isinstance(member, (property, classmethod)) or inspect.isfunction(member)):
            yield name, member


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_has_an_example_that_doctest_collects(name: str, pytestconfig: pytest.Config) -> None:
    value = getattr(hf_flashinfer_attn, name)
    collected = doctest.DocTestFinder().find(sys.modules[value.__module__])
    assert [test for test in collected if test.name == f"{value.__module__}.{name}" and test.examples]
    assert "Examples:\n" in value.__doc__
    assert pytestconfig.getoption("doctestmodules"), "the examples are run by --doctest-modules in setup.cfg"


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_says_what_it_takes(name: str) -> None:
    value = getattr(hf_flashinfer_attn, name)
    documentation = value.__doc__
    for parameter in _parameters(value):
        assert f"\n        {parameter.name}: " in documentation, parameter.name
        # A tensor without its shape tells little.
        if "Tensor" in str(parameter.annotation):
            assert "hape `(" in documentation, parameter.name
            assert "dtype" in documentation or "int" in documentation or "float" in documentation, parameter.name


@pytest.mark.parametrize("name", [name for name in PUBLIC if inspect.isfunction(getattr(hf_flashinfer_attn, name))])
def test_what_public_functions_return_is_public_and_documented(name: str) -> None:
    function = inspect.unwrap(getattr(hf_flashinfer_attn, name))
    # Of parameters some types are imported for type checkers alone.
    returned = eval(function.__annotations__["return"], vars(sys.modules[function.__module__]))
    for found in _classes_in(returned):
        assert found.__name__ in hf_flashinfer_attn.__all__
    documentation = function.__doc__ or ""
    assert returned is None or "Returns" in documentation or "Yields" in documentation


@pytest.mark.parametrize("name", [name for name in PUBLIC if inspect.isclass(getattr(hf_flashinfer_attn, name))])
def test_public_members_are_documented(name: str) -> None:
    for member_name, member in _members(getattr(hf_flashinfer_attn, name)):
        assert inspect.getdoc(member), member_name


@pytest.mark.parametrize("module_name", _modules())
def test_names_that_modules_share_are_documented(module_name: str) -> None:
    module = importlib.import_module(module_name)
    assert module.__doc__
    for name in getattr(module, "__all__", ()):
        value = getattr(module, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            assert value.__doc__, name
