"""The quantize stage: a base becomes one variant."""

from modelmint import formats
from modelmint.artifact import Step
from modelmint.recipe import Variant
from modelmint.sandbox import sandbox
from modelmint.step import Context, StepResult, Work, Workspace, run_step


def quantize(base: str, variant: Variant, context: Context) -> StepResult:
    """Make one variant from the unquantized base of its format.

    Args:
        base: digest of the base.
        variant: what is wanted; its label is a name only and does not enter the key.
        context: store, settings and who asks.

    Raises:
        RecipeError: for a type or option that the format does not have.
        ToolError: if the quantizer fails.
    """
    module = formats.load(variant.format)
    module.check(variant)
    step = Step(
        stage="quantize",
        stage_version=module.STAGE_VERSION,
        parameters={"format": variant.format, "type": variant.type, "options": module.parameters(variant)},
        inputs={"base": base},
        tools=module.tools("quantize"),
    )

    def work(workspace: Workspace) -> Work:
        folder = context.store.materialize(base, workspace.folder / "base")
        return module.quantize(folder, workspace.out, variant, sandbox(context, workspace))

    return run_step(context, step, work)
