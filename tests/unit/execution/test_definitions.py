"""Names, homes and references: which definition a name means, and who refuses it."""

from __future__ import annotations

import functools
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pyworkflow_ray as pw
from pyworkflow_ray.execution.definitions import DefinitionError, is_importable, reference, resolve, short_name

Importer = Callable[..., types.ModuleType]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Importer]:
    """Writes a module under a fresh import root and imports it; names of modules are this test's own."""
    monkeypatch.syspath_prepend(str(tmp_path))
    made: list[str] = []

    def make(name: str, source: str) -> types.ModuleType:
        tmp_path.joinpath(f"{name}.py").write_text("import pyworkflow_ray as pw\n" + textwrap.dedent(source))
        made.append(name)
        __import__(name)
        return sys.modules[name]

    yield make
    for name in made:
        sys.modules.pop(name, None)


def test_name_is_module_and_qualname_or_the_explicit_one() -> None:
    def charge() -> None: ...

    assert pw.step(charge).definition.name == f"{__name__}:{charge.__qualname__}"
    assert pw.step(name="charge-card")(charge).definition.name == "charge-card"


def test_module_level_step_is_found_by_import(module: Importer) -> None:
    shop = module("defs_shop1", "@pw.step\ndef charge(): ...\n@pw.workflow\nasync def flow(): ...")
    assert reference(shop.charge.definition) == ("import", "defs_shop1", "charge")
    assert reference(shop.flow.definition) == ("import", "defs_shop1", "flow")
    assert resolve("step", "import", "defs_shop1", "charge") is shop.charge.definition


def test_step_in_a_dict_and_second_step_of_one_function_are_found_by_registered_name(module: Importer) -> None:
    shop = module(
        "defs_shop2",
        """
        def price(x): return x
        cheap = pw.step(name="shop2-cheap")(price)
        dear = pw.step(name="shop2-dear", max_retries=3)(price)
        TABLE = {"a": pw.step(name="shop2-a")(lambda: 1)}
        """,
    )
    for step, name in ((shop.cheap, "shop2-cheap"), (shop.dear, "shop2-dear"), (shop.TABLE["a"], "shop2-a")):
        assert reference(step.definition) == ("registered", "defs_shop2", name)
        assert resolve("step", "registered", "defs_shop2", name) is step.definition


def test_step_made_by_a_factory_belongs_to_the_module_that_calls_it(module: Importer) -> None:
    module("defs_factory", "def make(name):\n    @pw.step(name=name)\n    def inner(): ...\n    return inner")
    user = module("defs_user", "import defs_factory\nmine = defs_factory.make('defs-user-mine')")
    assert reference(user.mine.definition) == ("registered", "defs_user", "defs-user-mine")
    late = sys.modules["defs_factory"].make("defs-late")
    assert reference(late.definition) is None


def test_replaced_definition_is_no_longer_found_and_the_new_one_is(module: Importer) -> None:
    shop = module("defs_shop3", "@pw.step\ndef f(): return 1\nold = f\n@pw.step\ndef f(): return 2")
    assert reference(shop.old.definition) is None
    assert reference(shop.f.definition) == ("import", "defs_shop3", "f")


def test_same_explicit_name_from_two_modules_is_refused_naming_both(module: Importer) -> None:
    module("defs_one", "@pw.step(name='defs-dup')\ndef f(): ...")
    with pytest.raises(pw.ConfigurationError, match=r"(?s)'defs-dup'.*defs_one.*defs_two"):
        module("defs_two", "@pw.step(name='defs-dup')\ndef f(): ...")


def test_same_explicit_name_in_one_module_replaces(module: Importer) -> None:
    shop = module("defs_shop4", "@pw.step(name='defs-re')\ndef f(): ...\n@pw.step(name='defs-re')\ndef g(): ...")
    assert resolve("step", "registered", "defs_shop4", "defs-re") is shop.g.definition


def test_step_and_workflow_may_share_a_name(module: Importer) -> None:
    module("defs_both", "@pw.step(name='defs-b')\ndef f(): ...\n@pw.workflow(name='defs-b')\nasync def g(): ...")


def test_function_local_steps_replace_each_other_without_complaint() -> None:
    def make() -> Any:
        @pw.step(name="defs-local")
        def inner() -> None: ...

        return inner

    assert make() is not make()


def test_module_made_by_hand_is_not_importable() -> None:
    made = types.ModuleType("defs_by_hand")
    exec("import pyworkflow_ray as pw\n@pw.step\ndef f(): ...", made.__dict__)
    sys.modules["defs_by_hand"] = made
    try:
        assert not is_importable("defs_by_hand")
        assert reference(made.f.definition) is None
    finally:
        del sys.modules["defs_by_hand"]


def test_missing_module_and_missing_name_say_what_to_do(module: Importer) -> None:
    with pytest.raises(pw.ConfigurationError, match="can't be imported here"):
        resolve("step", "import", "defs_no_such_module", "f")
    module("defs_shop5", "@pw.step\ndef charge(): ...")
    with pytest.raises(pw.ConfigurationError, match=r"has no step 'chrge'.*Did you mean 'charge'"):
        resolve("step", "import", "defs_shop5", "chrge")


def test_short_name_is_the_qualname_where_it_is_unique(module: Importer) -> None:
    one = module("defs_short1", "@pw.step\ndef only_here(): ...\n@pw.step\ndef shared(): ...")
    module("defs_short2", "@pw.step\ndef shared(): ...")
    assert short_name(one.only_here.definition) == "only_here"
    assert short_name(one.shared.definition) == "defs_short1:shared"


@pytest.mark.parametrize(
    "thing",
    [
        5,
        None.__class__,
        len,
        functools.partial(print, 1),
        staticmethod(lambda: 1),
        type("Callable", (), {"__call__": print})(),
    ],
)
def test_only_functions_become_steps(thing: Any) -> None:
    with pytest.raises(DefinitionError, match="is no function"):
        pw.step(thing)


def test_generators_are_refused() -> None:
    def numbers() -> Any:
        yield 1

    async def more() -> Any:
        yield 1

    for fn in (numbers, more):
        with pytest.raises(TypeError, match="is a generator"):
            pw.step(fn)


def test_step_of_a_step_is_refused() -> None:
    @pw.step
    def f() -> None: ...

    with pytest.raises(DefinitionError, match=r"is a step already; use \.options"):
        pw.step(f)


def test_workflow_must_be_async() -> None:
    def flow() -> None: ...

    with pytest.raises(DefinitionError, match="async def flow"):
        pw.workflow(flow)  # type: ignore[type-var]
