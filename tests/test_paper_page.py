"""The page with the paper's tables holds the numbers that the commands print."""

from collections.abc import Iterator
from pathlib import Path

from distill_jax.report.published import (
    FIGURE_5,
    TABLE_1,
    TABLE_3,
    TABLE_4,
    TABLE_5,
    TABLE_6,
    TABLE_7,
    TABLE_11,
    TASKS,
    published_accuracy,
)

PAGE = Path(__file__).resolve().parents[1] / "docs" / "paper.md"


def cells() -> Iterator[tuple[str, list[str]]]:
    """Every row's name, and what stands for the paper's number in its cells."""
    for line in PAGE.read_text().splitlines():
        if line.startswith("| "):
            name, *values = (cell.strip() for cell in line.strip("|").split("|"))
            yield name, [value.split(" / ")[0].rstrip("*") for value in values]


def test_every_published_number_stands_on_the_page():
    found = list(cells())
    expected: list[tuple[str, list[str]]] = []
    for row in TABLE_1.values():
        expected.append((row.name, ["-" if x is None else f"{x:.1f}" for x in row.accuracy]))
    for task, told in TABLE_3.items():
        counts = [str(told.requests), *map(str, told.successes)]
        expected.append((task, [*counts, *(f"{x:.1f}" for x in told.accuracy)]))
    for task, both in TABLE_4.items():
        numbers = (*both["distance"], *both["preference"])
        expected.append((task, [f"{x:.2f}" for x in numbers]))
    for task, rounds in TABLE_5.items():
        for index, entry in enumerate(rounds):
            rows = "-" if entry.rows is None else f"{entry.rows:g}k"
            gain = f"{entry.gain:+.1f}" if index else f"{entry.gain:.1f}"
            expected.append((f"{task}, {index}", [rows, f"{entry.error_rate:.1f}", gain]))
    for task, scores in TABLE_6.items():
        for index, pair in enumerate(scores):
            expected.append((f"{task}, {index}", [f"{x:.2f}" for x in pair]))
    for name, numbers in TABLE_11.items():
        expected.append((name, [f"{x:.1f}" for x in numbers]))
    for task, values in FIGURE_5.items():
        expected += [(f"{task}, {weight:g}", [f"{x:.1f}"]) for weight, x in values.items()]
    missing = [row for row in expected if row not in found]
    assert not missing
    for student, stages in TABLE_7.items():
        mine = [values for name, values in found if name.startswith(f"{student}, ")]
        assert mine == [[f"{a:.1f}", f"{b:.1f}"] for a, b in stages.values()]


def test_copied_numbers_have_a_star():
    for line in PAGE.read_text().splitlines():
        for row in TABLE_1.values():
            if line.startswith(f"| {row.name} |"):
                values = [cell.strip() for cell in line.strip("|").split("|")][1:]
                starred = {task for task, x in zip(TASKS, values, strict=True) if "* /" in x}
                assert starred == set(row.copied)


def test_rounds_and_rows_of_the_paper_agree_with_each_other():
    """Gains add up to table 1's last row of rounds, where the paper agrees with itself."""
    assert (
        sum(entry.gain for entry in TABLE_5["gsm8k"])
        == 32.0
        == published_accuracy("multi_round", "gsm8k")
    )
    svamp = TABLE_5["svamp"][:3]
    assert round(sum(entry.gain for entry in svamp), 1) == published_accuracy(
        "multi_round", "svamp"
    )
    assert TABLE_11["gsm8k first"][0] == published_accuracy("one_round", "gsm8k")
    assert TABLE_11["none"] == TABLE_1["student"].accuracy
