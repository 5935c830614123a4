"""The convert stage: a checkpoint becomes the one unquantized base of a format, shared by its variants."""

from collections.abc import Mapping

from pydantic import JsonValue, ValidationError

from modelmint import formats
from modelmint.artifact import Step
from modelmint.errors import RecipeError
from modelmint.sandbox import sandbox
from modelmint.spelling import did_you_mean
from modelmint.step import Context, StepResult, Work, Workspace, run_step


def base_options(format_name: str, options: Mapping[str, JsonValue], model: str = "") -> dict[str, JsonValue]:
    """The options of a format's base in full, defaults filled in.

    Args:
        format_name: a name in the table of formats.
        options: as a recipe gives them.
        model: what the model is called inside the file, where the format has a name there and the recipe gives none.

    Raises:
        RecipeError: names the option that the format does not have, or whose value it cannot take.
    """
    known = formats.load(format_name).BaseOptions
    named = {"name": model} if model and "name" in known.model_fields else {}
    try:
        return known.model_validate({**named, **options}).model_dump(mode="json")
    except ValidationError as error:
        mistake = error.errors()[0]
        option = ".".join(str(part) for part in mistake["loc"])
        meant = did_you_mean(option, known.model_fields) if mistake["type"] == "extra_forbidden" else ""
        raise RecipeError(f"base.{format_name}.{option}: {mistake['msg']}{meant}") from None


def convert(source: str, format_name: str, options: Mapping[str, JsonValue], context: Context) -> StepResult:
    """Convert a checkpoint of the store into a format's unquantized base.

    Args:
        source: digest of the checkpoint.
        format_name: a name in the table of formats.
        options: the recipe's options of that base.
        context: store, settings and who asks.

    Raises:
        RecipeError: for options that the format does not have.
        ToolError: if the converter fails.
    """
    module = formats.load(format_name)
    full = base_options(format_name, options)
    step = Step(
        stage="convert",
        stage_version=module.STAGE_VERSION,
        parameters={"format": format_name, "options": full},
        inputs={"source": source},
        tools=module.tools("convert"),
    )

    def work(workspace: Workspace) -> Work:
        folder = context.store.materialize(source, workspace.folder / "source")
        return module.convert(folder, workspace.out, full, sandbox(context, workspace))

    return run_step(context, step, work)
