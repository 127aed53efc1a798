"""Question sets: counts, splits and clean texts of the real files, and how a run selects."""

import json
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

import distill_jax
from distill_jax.config import TaskConfig
from distill_jax.contamination import ExamTexts
from distill_jax.questions import QuestionsError, default_data_dir, load_questions, prepare
from distill_jax.questions.published import split_rows
from distill_jax.records import Question

COUNTS = {
    "gsm8k": {"train": 7473, "test": 1319},
    "multiarith": {"train": 420, "test": 180},
    "svamp": {"train": 700, "test": 300},
    "csqa": {"train": 9741, "test": 1221},
    "strategyqa": {"train": 1603, "test": 685, "left_out": 2},
}


@pytest.fixture(scope="module")
def data_dir(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    for name, counts in COUNTS.items():
        assert prepare(name, data_dir=folder, source=shared / "data") == counts
    return folder


@pytest.fixture(scope="module")
def sets(data_dir: Path) -> dict[str, list[Question]]:
    """Every set as the paper has it: no dev split."""
    return {
        name: load_questions(TaskConfig(name=name, dev_fraction=0), seed=0, data_dir=data_dir)
        for name in COUNTS
    }


def of(questions: list[Question], split: str) -> list[Question]:
    return [question for question in questions if question.split == split]


def rows_of(questions: list[Question]) -> list[int]:
    return [int(question.id.split("/")[-1]) for question in questions]


@pytest.mark.parametrize("name", COUNTS)
def test_counts_and_file_order(sets: dict[str, list[Question]], name: str) -> None:
    questions = sets[name]
    assert len({question.id for question in questions}) == len(questions)
    for split in ("train", "test"):
        part = of(questions, split)
        assert len(part) == COUNTS[name][split]
        assert rows_of(part) == sorted(rows_of(part))
    assert [q.split for q in questions] == sorted((q.split for q in questions), reverse=True)


@pytest.mark.parametrize("name", COUNTS)
def test_texts_are_clean(sets: dict[str, list[Question]], name: str) -> None:
    for question in sets[name]:
        for text in (question.text, question.answer, question.solution, *question.choices):
            assert text == text.strip() and "\n\n" not in text
        assert question.text and question.answer
        assert "<<" not in question.solution
        if name in ("multiarith", "svamp"):
            assert ".0" not in question.solution


def test_ids_are_the_places_in_the_raw_files(sets: dict[str, list[Question]], shared: Path) -> None:
    by_id = {question.id: question for questions in sets.values() for question in questions}
    lines = (shared / "data/gsm8k/test.jsonl").read_text().split("\n")
    assert by_id["gsm8k/test/7"].text == json.loads(lines[7])["question"].strip()
    assert by_id["gsm8k/train/6"].text.startswith("Albert is wondering how much pizza")
    assert by_id["csqa/train/8"].text.startswith("What do people use to absorb extra ink")
    assert by_id["multiarith/212"].text.startswith("Cody bought 7 boxes of chocolate candy")
    assert by_id["svamp/703"].text == (
        "Paul had 50 books. After buying some in a garage sale he had 151 left. "
        "How many books did he buy?"
    )
    assert by_id["strategyqa/1952"].text == "Are chinchillas cold-blooded?"


@pytest.mark.parametrize(("num_rows", "num_train"), [(600, 420), (1000, 700), (2290, 1603)])
def test_ho_split_takes_every_row_once(num_rows: int, num_train: int) -> None:
    train, test = split_rows(num_rows)
    assert len(train) == num_train
    assert sorted(train + test) == list(range(num_rows))


def test_ho_split_membership(sets: dict[str, list[Question]]) -> None:
    strategyqa = sets["strategyqa"]
    train, test = (set(rows_of(of(strategyqa, split))) for split in ("train", "test"))
    assert {1952, 1426, 503, 42} <= train and {336, 1987} <= test
    assert not {369, 550} & (train | test), "demonstrations of the prompts"
    assert {703, 527, 298} <= set(rows_of(of(sets["svamp"], "train")))
    assert {536, 212, 138} <= set(rows_of(of(sets["multiarith"], "train")))


def test_no_demonstration_is_a_test_question(sets: dict[str, list[Question]]) -> None:
    shown = Path(distill_jax.__file__).parent / "demonstrations"
    for name, questions in sets.items():
        exam = ExamTexts(of(questions, "test"))
        texts = [text for path in shown.glob(f"{name}*.txt") for text in _asked(path)]
        assert len(texts) >= 6
        assert [text for text in texts if exam.find(text)] == []


def _asked(path: Path) -> list[str]:
    """The questions of a file of demonstrations."""
    return re.findall(r"^Question: (.+)$", path.read_text(), flags=re.MULTILINE)


def test_multiarith_repeats(sets: dict[str, list[Question]]) -> None:
    train, test = of(sets["multiarith"], "train"), of(sets["multiarith"], "test")
    seen = {question.text for question in train}
    assert len(train) - len(seen) == 12
    assert len(test) - len({question.text for question in test}) == 3
    assert sorted(rows_of([q for q in test if q.text in seen])) == [40, 41, 42, 58, 352]


def test_gsm8k_golds(sets: dict[str, list[Question]]) -> None:
    for split, commas, negative in (
        ("train", 79, {"-7", "-47", "-12"}),
        ("test", 14, {"-10", "-3"}),
    ):
        golds = [question.answer for question in of(sets["gsm8k"], split)]
        assert sum("," in gold for gold in golds) == commas
        assert {gold for gold in golds if gold.startswith("-")} == negative


def test_kinds_choices_and_answers(sets: dict[str, list[Question]]) -> None:
    kinds = {name: {question.kind for question in questions} for name, questions in sets.items()}
    assert kinds == {
        "gsm8k": {"numeric"},
        "multiarith": {"numeric"},
        "svamp": {"numeric"},
        "csqa": {"choice"},
        "strategyqa": {"yes_no"},
    }
    assert {(len(q.choices), q.answer) for q in sets["csqa"]} == {(5, x) for x in "abcde"}
    assert max(int(question.answer) for question in sets["svamp"]) == 22_090_603
    answers = Counter(question.answer for question in of(sets["strategyqa"], "test"))
    assert answers == {"No": 361, "Yes": 324}  # 52.5% of 687, with the two that are left out


def test_solutions_end_in_the_gold_answer(sets: dict[str, list[Question]]) -> None:
    for question in (q for name in ("gsm8k", "multiarith", "svamp") for q in sets[name]):
        if question.id == "svamp/679":  # its equation gives 5, its answer is 1
            assert question.solution == ""
            continue
        last = re.findall(r"-?[\d,]*\.?\d+", question.solution)[-1]
        gold = Fraction(question.answer.replace(",", ""))
        assert Fraction(last.replace(",", "")) == gold, question
    for question in sets["strategyqa"]:
        assert re.search(r"[.!?] So, the answer is (\w+)\.$", question.solution)
        assert question.solution.endswith(f" {question.answer}.")
    for question in sets["csqa"]:
        choice = question.choices["abcde".index(question.answer)]
        end = f" Therefore, the answer is {choice} ({question.answer})."
        assert question.solution.endswith(end)


def test_solutions_are_told_from_the_files(sets: dict[str, list[Question]]) -> None:
    by_id = {question.id: question for questions in sets.values() for question in questions}
    assert by_id["multiarith/0"].solution == "First, 32 + 42 = 74. Then, 74 - 35 = 39."
    assert by_id["svamp/0"].solution == "76 - 25 = 51."
    assert by_id["svamp/554"].solution == "The answer is 8."
    assert by_id["gsm8k/train/0"].solution == (
        "Natalia sold 48/2 = 24 clips in May.\n"
        "Natalia sold 48+24 = 72 clips altogether in April and May."
    )
    assert by_id["gsm8k/train/14"].solution.endswith("120 pages.\nSo, the answer is 5.")
    assert by_id["strategyqa/1"].solution.startswith("Hydrogen is the first element")


def test_groups_name_what_sort_a_question_is(sets: dict[str, list[Question]]) -> None:
    assert {q.group for q in sets["svamp"]} == {
        "addition", "subtraction", "multiplication", "common-division"
    }  # fmt: skip
    assert Counter(q.group for q in sets["multiarith"])["addition, subtraction"] == 200
    assert {q.group for q in sets["gsm8k"]} == {f"{n} steps" for n in (*range(2, 10), 11)}


def test_dev_is_carved_out_of_train(data_dir: Path, sets: dict[str, list[Question]]) -> None:
    task = TaskConfig(name="multiarith")
    questions = load_questions(task, seed=7, data_dir=data_dir)
    assert questions == load_questions(task, seed=7, data_dir=data_dir)
    train, dev = of(questions, "train"), of(questions, "dev")
    assert {q.text for q in train}.isdisjoint(q.text for q in dev), "repeats stay on one side"
    assert len({q.text for q in dev}) == 41  # a tenth of the 408 distinct texts
    assert sorted(rows_of(train + dev)) == rows_of(of(sets["multiarith"], "train"))
    assert rows_of(dev) == sorted(rows_of(dev))
    assert of(questions, "test") == of(sets["multiarith"], "test")
    other = load_questions(task, seed=8, data_dir=data_dir)
    assert {q.id for q in of(other, "dev")} != {q.id for q in dev}


def test_caps_keep_the_first_questions(data_dir: Path, sets: dict[str, list[Question]]) -> None:
    task = TaskConfig(name="gsm8k", num_train=50, num_test=7)
    questions = load_questions(task, seed=3, data_dir=data_dir)
    assert Counter(q.split for q in questions) == {"train": 45, "dev": 5, "test": 7}
    assert sorted(rows_of(of(questions, "train") + of(questions, "dev"))) == list(range(50))
    assert of(questions, "test") == of(sets["gsm8k"], "test")[:7]


@pytest.mark.parametrize(
    ("num_train", "fraction", "num_dev"), [(2, 0.1, 1), (1, 0.5, 0), (4, 0.99, 3), (9, 0.0, 0)]
)
def test_dev_is_at_least_one_and_never_all(num_train: int, fraction: float, num_dev: int) -> None:
    task = TaskConfig(name="arithmetic", num_train=num_train, dev_fraction=fraction)
    questions = load_questions(task, seed=0, data_dir=Path())
    assert len(of(questions, "dev")) == num_dev
    assert len(of(questions, "train")) == num_train - num_dev


def test_chilled_splits(tmp_path: Path) -> None:
    files = {
        "svamp/train.json": [
            {"Body": "A has 8 eggs", "Question": "How many?", "Answer": "8.0", "Type": "Addition"}
        ],
        "svamp/test.json": [
            {"Body": "B.", "Question": "C?", "Answer": 3, "Equation": "( 1.0 + 2.0 )"}
        ],
        "multiarith/train.json": [{"question": " Q? ", "final_ans": "39"}] * 2,
        "multiarith/test.json": [{"question": "Line\u2028end?", "final_ans": "4"}],
        "strategyqa/train.json": [{"question": "Q?", "answer": True, "facts": "One. Two"}],
        "strategyqa/test.json": [{"question": "R?", "answer": False, "facts": ["One.", "Two."]}],
    }
    for number, (name, rows) in enumerate(files.items()):
        path = tmp_path / "mirror" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_text(json.dumps(rows) if number % 2 else lines)
    data_dir = tmp_path / "data"
    questions = {}
    for name in ("svamp", "multiarith", "strategyqa"):
        task = TaskConfig(name=name, split="chilled", dev_fraction=0)
        with pytest.raises(QuestionsError, match=f"prepare {name} --split chilled --from DIR"):
            load_questions(task, seed=0, data_dir=data_dir)
        counts = prepare(name, split="chilled", data_dir=data_dir, source=tmp_path / "mirror")
        assert counts == {"train": len(files[f"{name}/train.json"]), "test": 1}
        questions[name] = load_questions(task, seed=0, data_dir=data_dir)
    first, last = questions["svamp"]
    assert (first.id, first.text, first.answer) == ("svamp/train/0", "A has 8 eggs. How many?", "8")
    assert (last.id, last.text, last.solution) == ("svamp/test/0", "B. C?", "1 + 2 = 3.")
    assert [q.text for q in questions["multiarith"]] == ["Q?", "Q?", "Line\u2028end?"]
    yes, no = questions["strategyqa"]
    assert (yes.answer, yes.solution) == ("Yes", "One. Two. So, the answer is Yes.")
    assert (no.answer, no.solution) == ("No", "One. Two. So, the answer is No.")


def test_chilled_files_that_are_not_the_mirrors(tmp_path: Path) -> None:
    def prepare_svamp() -> dict[str, int]:
        return prepare("svamp", split="chilled", data_dir=tmp_path / "data", source=tmp_path)

    with pytest.raises(QuestionsError, match=r"train\.json and test\.json .* no train file"):
        prepare_svamp()
    good = {"Body": "B", "Question": "Q?", "Answer": "1"}
    (tmp_path / "test.json").write_text(json.dumps([good]))
    for row, problem in (
        ({"Body": "B", "Question": "Q?"}, r"row 1 has no 'Answer'; got \{\"Body\""),
        ({**good, "Answer": "many"}, r"row 1 can't be read .*'many'"),
        ("text", "row 1 can't be read"),
    ):
        (tmp_path / "train.json").write_text(json.dumps([good, row]))
        with pytest.raises(QuestionsError, match=problem):
            prepare_svamp()
    (tmp_path / "train.json").write_text("[]")
    with pytest.raises(QuestionsError, match=r"train\.json holds no question"):
        prepare_svamp()
    (tmp_path / "train.json").write_text("{")
    with pytest.raises(QuestionsError, match="neither a JSON array nor JSON lines"):
        prepare_svamp()
    (tmp_path / "train.json").write_text(json.dumps([good]))
    assert prepare_svamp() == {"train": 1, "test": 1} == prepare_svamp()
    (tmp_path / "train.json").write_text(json.dumps([good, good]))
    with pytest.raises(QuestionsError, match=r"already prepared from another train\.json: delete"):
        prepare_svamp()


@pytest.mark.parametrize(("name", "split"), [("gsm8k", "chilled"), ("aqua", "ho2023")])
def test_sets_that_do_not_exist(tmp_path: Path, name: str, split: str) -> None:
    with pytest.raises(QuestionsError, match=rf"svamp \(chilled\).*got {name} \({split}\)"):
        prepare(name, split=split, data_dir=tmp_path)


def test_default_data_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_JAX_DATA", "elsewhere")
    assert default_data_dir() == Path("elsewhere")
    monkeypatch.delenv("DISTILL_JAX_DATA")
    assert default_data_dir() == Path.home() / ".cache/distill_jax/questions"
