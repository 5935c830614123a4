"""What was ordered: the recipe, the name of the release, and the context that its stages share."""

import re
import secrets
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from modelmint import formats
from modelmint.artifact import Invocation
from modelmint.convert import base_options
from modelmint.errors import InputError, RecipeError
from modelmint.recipe import Recipe
from modelmint.recipe_file import find_recipe
from modelmint.settings import Settings
from modelmint.spelling import did_you_mean
from modelmint.step import Context
from modelmint.store import LOCK_FILE, Store

if TYPE_CHECKING:
    from tasks.track import TrackedRelease

RECIPES = Path(__file__).parent.parent / "deployments" / "recipes"
"""Where recipes are looked up by name."""


NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""What a release can be called: its documents lie in a folder of that name."""


@dataclass(frozen=True)
class Order:
    """One release as it was asked for.

    Attributes:
        recipe: what is wanted, narrowed to the variants asked for.
        name: what the release is called.
        context: store, settings and invocation of its stages.
    """

    recipe: Recipe
    name: str
    context: Context

    def tracked_as(self, tracked: "TrackedRelease") -> "Order":
        """The same order, with the tracker's run in the invocation of every step."""
        invocation = self.context.invocation.model_copy(update={"tracking_run": tracked.run_id})
        return replace(self, context=replace(self.context, invocation=invocation))


def open_order(recipe: str, variants: list[str], name: str = "", flow_run: str = "") -> Order:
    """Read the recipe and refuse what can be refused before any work.

    Args:
        recipe: name of a recipe, or the path of a YAML file.
        variants: only these of its variants; all if empty.
        name: what the release is called; made from recipe and time if empty.
        flow_run: id of the orchestrator's run.

    Raises:
        RecipeError: says which key, value or variant is wrong, and what was meant.
        InputError: if the name cannot be used.
    """
    settings = Settings()
    store = Store(settings.store)
    wanted = narrowed(find_recipe(recipe, RECIPES), variants)
    refuse_impossible(wanted)
    if name:
        refuse_name(name, store)
    name = name or release_name(wanted.name)
    invocation = Invocation(flow_run=flow_run, release=name)
    return Order(wanted, name, Context(store, settings, invocation))


def refuse_name(name: str, store: Store) -> None:
    """Refuse a name that cannot be a folder's, or that a release has whose documents would be overwritten.

    Raises:
        InputError: says which and why.
    """
    if not NAME.fullmatch(name):
        raise InputError(f"a release cannot be called {name!r}: take letters, digits, dots, dashes and underscores")
    if (store.root / "releases" / name / LOCK_FILE).exists():
        raise InputError(f"{store.root} has a release {name!r} already; give this one another name, or none")


def release_name(recipe: str) -> str:
    """A new name: recipe, time in UTC, and four digits so that two of one second differ."""
    return f"{recipe}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def narrowed(recipe: Recipe, variants: list[str]) -> Recipe:
    """The recipe with only these of its variants.

    Raises:
        RecipeError: if it has no variant of that name.
    """
    if not variants:
        return recipe
    known = [variant.name for variant in recipe.variants]
    for name in variants:
        if name not in known:
            raise RecipeError(f"recipe {recipe.name} has no variant {name!r}{did_you_mean(name, known)}")
    return recipe.model_copy(update={"variants": tuple(v for v in recipe.variants if v.name in variants)})


def refuse_impossible(recipe: Recipe) -> None:
    """Refuse formats, types and options that do not exist, before anything is fetched.

    Raises:
        RecipeError: names what is unknown and what was meant.
    """
    if recipe.calibration is not None:
        raise RecipeError(f"recipe {recipe.name}: nothing here uses calibration data yet; leave calibration out")
    for variant in recipe.variants:
        formats.load(variant.format).check(variant)
    for name, options in recipe.base.items():
        base_options(name, options)
