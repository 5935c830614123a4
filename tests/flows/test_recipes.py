"""The shipped recipes: each is sound, and each of the Hub's is proved on a random checkpoint of its architecture."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
from homes import MLFLOW_WARNS, Home, Server
from hub_server import HubServer

from flows.order import RECIPES, refuse_impossible
from modelmint.formats.fake_model import write_checkpoint
from modelmint.recipe import Benchmark, Recipe
from modelmint.recipe_file import find_recipe, parse_recipe, write_recipe
from modelmint.release_lock import ReleaseLock

pytestmark = [pytest.mark.flows, MLFLOW_WARNS]

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
VARIANTS = ["gguf:Q8_0", "gguf:Q4_K_M"]


@dataclass(frozen=True)
class Stands:
    """What stands for a model of the Hub.

    Attributes:
        recipe: the shipped recipe.
        architecture: of the checkpoint, as `tiny` calls it.
        license: as the card of the model names it.
        gated: whether its repository is.
        code: whether its repository brings code for older versions of transformers.
    """

    recipe: str
    architecture: str
    license: str
    gated: bool = False
    code: bool = False


MODELS = [
    Stands("smollm2-135m-hub", "llama", "apache-2.0"),
    Stands("qwen3-0.6b", "qwen3", "apache-2.0"),
    Stands("phi-4-mini", "phi3", "mit", code=True),
    Stands("gemma-3-1b", "gemma3", "gemma", gated=True),
]


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def home(server: Server, hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home whose Hub is the local one."""
    return Home(tmp_path_factory.mktemp("home"), server, {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token})


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_is_sound_and_named_like_its_file(name: str) -> None:
    recipe = find_recipe(name, RECIPES)
    assert recipe.name == name
    assert recipe.description
    refuse_impossible(recipe)
    assert parse_recipe(write_recipe(recipe)) == recipe


def test_every_recipe_of_the_hub_is_proved_here() -> None:
    hubs = {name for name in NAMES if find_recipe(name, RECIPES).source.scheme == "hf"}
    assert hubs == {model.recipe for model in MODELS}


def published(model: Stands, hub: HubServer, folder: Path) -> str:
    """Put a random checkpoint into the place of a model; returns its commit."""
    checkpoint = tiny.checkpoint(folder / model.recipe, model.architecture)
    (checkpoint / "README.md").write_text(f"---\nlicense: {model.license}\n---\nRandom weights.\n")
    if model.code:
        config = json.loads((checkpoint / "config.json").read_text())
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_old.OldForCausalLM"}
        (checkpoint / "config.json").write_text(json.dumps(config))
        (checkpoint / "modeling_old.py").write_text("raise SystemExit('code of the repository was run')\n")
    repository = find_recipe(model.recipe, RECIPES).source.location
    commit = hub.publish(repository, checkpoint)
    hub.repositories[repository].gated = model.gated
    return commit


def small(recipe: Recipe) -> Recipe:
    """A recipe with little to measure, and without the two gates that random weights cannot keep.

    They predict many tokens with nearly the same probability, so that which of them comes first turns with every bit
    that is lost; and what they answer to a prompt may be a special token, which is no text. All other gates stay.
    """
    evaluation = recipe.evaluation.model_copy(
        update={"windows": 2, "window": 128, "prompts": ("Hi",), "answer_tokens": 4}
    )
    gates = recipe.gates | {"top_1_agreement": None, "generates": None}
    benchmark = Benchmark(prompt_tokens=16, generate_tokens=4, trials=1)
    return recipe.model_copy(update={"evaluation": evaluation, "gates": gates, "benchmark": benchmark})


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.recipe)
def test_a_recipe_of_the_hub_works_on_a_checkpoint_of_its_architecture(
    model: Stands, home: Home, hub: HubServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    commit = published(model, hub, tmp_path_factory.mktemp("hub"))
    recipe = find_recipe(model.recipe, RECIPES)
    report = home.release(home.write(small(recipe)), VARIANTS)
    assert {it.variant: (it.outcome, it.reasons) for it in report.judged} == dict.fromkeys(VARIANTS, ("passed", ()))
    assert report.source.reference == f"hf:{recipe.source.location}@{commit}"
    assert (report.source.revision, report.source.license) == (commit, model.license)
    figures = {it.measure: it.value for it in report.variant("gguf:Q8_0").measurements}
    assert figures["kl_divergence"] < 0.002, "eight bits are nearly lossless, here as in trained models"
    assert figures["conversion_kl"] < 1e-3
    assert {stage for variant in report.variants for stage in (step.stage for step in variant.steps)} == {
        "convert",
        "quantize",
        "reference",
        "evaluate",
        "benchmark",
    }
    assert not hub.asked_for("modeling_old.py")


def test_a_moved_branch_is_another_release_and_the_first_lock_still_names_the_old_commit(
    home: Home, hub: HubServer, tmp_path: Path
) -> None:
    def commit(name: str) -> str:
        """The next commit: the weights follow from the name."""
        (tmp_path / name).mkdir()
        write_checkpoint(name, tmp_path / name)
        return hub.publish("acme/Moving", tmp_path / name)

    recipe = home.recipe(["fake:Q8"], name="moving", source="hf:acme/Moving@main")
    before = commit("tiny")
    first = home.release(recipe)
    lock = home.store.root / "releases" / first.release / "lock.json"
    kept = lock.read_bytes()
    after = commit("other")
    second = home.release(recipe)
    assert (first.source.revision, second.source.revision) == (before, after)
    assert before != after
    executed = Counter(record.step.stage for record in home.records() if record.invocation.release == second.release)
    assert executed == {
        **dict.fromkeys(("acquire", "inspect", "convert", "reference", "quantize"), 1),
        "evaluate": 2,
        "benchmark": 2,
    }, "everything but the text"
    assert lock.read_bytes() == kept
    assert ReleaseLock.model_validate_json(kept).source == f"hf:acme/Moving@{before}"
    assert first.variant("fake:Q8").digest != second.variant("fake:Q8").digest
