"""README says what the code does: its example runs, its tables agree with the code."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from pathlib import Path

from transformers import TrainingArguments

from arguments import Arguments
from tasks import TASKS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def table_row(start: str) -> str:
    (row,) = (line for line in README.splitlines() if line.startswith(f"| {start} |"))
    return row


def test_example_of_the_optimizer_runs_and_its_loss_falls() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, "README.md", "exec"), {})
    losses = [float(line.split()[1]) for line in printed.getvalue().splitlines()]
    assert len(losses) == 4
    assert losses[-1] < 0.1 * losses[0]


def test_argument_table_is_that_of_the_command_line() -> None:
    inherited = {f.name: f.metadata.get("help") for f in dataclasses.fields(TrainingArguments)}
    expected = {}
    for field in dataclasses.fields(Arguments):
        if field.init and inherited.get(field.name) != field.metadata.get("help"):
            names = ", ".join(
                f"`{n}`" for n in [f"--{field.name}", *field.metadata.get("aliases", [])]
            )
            value = getattr(field.default, "value", field.default)
            shown = "–" if value is None else f"`{value}`"
            text = field.metadata["help"].replace("|", "/")
            expected[names] = f"| {names} | {shown} | {text} |"
    section = README.split("## Arguments of run.py")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `--")]
    assert sorted(rows) == sorted(expected.values())


def test_variables_of_hizoo_sh_are_in_its_table() -> None:
    script = (ROOT / "HiZOO.sh").read_text(encoding="utf-8")
    defaults = dict(re.findall(r"^([A-Z_]+)=\$\{\1:-(.*?)\}", script, flags=re.MULTILINE))
    table = README.split("| variable | bundled model")[1].split("\n\n")[0]
    for name, value in defaults.items():
        assert f"`{name}`" in table
        if value and not value.startswith("$"):
            (row,) = (line for line in table.splitlines() if f"`{name}`" in line)
            assert value in row, name


def test_task_table_has_the_prompts_of_the_templates() -> None:
    for task in TASKS.values():
        row = table_row(task.name)
        assert task.hub_path in row
        assert task.hub_config is None or f"({task.hub_config})" in row
        values = {column: f"{{{column}}}" for column in task.text_columns}
        if task.name == "Copa":
            values["question"] = "effect"
        prompt = task.template.prompt(values).replace("\n", "\\n")
        if task.name == "BoolQ":
            prompt = prompt.replace("{Question}", "{question}")
        assert f"`{prompt}`" in row, task.name


def test_both_commands_exist_and_ci_runs_the_second() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test"):
        assert f"\n    make {target}\n" in README
        assert f"\n{target}:" in makefile
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_files_of_the_table_exist() -> None:
    section = README.split("## Files")[1].split("\n## ")[0]
    names = re.findall(r"`([\w./]+)`", "\n".join(section.splitlines()[4:]))
    assert len(names) > 15
    for name in names:
        if "." in name or name.endswith("/"):
            assert any((ROOT / folder / name).exists() for folder in ("", "tests")) or name == (
                "transformers.Trainer"
            ), name
