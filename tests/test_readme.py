"""README says what the code does: its example runs, its tables agree with the code."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from pathlib import Path

from transformers import TrainingArguments

from command_line.arguments import Arguments
from tasks import TASKS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def rows_of(heading: str) -> dict[str, list[str]]:
    """The cells of the table behind a heading, by what its first cell names in backticks."""
    section = re.split(rf"^#+ {re.escape(heading)}$", README, flags=re.MULTILINE)[1]
    table = re.search(r"(?:^\|.*\n)+", section, flags=re.MULTILINE)[0]
    cells = [line.strip("|").split(" | ") for line in table.splitlines()[2:]]
    return {row[0].strip(" `"): [cell.strip() for cell in row[1:]] for row in cells}


def test_example_of_the_optimizer_prints_what_readme_shows() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert "from hizoo import HiZOO" in blocks[0] and "LayerwiseWeights" in blocks[1]
    printed, namespace = io.StringIO(), {}
    with contextlib.redirect_stdout(printed):
        exec(compile(blocks[0], "README.md", "exec"), namespace)
    losses = [float(line.split()[-1]) for line in printed.getvalue().splitlines()]
    shown = README.split("It prints\n\n```\n")[1].split("```")[0]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.1 * losses[0]
    # Another processor rounds differently; the course is the same.
    expected = [float(line.split()[-1]) for line in shown.splitlines()]
    assert all(abs(a - b) < 0.05 * b for a, b in zip(losses, expected, strict=True))
    exec(compile(blocks[1], "README.md", "exec"), namespace)
    assert namespace["loss"] > 0


def test_argument_table_is_that_of_the_command_line() -> None:
    inherited = {f.name: f.metadata.get("help") for f in dataclasses.fields(TrainingArguments)}
    own = [
        field
        for field in dataclasses.fields(Arguments)
        if field.init and inherited.get(field.name) != field.metadata.get("help")
    ]
    rows = rows_of("Arguments of run.py")
    assert set(rows) == {f"--{field.name}" for field in own}
    for field in own:
        default = getattr(field.default, "value", field.default)
        shown, text = rows[f"--{field.name}"][0].strip("`"), rows[f"--{field.name}"][1]
        if default is None:
            assert shown == "—", field.name
        elif type(default) in (int, float):
            assert float(shown) == default, field.name
        else:
            assert shown == str(default), field.name
        for alias in field.metadata.get("aliases", []):
            assert f"`{alias}`" in text
        choices = getattr(Arguments.__dataclass_fields__[field.name].type, "__args__", ())
        assert all(str(choice) in text for choice in choices if isinstance(choice, str))


def test_variables_of_hizoo_sh_are_in_its_table() -> None:
    script = (ROOT / "HiZOO.sh").read_text(encoding="utf-8")
    variables = re.findall(r"^ *([A-Z_]+)=\$\{\1:-(.*?)\}", script, flags=re.MULTILINE)
    rows = rows_of("Variables of HiZOO.sh")
    assert set(rows) == {name for name, _ in variables} | {"MODEL"}
    for name, value in variables:
        if value and not value.startswith("$"):
            assert f"`{value}`" in rows[name][:2], name


def test_task_table_has_the_prompts_of_the_templates() -> None:
    rows = rows_of("The eleven tasks")
    assert set(rows) == set(TASKS)
    for task in TASKS.values():
        prompt, options, metric, hub = rows[task.name]
        assert metric == task.metric_name
        assert task.hub_path in hub and (task.hub_config or "") in hub
        values = {column: f"{{{column}}}" for column in task.text_columns}
        if task.name == "Copa":
            values["question"] = "effect"
        written = task.template.prompt(values).replace("\n", "\\n")
        if task.name == "BoolQ":
            written = written.replace("{Question}", "{question}")
        assert f"`{written}`" in prompt, task.name
        for label, word in getattr(task.template, "verbalizer", {}).items():
            assert f"`{word}` ({label})" in options, task.name


def test_both_commands_exist_and_ci_runs_the_second() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test"):
        assert f"**`make {target}`**" in README
        assert f"\n{target}:" in makefile
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_every_file_of_the_root_is_in_the_table() -> None:
    rows = {name for cell in rows_of("Files") for name in cell.replace("`", "").split(", ")}
    assert all((ROOT / name).exists() for name in rows)
    assert {path.name for kind in ("*.py", "*.sh") for path in ROOT.glob(kind)} <= {
        *rows,
        "settings.sh",
    }
